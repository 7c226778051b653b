"""The `srun` that starts one `accelerate launch` on every node of a job."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from launcher.config.schema import Container
from launcher.render.command import launch_command

FIRST_PORT, PORTS = 20_000, 10_000
"""Ports for the ranks to meet at: below those that Linux hands out by itself (32768 to 60999)."""
STRIDE: Final = 4001
"""From a job's port to that of its next attempt."""

SHUTDOWN_SECONDS: Final = 86_400
"""How long torch's launcher lets a rank save after SIGTERM: SLURM's own SIGKILL comes first, or that of the
supervisor. Its default is 30 seconds."""


@dataclass(frozen=True, slots=True)
class Step:
    """One attempt of a run on the nodes of a job. `hosts` are their names, the first where the ranks meet.

    `logs` is the attempt's folder; `shown` are folders that a container must show; `accelerate` and `python`
    are the executables on the nodes, or in the container.
    """

    directory: str
    attempt: int
    job_id: int
    hosts: tuple[str, ...]
    logs: str
    accelerate: str
    python: str
    container: Container | None = None
    shown: tuple[str, ...] = ()


def meeting_port(job_id: int, attempt: int) -> int:
    """The port of an attempt: another program may have that of the one before. Jobs on one node whose ids are
    near each other have different ones."""
    return FIRST_PORT + (job_id + STRIDE * attempt) % PORTS


def step_name(attempt: int) -> str:
    """What the step of an attempt is called in `squeue --steps`."""
    return f"attempt-{attempt:03d}"


def step_environment(attempt: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What the ranks find in their environment besides what the job has."""
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        **environment,
        "LAUNCHER_ATTEMPT": str(attempt),
    }


def srun_command(step: Step) -> list[str]:
    """The argument vector that starts every rank of every node.

    What differs between nodes ($SLURM_NODEID) is expanded by a shell on each of them, never before.
    """
    return [
        *_srun(step, step_name(step.attempt)),
        f"--error={_literal(step.logs)}/node-%N.log",
        "sh",
        "-c",
        " ".join(["exec", *_quoted(_apptainer(step)), *_launcher(step)]),
    ]


def check_command(step: Step, word: str, backend: str) -> list[str]:
    """The argument vector that has every node answer for itself (`worker.node`), before there are ranks.

    A node that fails does not end the others: what they say tells which it is.
    """
    meeting = [",".join(step.hosts), str(meeting_port(step.job_id, step.attempt))]
    answer = [step.python, "-m", "launcher.worker.node", step.directory, word, *meeting, backend]
    return [*_srun(step, "nodes", kill_on_bad_exit=0), *_apptainer(step), *answer]


def _srun(step: Step, name: str, *, kill_on_bad_exit: int = 1) -> list[str]:
    nodes = len(step.hosts)
    return [
        "srun",
        f"--job-name={name}",
        f"--nodes={nodes}",
        f"--nodelist={','.join(step.hosts)}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        f"--kill-on-bad-exit={kill_on_bad_exit}",
        "--cpu-bind=none",
        "--export=ALL",  # also where SBATCH_EXPORT=NONE: the ranks need LAUNCHER_ATTEMPT
        *_pyxis(step),
    ]


def _launcher(step: Step) -> list[str]:
    """The words that start the ranks of a node, quoted for its shell."""
    command = _quoted(launch_command(step.directory, accelerate=step.accelerate))
    if len(step.hosts) > 1:
        meeting = ["--main_process_ip", shlex.quote(step.hosts[0])]
        meeting += ["--main_process_port", str(meeting_port(step.job_id, step.attempt))]
        command[2:2] = ["--rdzv_backend", "c10d", "--machine_rank", '"$SLURM_NODEID"', *meeting]
    return command


def _quoted(words: Sequence[str]) -> list[str]:
    return [shlex.quote(word) for word in words]


def _pyxis(step: Step) -> list[str]:
    if step.container is None or step.container.runtime != "pyxis":
        return []
    mounts = ",".join(_inside(mount) for mount in _mounts(step, step.container))
    return [f"--container-image={step.container.image}", f"--container-mounts={mounts}"]


def _apptainer(step: Step) -> list[str]:
    if step.container is None or step.container.runtime != "apptainer":
        return []
    binds = [word for mount in _mounts(step, step.container) for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *binds, step.container.image]


def _mounts(step: Step, container: Container) -> Sequence[str]:
    return list(dict.fromkeys((*step.shown, *container.mounts)))


def _inside(mount: str) -> str:
    """Pyxis wants both names where apptainer takes one for both."""
    return mount if ":" in mount else f"{mount}:{mount}"


def _literal(path: str) -> str:
    """srun fills in what follows a percent sign in a file name."""
    return path.replace("%", "%%")
