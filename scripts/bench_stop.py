"""What it costs a step that all ranks can stop together, and how soon they have.

    ./scripts/bench_stop [--write] [--stops N]

First, two ranks over gloo take steps of 50 ms, each of which ends in an all-reduce like a gradient's. What
every step of a run does for the agreement, after a third of it and at its end, and for the heartbeat, is
timed. Then a small GPT-2 is trained by `launcher train` on two ranks, asked to stop at random moments by
SIGTERM to one of them or to the supervisor, and started again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from launcher.errors import Interrupted
from launcher.run import journal
from launcher.run.checkpoints import committed
from launcher.run.directory import RunDirectory
from launcher.run.outcome import Outcome
from launcher.run.processes import lives
from launcher.worker.heart import Heart
from launcher.worker.stop import Agreement, StopSignals, Wishes

ROOT = Path(__file__).resolve().parent.parent
RANKS, STEPS, STEP_SECONDS, ALLOWED = 2, 200, 0.050, 0.01
BEFORE = 4
"""Steps that are reported before a stop is asked for: how long one takes is the median of theirs."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the result in docs/benchmarks/stop.md")
    parser.add_argument("--stops", type=int, default=16, help="how often the run is stopped")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join([*agreeing(Path(folder)), "", *stopping(Path(folder), asked.stops), ""])
    print(text)
    if asked.write:
        (ROOT / "docs/benchmarks/stop.md").write_text(text, encoding="utf-8")


def agreeing(folder: Path) -> Iterator[str]:
    spawn(take_steps, args=(str(folder),), nprocs=RANKS)  # type: ignore[no-untyped-call]
    taken = [float(line) for line in (folder / "seconds").read_text().split()]
    yield from (
        "# What stopping together costs",
        "",
        f"`./scripts/bench_stop --write`: agreement and heartbeat in each of {STEPS} steps of 50 ms, {RANKS}"
        f" ranks over gloo on {os.cpu_count()} cores, rank 0. Allowed: {ALLOWED:.0%}.",
        "",
        "| | microseconds | of a 50 ms step |",
        "|---|---|---|",
    )
    for name, seconds in (
        ("median", statistics.median(taken)),
        ("mean", statistics.fmean(taken)),
        ("95th percentile", statistics.quantiles(taken, n=20)[-1]),
    ):
        yield f"| {name} | {1e6 * seconds:.0f} | {seconds / STEP_SECONDS:.2%} |"


@dataclass(frozen=True)
class Stop:
    """One stop, in seconds: a step, the save, and from SIGTERM until the checkpoint, the last rank's exit and
    the supervisor's."""

    whom: str
    step: float
    save: float
    committed: float
    ranks: float
    all: float

    @property
    def line(self) -> str:
        allowed = 2 * self.step + self.save
        return (
            f"| {self.whom} | {self.step:.2f} | {self.save:.2f} | {allowed:.2f} | {self.committed:.2f}"
            f" | {self.ranks:.2f} | {self.all:.2f} |"
        )


def stopping(folder: Path, count: int) -> Iterator[str]:
    yield from (
        "## From SIGTERM to a checkpoint",
        "",
        f"A GPT-2 of 4 layers x 256 under `launcher train` on {RANKS} ranks, in seconds from the signal on.",
        "After the ranks, the supervisor ends accelerate's process and leaves.",
        "",
        "| SIGTERM to | a step | the save | two steps and the save | checkpoint | ranks gone | all gone |",
        "|---|---|---|---|---|---|---|",
    )
    (folder / "run.yaml").write_text(json.dumps(run_of()))
    (folder / "cluster.yaml").write_text(json.dumps({"name": "cpu", "gpu": "cpu", "gpus_per_node": RANKS}))
    draw = random.Random(1)
    stops = [stop(folder, draw, whom) for _, whom in zip(range(count), itertools.cycle(WHOM))]
    yield from (each.line for each in stops)
    late = sum(each.all > 2 * each.step + each.save for each in stops)
    yield from ("", f"All gone later than two steps and the save: {late} of {count}.")


WHOM = ("a rank", "the supervisor")


def stop(folder: Path, draw: random.Random, whom: str) -> Stop:
    """Start the run or go on with it, stop it, and look how long that took."""
    directory = RunDirectory(folder / "runs" / "stop")
    began = len(journal.read(directory.metrics))
    command = [sys.executable, "-m", "launcher", "train", "run.yaml", "--cluster", "cluster.yaml"]
    with (folder / "said").open("ab") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
    while sum("loss" in line for line in journal.read(directory.metrics)[began:]) < BEFORE:
        if process.poll() is not None:
            raise SystemExit((folder / "said").read_text())
        time.sleep(0.02)
    times = [line["time"] for line in journal.read(directory.metrics)[began:] if "loss" in line]
    time.sleep(draw.random() * (times[-1] - times[-2]))
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "launcher.worker" in child.cmdline()[:4]
    ]
    asked = time.time()
    os.kill(draw.choice(ranks).pid if whom == "a rank" else process.pid, signal.SIGTERM)
    while any(map(lives, ranks)):
        time.sleep(0.02)
    ranks_left = time.time() - asked
    code = process.wait()
    all_left = time.time() - asked
    newest = max(committed(directory.checkpoints), key=lambda each: each.step)
    (*_, ended) = journal.events(directory.journal, "ended")
    if (code, ended["outcome"], ended["step"]) != (Interrupted.exit_code, Outcome.STOPPED, newest.step):
        raise SystemExit(f"not a clean end: {code}, {ended}\n{(folder / 'said').read_text()}")
    (saved,) = (
        line
        for line in journal.read(directory.metrics)
        if line["step"] == newest.step and "save_seconds" in line
    )
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Stop(
        whom,
        step=statistics.median(steps),
        save=saved["save_seconds"],
        committed=newest.folder.stat().st_ctime - asked,  # it was renamed then, whole
        ranks=ranks_left,
        all=all_left,
    )


def run_of() -> dict[str, Any]:
    return {
        "name": "stop",
        "model": {
            "name": "gpt2",
            "tokenizer": {"train": {"vocab_size": 4096}},
            "overrides": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256},
        },
        "data": {"train": [f"{sysconfig.get_path('stdlib')}/*.py"], "block_size": 256, "validation": 0},
        "train": {"batch_size": 16, "steps": 10_000, "log_every": 1},
        "checkpoint": {"every": 5_000},
        "report_to": [],
    }


def take_steps(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    agreement, signals, gradient = Agreement(RANKS), StopSignals(), torch.zeros(1 << 16)
    request = Path(folder, "requests", "stop")
    heart = Heart(Path(folder, f"rank-{rank}.heartbeat"), Path(folder, "requests", "stacks"), rank, {})
    heart.start()
    taken = []
    for step in range(STEPS):
        time.sleep(STEP_SECONDS / 3)
        began = time.perf_counter()
        agreement.propose(Wishes(stop=signals.ask_to_stop or (rank == 0 and request.exists())))
        asked = time.perf_counter()
        time.sleep(STEP_SECONDS * 2 / 3)
        dist.all_reduce(gradient)
        reduced = time.perf_counter()
        heart.step(step)
        agreement.settle()
        taken.append(asked - began + time.perf_counter() - reduced)
    heart.stop()
    if rank == 0:
        Path(folder, "seconds").write_text("\n".join(map(str, taken[10:])))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
