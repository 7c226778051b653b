"""What a checkpoint of GPT-2 124M costs: writing, hashing, and how long training stands still.

./scripts/bench_checkpoint [--folder DIR] [--layers N]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.durable import sync
from launcher.run import checkpoints as ledger
from launcher.worker.checkpoint import CheckpointWriter, Saved, host_copy
from launcher.worker.heart import Heart

ROUNDS = 3
STEP_SIZE = 768


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write, for a moment")
    parser.add_argument("--layers", type=int, default=12, help="of the model; 12 are GPT-2's own")
    asked = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=asked.layers))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix=".bench-") as folder:
        measure(Path(folder), model, state)


def measure(folder: Path, model: Any, state: dict[str, Any]) -> None:
    def write(target: Path, state: dict[str, Any]) -> None:
        model.save_pretrained(target, state_dict=dict(state["weights"]))  # which it empties
        torch.save(state["optimizer"], target / "optimizer.pt")

    def sync_all(target: Path) -> None:
        for name in ledger.names_in(target):
            sync(target / name)

    def hash_alone(target: Path) -> None:
        for name in ledger.names_in(target):
            with (target / name).open("rb") as stream:
                hashlib.file_digest(stream, "sha256")

    rows: dict[str, list[float]] = {name: [] for name in ("written", "synced", "hashed", "sealed", "copied")}
    for number in range(ROUNDS):
        target = folder / f"plain-{number}"
        target.mkdir()
        rows["written"].append(timed(lambda: write(target, state)))  # noqa: B023
        rows["synced"].append(timed(lambda: sync_all(target)))  # noqa: B023
        rows["hashed"].append(timed(lambda: hash_alone(target)))  # noqa: B023
        shutil.rmtree(target)
        target.mkdir()
        write(target, state)
        rows["sealed"].append(timed(lambda: ledger.seal(target, ledger.names_in(target))))  # noqa: B023
        shutil.rmtree(target)
        rows["copied"].append(timed(lambda: host_copy(state)))
    found = {name: statistics.median(each) for name, each in rows.items()}
    saved, slower = in_the_background(folder, write, state)
    plain = found["written"] + found["synced"]
    whole = found["written"] + found["sealed"]
    print(f"{saved.bytes / 2**30:.2f} GiB; seconds, the median of {ROUNDS}")
    for name, seconds in found.items():
        print(f"  {name:<10}{seconds:8.2f}")
    print(f"hashing adds {whole / plain - 1:.1%} to writing and syncing")
    print(
        f"a save in the background: {saved.seconds:.2f} s, of which training stands still "
        f"{saved.stall_seconds:.2f} s; in the foreground it stands still {whole:.2f} s"
    )
    print(f"while it is written a step takes {slower:.2f} times as long")


def in_the_background(
    folder: Path, write: Callable[[Path, dict[str, Any]], None], state: dict[str, Any]
) -> tuple[Saved, float]:
    """What it took, and how much slower steps were meanwhile."""
    done = threading.Event()
    told: list[Saved] = []
    heart = Heart(folder / "heartbeat", folder / "stacks", 0, {})
    writer = CheckpointWriter(folder / "checkpoints", heart, rank=0, world_size=1, keep=1)
    writer.told = told.append
    one, other = torch.rand(STEP_SIZE, STEP_SIZE), torch.rand(STEP_SIZE, STEP_SIZE)

    def steps_until(over: Callable[[], bool]) -> float:
        """Seconds a step takes: products of matrices, one after another, as training does."""
        begun, steps = time.perf_counter(), 0
        while not over():
            for _ in range(4):
                one @ other
            steps += 1
        return (time.perf_counter() - begun) / max(steps, 1)

    end = time.perf_counter() + 3
    alone = steps_until(lambda: time.perf_counter() > end)
    with writer.writing(1, 0) as target:
        copy = host_copy(state)

        def copied() -> None:
            write(target, copy)

        writer.commit(target, step=1, samples=1, best=None, state={}, copied=copied)
    assert writer._pending is not None
    writer._pending.add_done_callback(lambda _: done.set())
    beside = steps_until(done.is_set)
    writer.finish()
    return told[0], beside / alone


if __name__ == "__main__":
    main()
