"""What it costs a step that all ranks can stop together, and that each shows that it lives.

    ./scripts/bench_stop [--write]

Two ranks over gloo take steps of 50 ms, each of which ends in an all-reduce, as a gradient's does; then comes
what every step of a run does for the agreement and for the heartbeat. Only that is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from launcher.worker.heart import Heart
from launcher.worker.stop import Agreement, StopSignals, Wishes

ROOT = Path(__file__).resolve().parent.parent
RANKS, STEPS, STEP_SECONDS, ALLOWED = 2, 200, 0.050, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the result in docs/benchmarks/stop.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(take_steps, args=(folder,), nprocs=RANKS)  # type: ignore[no-untyped-call]
        taken = [float(line) for line in Path(folder, "seconds").read_text().split()]
    rows = {
        "median": statistics.median(taken),
        "mean": statistics.fmean(taken),
        "95th percentile": statistics.quantiles(taken, n=20)[-1],
    }
    lines = [
        f"| {name} | {1e6 * seconds:.0f} | {seconds / STEP_SECONDS:.2%} |" for name, seconds in rows.items()
    ]
    text = "\n".join(["| | microseconds | of a 50 ms step |", "|---|---|---|", *lines, ""])
    print(text)
    if asked.write:
        head = (
            "# What stopping together costs\n\n`./scripts/bench_stop --write`: agreement and heartbeat in "
            f"each of {STEPS} steps of 50 ms, {RANKS} ranks over gloo on {os.cpu_count()} cores, rank 0. "
            f"Allowed: {ALLOWED:.0%}.\n\n"
        )
        (ROOT / "docs/benchmarks/stop.md").write_text(head + text, encoding="utf-8")


def take_steps(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    agreement, signals, gradient = Agreement(RANKS), StopSignals(), torch.zeros(1 << 16)
    request = Path(folder, "requests", "stop")
    heart = Heart(Path(folder, f"rank-{rank}.heartbeat"), Path(folder, "requests", "stacks"), rank, {})
    heart.start()
    taken = []
    for step in range(STEPS):
        time.sleep(STEP_SECONDS)
        dist.all_reduce(gradient)
        began = time.perf_counter()
        heart.step(step)
        agreement.settle()
        agreement.propose(Wishes(stop=signals.ask_to_stop or (rank == 0 and request.exists())))
        taken.append(time.perf_counter() - began)
    agreement.settle()
    heart.stop()
    if rank == 0:
        Path(folder, "seconds").write_text("\n".join(map(str, taken[10:])))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
