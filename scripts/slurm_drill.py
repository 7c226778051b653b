"""A run driven through everything SLURM does to one, on a real cluster of three nodes on this machine.

    ./scripts/slurm_drill [EVENT...]
    ./scripts/slurm_drill --write

Each event has a run of its own over two nodes, on real text (the standard library's own source), and is
followed to the end of the run. The card says how each attempt ended, how many steps were trained twice, how
long it took from the wish to stop until the ranks were gone, and whether the final weights are those of a run
that nothing happened to. `--write` keeps the card in docs/benchmarks/slurm.md, in place of the last one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.slurm_cluster import Cluster, cluster, why_not

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "slurm.md"
STEPS = 40
SAVE_EVERY = 10
STEP_SECONDS = 0.25
"""A step lasts at least so long, so that an event comes in the midst of training on any machine."""
AT_STEP = 15
"""When the event comes."""
PATIENCE = 420.0
"""Seconds for a run to end, with all its attempts, on a busy machine."""

SLOW = """\
import os, time
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
"""


def run_file(text: list[str]) -> dict[str, Any]:
    """A small model on `text`, without dropout: the same weights from any sequence of attempts."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64}
    return {
        "name": "drill",
        "model": {
            "name": "gpt2",
            "tokenizer": {"train": {"vocab_size": 500}},
            "overrides": {**shape, **still},
        },
        "data": {"train": text, "validation": 0.01, "block_size": 64},
        "train": {
            "batch_size": 8,
            "steps": STEPS,
            "learning_rate": 1e-3,
            "log_every": 5,
            "eval_every": 1000,
            "callbacks": ["slow:Slow"],
        },
        "checkpoint": {"every": SAVE_EVERY},
        "report_to": [],
    }


def cluster_file(
    partition: str,
    time_limit: str | None = None,
    step_seconds: float = STEP_SECONDS,
    setup: Sequence[str] = (),
) -> dict[str, Any]:
    """Two nodes, a rank on the CPU of each."""
    asked = {"partition": partition, "cpus_per_node": 1, "time_limit": time_limit, "setup": list(setup)}
    return {
        "name": "drill",
        "launch": "slurm",
        "nodes": 2,
        "gpus_per_node": 1,
        "gpu": "cpu",
        "slurm": asked,
        "env": {"STEP_SECONDS": str(step_seconds)},
    }


