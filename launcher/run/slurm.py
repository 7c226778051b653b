"""What is said to SLURM and what it answers: by its own commands, as a person would, from any machine of it.

No accounting database is asked: a small cluster has none. What a job was is known while slurmctld remembers.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from launcher.config.schema import SlurmSection
from launcher.config.slurm import OWN_OPTIONS, time_limit_seconds, variable
from launcher.errors import MachineError, RequestError

ANSWER_SECONDS: Final = 60.0
"""How long a command may take. While slurmctld is restarted, its clients wait and try again."""

WORDS: Final[Mapping[str, tuple[str, str]]] = {
    "Invalid partition": ("slurm.partition", "`sinfo --summarize` lists the partitions"),
    "Invalid account": (
        "slurm.account",
        "`sacctmgr show associations user=$USER` lists your accounts and the partitions each may use",
    ),
    "Invalid qos": ("slurm.qos", "`sacctmgr show qos` lists them"),
    "Invalid feature": ("slurm.constraint", "`sinfo --format='%N %f'` lists each node's features"),
    "Requested reservation": ("slurm.reservation", "`scontrol show reservation` lists them"),
    "Invalid node name": ("slurm.exclude", "`sinfo --Node` lists the nodes"),
    "time limit": ("slurm.time_limit", "`sinfo --format='%P %l'` lists each partition's limit"),
    "Requested node configuration": ("slurm", "`scontrol show node` tells what a node has"),
    "Node count": ("nodes", "`sinfo --summarize` tells how many nodes there are"),
}
"""A part of what SLURM says, the key it speaks of, and where to look."""


GOES_ON: Final = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"),
        *("COMPLETING", "STAGE_OUT", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"),
    )
)
"""States of a job that has not come to its end: it runs, or may yet."""

UNAMBIGUOUS: Final[Mapping[str, str]] = {"TZ": "UTC0", "SLURM_TIME_FORMAT": "standard"}
"""Environment in which SLURM writes times that can be read: by themselves they have no time zone, an hour of
each autumn is there twice, and a user may have asked for words such as `Tomorr 15:00`."""

OF_THE_CLUSTER: Final = frozenset(("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"))
"""Which SLURM is meant. Every other variable of SLURM's own describes the job that a process is in."""
OVERRULING: Final = frozenset(variable(option) for option in OWN_OPTIONS if option != "export")
"""Variables by which sbatch would take another value than the job script has."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as slurmctld knows it. Times are in seconds since the epoch.

    `restarts` counts how often it was requeued, in the moment that it is. `preempted`: SLURM has told its
    steps to end. `start`: when it did, or is expected to.
    """

    job: str
    state: str
    reason: str
    restarts: int
    nodes: str
    partition: str
    preempted: bool
    start: float | None
    end: float | None

    @property
    def is_over(self) -> bool:
        return self.state not in GOES_ON


@dataclass(frozen=True, slots=True)
class Partition:
    """What a partition lends: `limit` and `grace` in seconds, None: no limit; `nodes` by name."""

    name: str
    limit: int | None
    grace: int
    nodes: tuple[str, ...]


def said(*command: str, seconds: float = ANSWER_SECONDS, env: Mapping[str, str] | None = None) -> str:
    """What a command of SLURM's prints, in the environment `env`; None: in this process's.

    Raises MachineError where there is no such command, or slurmctld does not answer, and RequestError in
    SLURM's own words, and ours, where it refuses.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=env)
    except FileNotFoundError as error:
        raise MachineError(
            f"there is no {command[0]} here",
            hint="run this on a login node of the cluster; some need `module load slurm` first",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"{command[0]} did not answer for {seconds:.0f} s", hint="`scontrol ping` tells of slurmctld"
        ) from error
    if done.returncode:
        raise refusal(command[0], done.stderr or done.stdout)
    return done.stdout.rstrip("\n")


def refusal(program: str, words: str) -> MachineError | RequestError:
    """What SLURM refused, in its words and ours."""
    lines = [line.split("error: ", 1)[-1].strip() for line in words.splitlines() if line.strip()]
    text = "; ".join(dict.fromkeys(lines))
    if "Unable to contact" in text:
        return MachineError(f"{program}: {text}", hint="`scontrol ping` tells whether slurmctld is up")
    key, hint = next((ours for part, ours in WORDS.items() if part.lower() in text.lower()), (None, None))
    about = f"{key}: " if key else ""
    return RequestError(f"{about}SLURM refuses: {text}", hint=hint, key=key)


def fields_of(line: str) -> dict[str, str]:
    """The `Name=value` words of one line of `scontrol --oneliner show`; a value may hold spaces."""
    parts = re.split(r"(?:^|\s)([A-Za-z][\w:/]*)=", line)
    return {name: value.strip() for name, value in zip(parts[1::2], parts[2::2], strict=True)}


def job_state(job: str, seconds: float = ANSWER_SECONDS) -> JobState | None:
    """The job as slurmctld knows it; None once it is forgotten. Of an array, an element that goes on if any
    does."""
    try:
        asked = ("scontrol", "--oneliner", "show", "job", job)
        answer = said(*asked, seconds=seconds, env={**os.environ, **UNAMBIGUOUS})
    except RequestError as error:
        if "Invalid job id" in error.message:
            return None
        raise
    jobs = [read_job(line) for line in answer.splitlines()]
    return next((each for each in jobs if not each.is_over), jobs[0])


def clock(seconds: float = ANSWER_SECONDS) -> float:
    """What time it is for slurmctld, in whole seconds since the epoch. Raises MachineError where it does not
    say."""
    asked = ("scontrol", "show", "config")
    answer = said(*asked, seconds=seconds, env={**os.environ, **UNAMBIGUOUS})
    match = re.match(r"Configuration data as of (\S+)", answer)
    if match is None or (now := _time(match[1])) is None:
        raise MachineError("slurmctld does not say what time it is")
    return now


def read_job(line: str) -> JobState:
    """The job in a line of `scontrol --oneliner show job`, asked for in UTC (`UNAMBIGUOUS`)."""
    found = fields_of(line)
    return JobState(
        job=found["JobId"],
        state=found["JobState"],
        reason=found["Reason"],
        restarts=int(found["Restarts"]),
        nodes=_given(found.get("NodeList")) or "",
        partition=found["Partition"],
        preempted=_time(found.get("PreemptTime")) is not None,
        start=_time(found.get("StartTime")),
        end=_time(found.get("EndTime")),
    )


def _given(value: str | None) -> str | None:
    return None if value in (None, "", "(null)", "None", "Unknown", "N/A") else value


def _time(value: str | None) -> float | None:
    """Seconds since the epoch."""
    given = _given(value)
    return None if given is None else datetime.fromisoformat(given).replace(tzinfo=UTC).timestamp()


def hosts(nodes: str) -> tuple[str, ...]:
    """The names in a list of nodes such as `n[1-3,7]`, in SLURM's order."""
    return tuple(said("scontrol", "show", "hostnames", nodes).split()) if nodes else ()