@dataclass
class Drilled:
    """One run of the drill, by its folder and its job."""

    slurm: Cluster
    directory: Path
    job: str
    patience: float = PATIENCE

    def events(self) -> list[dict[str, Any]]:
        """The lines of its journal."""
        journal = self.directory / "journal.jsonl"
        return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []

    def ends(self) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["event"] == "attempt_ended"]

    def step(self) -> int:
        """The furthest step that any attempt tells of."""
        steps = [0]
        for file in self.directory.glob("logs/*/*.heartbeat"):
            try:
                steps.append(json.loads(file.read_text())["step"])
            except (ValueError, OSError):
                continue
        return max(steps)

    def wait_for_step(self, step: int) -> None:
        self.slurm.wait(lambda: self.goes_on() and self.step() >= step, f"step {step}", self.patience)

    def goes_on(self) -> bool:
        """Nothing waits out what SLURM holds a requeued job back for."""
        job = self.slurm.job(self.job)
        if job.get("JobState") == "PENDING" and job.get("Reason") == "BeginTime":
            self.slurm.start_soon(self.job)
        return True

    def wait_for_end(self) -> None:
        """Until the job is over and no attempt is to follow."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.slurm.wait(
            lambda: self.goes_on() and self.slurm.job(self.job)["JobState"] in over, "the end", self.patience
        )

    def weights(self) -> str | None:
        """A hash of the final weights; None where there are none."""
        file = self.directory / "model" / "model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["event"] == "attempt_started"]

    def one_at_a_time(self) -> bool:
        """Whether no rank gave a sign of life once a later attempt had begun."""
        begun = {event["attempt"]: event["time"] for event in self.starts()}
        signs = [
            (int(file.parent.name.removeprefix("attempt-")), json.loads(file.read_text())["alive"])
            for file in self.directory.glob("logs/*/*.heartbeat")
        ]
        return all(alive <= begun.get(attempt + 1, alive) for attempt, alive in signs)

    def steps_lost(self) -> int:
        """Steps that were trained, and had to be trained again."""
        pairs = zip(self.ends(), self.starts()[1:], strict=False)
        return sum(max(0, ended["step"] - begun["from_step"]) for ended, begun in pairs)


class Place:
    """A folder with the drill's files in it, to submit runs from."""

    def __init__(self, slurm: Cluster, folder: Path, text: list[str]) -> None:
        self.slurm, self.folder = slurm, folder
        (folder / "slow.py").write_text(SLOW)
        self.write("run.yaml", run_file(text))

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(value))

    def launcher(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One command of launcher's, on the login node."""
        process = self.start(*arguments)
        said, complained = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, said, complained)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The same, without waiting for it."""
        paths = [str(ROOT), str(self.folder), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **self.slurm.environment, "PYTHONPATH": ":".join(filter(None, paths))}
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submit(
        self,
        name: str,
        partition: str = "batch",
        time_limit: str | None = None,
        step_seconds: float = STEP_SECONDS,
        setup: Sequence[str] = (),
    ) -> Drilled:
        """Submit a run of that name. Raises RuntimeError with what launcher said where it failed."""
        self.write(f"{name}.cluster.yaml", cluster_file(partition, time_limit, step_seconds, setup))
        arguments = ["submit", "run.yaml", f"name={name}", "--cluster", f"{name}.cluster.yaml", "--json"]
        done = self.launcher(*arguments)
        if done.returncode:
            raise RuntimeError(done.stderr)
        (told,) = json.loads(done.stdout)
        return Drilled(self.slurm, Path(told["directory"]), told["job"])


def take_the_nodes(slurm: Cluster) -> None:
    """A job that is more urgent wants all nodes."""
    asked = ("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    slurm.run("sbatch", *asked)


def preempted(run: Drilled) -> None:
    take_the_nodes(run.slurm)


def requeued(run: Drilled) -> None:
    run.slurm.run("scontrol", "requeue", run.job)


def cancelled(run: Drilled) -> None:
    run.slurm.run("scancel", run.job)


def cut_off_second(run: Drilled) -> None:
    """Cut off the node that the supervisor is not on."""
    (second,) = [each for each in nodes_of(run) if each != run.slurm.job(run.job)["BatchHost"]]
    cut_off_until_next_attempt(run, second)


def cut_off_first(run: Drilled) -> None:
    """Cut off the node that the supervisor is on: SLURM starts the run elsewhere while it still lives."""
    cut_off_until_next_attempt(run, run.slurm.job(run.job)["BatchHost"])


def cut_off_until_next_attempt(run: Drilled, node: str) -> None:
    attempts = len(run.starts())
    run.slurm.cut_off(node)
    try:
        run.slurm.wait(
            lambda: run.goes_on() and len(run.starts()) > attempts, "another attempt", run.patience
        )
    finally:
        run.slurm.reconnect(node)


def drained(run: Drilled) -> None:
    first = nodes_of(run)[0]
    run.slurm.run("scontrol", "update", f"NodeName={first}", "State=DRAIN", "Reason=drill")


def restarted(run: Drilled) -> None:
    run.slurm.restart_controller()


def supervisor_killed(run: Drilled) -> None:
    host = run.slurm.job(run.job)["BatchHost"]
    run.slurm.on(host, "pkill", "--signal", "KILL", "--full", f"launcher supervise {run.directory}")


def nothing(run: Drilled) -> None:
    pass


def another_version(slurm: Cluster) -> None:
    """n1, where a job would start, has another fsspec, by what is written in its metadata."""
    (metadata,) = Path(sysconfig.get_paths()["purelib"]).glob("fsspec-*.dist-info/METADATA")
    other = slurm.folder / "METADATA"
    other.write_text(re.sub(r"(?m)^Version: .*$", "Version: 2000.1", metadata.read_text(encoding="utf-8")))
    done = slurm.on("n1", "mount", "--bind", str(other), str(metadata))
    assert done.returncode == 0, done.stderr


def nodes_of(run: Drilled) -> list[str]:
    """The nodes of its newest attempt."""
    told = [event for event in run.events() if event["event"] == "job"]
    return list(told[-1]["nodes"])


@dataclass(frozen=True)
class Event:
    """What is done to a run at step AT_STEP. `before`: what is done to the cluster before it is submitted;
    `setup`: lines that its job begins with; `again`: it is submitted once more after it has ended."""

    name: str
    do: Callable[[Drilled], None]
    before: Callable[[Cluster], None] | None = None
    partition: str = "batch"
    time_limit: str | None = None
    step_seconds: float = STEP_SECONDS
    setup: tuple[str, ...] = ()
    patience: float = PATIENCE
    again: bool = False


LATE_ONCE = '[ "$SLURM_RESTART_COUNT" ] || sleep 46'
"""The job's first start comes to its nodes when few of 60 seconds are left for what takes longer."""