def configuration() -> dict[str, str]:
    """The cluster's configuration, as `scontrol show config` has it."""
    pairs = (line.partition("=") for line in said("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def seconds_in(value: str | None) -> int | None:
    """The number in a value such as `30 sec`; None for one that has none."""
    match = re.match(r"(\d+)", value or "")
    return int(match[1]) if match else None


def partitions() -> list[tuple[Partition, bool]]:
    """Every partition, hidden ones too, and whether it is the one that is taken where none is named."""
    found = []
    for line in said("scontrol", "--oneliner", "--all", "show", "partition").splitlines():
        fields = fields_of(line)
        limit = fields["MaxTime"]
        found.append(
            (
                Partition(
                    fields["PartitionName"],
                    None if limit == "UNLIMITED" else int(time_limit_seconds(limit)),
                    seconds_in(fields["GraceTime"]) or 0,
                    hosts(_given(fields["Nodes"]) or ""),
                ),
                fields["Default"] == "YES",
            )
        )
    return found


OUT: Final = frozenset(("DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "NOT_RESPONDING"))
"""Of the words in a node's state, those of one that takes no job."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node: `memory` in MiB, `state` and `gres` as SLURM writes them (`IDLE+DRAIN`, `gpu:a100:8`), `reason`
    why it is out."""

    name: str
    state: str
    cpus: int
    memory: int
    gres: str
    reason: str | None

    @property
    def is_out(self) -> bool:
        """Whether no job can start on it for now, and not only because others have it, or it is powered down
        until one comes."""
        words = self.state.replace("*", "+NOT_RESPONDING").split("+")
        return not OUT.isdisjoint(words)


def nodes(names: str = "") -> Iterator[Node]:
    """The nodes of that list, or all."""
    for line in said("scontrol", "--oneliner", "show", "node", *([names] if names else [])).splitlines():
        fields = fields_of(line)
        yield Node(
            fields["NodeName"],
            fields["State"],
            int(fields["CPUTot"]),
            int(fields["RealMemory"]),
            fields.get("Gres", ""),
            _given(fields.get("Reason")),
        )


def gpus_in(gres: str, kind: str | None = None) -> int:
    """How many GPUs, of this `kind` or any, generic resources such as `gpu:a100:8(S:0-1),nvme:1` hold."""
    without_sockets = re.sub(r"\([^)]*\)", "", gres)
    counts = (part.split(":") for part in without_sockets.split(",") if part.split(":")[0] == "gpu")
    wanted = (words for words in counts if kind is None or kind in words[1:])
    return sum(int(words[-1]) if words[-1].isdecimal() else 1 for words in wanted)


def own_job() -> str | None:
    """The job that this process is in, an element of an array by its own name; None outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        # The last element of an array has the array's own id, which would name all of them.
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def submission_environment(asked: SlurmSection) -> dict[str, str]:
    """The environment to submit a job in: nothing of the job that this process may be in, and no option that
    is the cluster file's to give. An account, a partition or a QOS of the environment stands where `asked`
    has none."""
    person = {variable(key) for key in ("account", "partition", "qos") if getattr(asked, key) is None}
    dropped = OVERRULING - person
    return {
        name: value
        for name, value in os.environ.items()
        if name in OF_THE_CLUSTER or not (name.startswith(("SLURM_", "SRUN_")) or name in dropped)
    }


def submit(script: Path, asked: SlurmSection, *options: str) -> str:
    """Hand in a job script that asks for `asked`; returns the job's id. Raises what `said` does."""
    env = submission_environment(asked)
    return said("sbatch", "--parsable", *options, str(script), env=env).split(";")[0]