EVENTS = (
    Event("undisturbed", nothing),
    Event("preempted, with 60 s of grace", preempted, partition="grace"),
    Event("preempted, without grace", preempted),
    Event("requeued by an administrator", requeued),
    Event("time limit of 1 minute", nothing, time_limit="1", step_seconds=1.6, patience=720.0),
    Event("time limit while the nodes are tried", nothing, time_limit="1", setup=(LATE_ONCE,)),
    Event("a node cut off from the network", cut_off_second),
    Event("the supervisor's node cut off", cut_off_first),
    Event("a node drained", drained),
    Event("slurmctld restarted", restarted),
    Event("supervisor killed, submitted again", supervisor_killed, again=True),
    Event("scancel, submitted again", cancelled, again=True),
    # The last: n1 stays as it is.
    Event("a node with another version of a package", nothing, before=another_version),
)


@dataclass(frozen=True)
class Line:
    """One line of the card."""

    event: str
    outcomes: list[str]
    job: str
    lost: int
    stop_seconds: list[float]
    apart: bool
    same: bool | None


def drill(place: Place, event: Event, number: int, weights: str | None) -> tuple[Line, str | None]:
    """Drive one run through `event`; `weights`: those of the undisturbed run."""
    if event.before is not None:
        event.before(place.slurm)
    asked = (f"drill-{number}", event.partition, event.time_limit, event.step_seconds, event.setup)
    run = replace(place.submit(*asked), patience=event.patience)
    if event.do is not nothing:
        run.wait_for_step(AT_STEP)
        event.do(run)
    run.wait_for_end()
    state = place.slurm.job(run.job)["JobState"]
    if event.again:
        run = place.submit(*asked)
        run.wait_for_end()
        state += f", {place.slurm.job(run.job)['JobState']}"
    found = run.weights()
    place.slurm.clear()
    ends = run.ends()
    line = Line(
        event.name,
        [end["outcome"] for end in ends],
        state,
        run.steps_lost(),
        [end["stop_seconds"] for end in ends if end["stop_seconds"] is not None],
        run.one_at_a_time(),
        None if found is None else weights is None or found == weights,
    )
    return line, found


def card(lines: list[Line]) -> str:
    """The lines as a table in Markdown."""
    head = ("event", "attempts", "the job", "steps lost", "from the wish to the end, s")
    rows = [f"| {' | '.join(head)} | one at a time | same weights |"]
    rows.append("|---|---|---|---|---|---|---|")
    for line in lines:
        stops = ", ".join(f"{seconds:.1f}" for seconds in line.stop_seconds) or "-"
        same = {True: "yes", False: "NO", None: "no model"}[line.same]
        apart = "yes" if line.apart else "NO"
        attempts = ", ".join(line.outcomes)
        rows.append(f"| {line.event} | {attempts} | {line.job} | {line.lost} | {stops} | {apart} | {same} |")
    return "\n".join(rows)


def with_card(page: str, table: str) -> str:
    """`page` with `table` in place of its first one."""
    lines = page.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    after = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return "\n".join([*lines[:first], table, *lines[after:]]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/slurm_drill", description="Drive a run through SLURM.")
    parser.add_argument("event", nargs="*", help="words of the events to drive it through; all without any")
    parser.add_argument("--write", action="store_true", help=f"keep the card in {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    wanted: list[str] = arguments.event
    if wanted and arguments.write:
        parser.error("--write keeps the card of all events")
    if (why := why_not()) is not None:
        print(why, file=sys.stderr)
        return 3
    text = [f"{sysconfig.get_paths()['stdlib']}/{name}.py" for name in ("argparse", "typing", "inspect")]
    lines: list[Line] = []
    weights: str | None = None
    with tempfile.TemporaryDirectory(prefix="drill-") as folder, cluster() as slurm:
        place = Place(slurm, Path(folder), text)
        for number, event in enumerate(EVENTS):
            if number and wanted and not any(word in event.name for word in wanted):
                continue
            begun = time.monotonic()
            try:
                line, found = drill(place, event, number, weights)
            except (TimeoutError, RuntimeError) as error:
                print(f"{event.name}: {error}", file=sys.stderr, flush=True)
                line, found = Line(event.name, ["not seen to its end"], "?", 0, [], True, None), None
                slurm.clear()
            weights = weights or found
            lines.append(line)
            print(f"{time.monotonic() - begun:.0f} s: {line}", file=sys.stderr, flush=True)
    print(card(lines))
    if arguments.write:
        PAGE.write_text(with_card(PAGE.read_text(encoding="utf-8"), card(lines)), encoding="utf-8")
    return 0 if all(line.same and line.apart for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
