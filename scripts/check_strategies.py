"""Every strategy as it really runs here: two ranks on the CPU, against DDP.

./scripts/check_strategies [--write]

Each cell is a run of 20 steps that is stopped half-way and goes on, on two ranks or on one. Its losses are
held against those of DDP, and the model it leaves against the live model's own logits after the last step.
With --write the table of docs/concepts/strategies.md is written anew. Exit code 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from launcher.config.rules import OFFLOADS

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
PRECISIONS = ("fp32", "bf16")
HEADS = (*PRECISIONS, "fp16")
"""The columns of the table: what a CPU can run, and what only a GPU can."""

STEPS, STOP_AFTER = 20, 7
CLOSE = 1e-3
"""How far a loss may be from DDP's, in nats."""

SAME_LOGITS = {"fp32": 1e-4, "bf16": 2**-6}
"""How far the exported model's logits may be from the live model's: in bf16, whose numbers near 1 are 2^-7
apart, a rank's one-kernel GELU and the stock model's round differently."""

PAGE = Path(__file__).resolve().parent.parent / "docs" / "concepts" / "strategies.md"
BEGIN, END = "<!-- table: scripts/check_strategies -->", "<!-- end -->"

OWN = f"""
import os, signal
import torch
from transformers import TrainerCallback

class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == {STOP_AFTER} and os.environ.get("STOP") and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_end(self, args, state, control, model, **_):
        with torch.no_grad():
            model.eval()
            logits = model(input_ids=torch.arange(1, 65).reshape(1, 64)).logits
        if state.is_world_process_zero:
            torch.save(logits.float(), os.path.join(args.output_dir, "logits.pt"))
"""

RUN = {
    "name": "cell",
    "model": {
        "name": "gpt2",
        "tokenizer": {"train": {"vocab_size": 300}},
        "overrides": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64},
    },
    "data": {"train": ["corpus.txt"], "validation": 0.05, "block_size": 64},
    "train": {
        "batch_size": 8,
        "micro_batch": 2,
        "steps": STEPS,
        "learning_rate": 1e-3,
        "log_every": 1,
        "eval_every": 10,
        "callbacks": ["own:Watch"],
    },
    "checkpoint": {"every": 10},
    "report_to": [],
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Ranks draw unlike masks, so with dropout another world is another run."""


@dataclass(frozen=True)
class Cell:
    """One way to run."""

    strategy: str
    precision: str
    offload: str = "none"

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.precision}" + ("" if self.offload == "none" else f"-{self.offload}")

    def overrides(self) -> list[str]:
        return [
            f"name={self.name}",
            f"train.strategy={self.strategy}",
            f"train.precision={self.precision}",
            f"train.offload={self.offload}",
        ]


@dataclass(frozen=True)
class Tried:
    """What came of a cell.

    `losses` are by step; `logits_apart` is the largest difference between the live model's logits and those
    of the exported one, both computed in the run's precision.
    """

    losses: Mapping[int, float]
    eval_loss: float
    logits_apart: float
    verified: str


class Bench:
    """A folder with the text and the files of every cell."""

    def __init__(self, folder: Path, text: Sequence[str]) -> None:
        self.folder = folder
        overrides = {**RUN["model"]["overrides"], **NO_DROPOUT}  # type: ignore[index]
        run = {**RUN, "model": {**RUN["model"], "overrides": overrides}}  # type: ignore[dict-item]
        (folder / "corpus.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
        (folder / "own.py").write_text(OWN, encoding="utf-8")
        (folder / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
        for name, ranks in (("one", 1), ("two", 2)):
            cluster = {"name": name, "gpu": "cpu", "gpus_per_node": ranks}
            (folder / f"{name}.yaml").write_text(json.dumps(cluster), encoding="utf-8")

    def train(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", "train", "run.yaml", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )

    def whole(self, cell: Cell, *more: str) -> Tried:
        """Train without a stop. Raises RuntimeError with what launcher said."""
        return self._to_the_end(cell, "two.yaml", *more)

    def in_parts(self, cell: Cell, then: str) -> Tried:
        """Train on two ranks, stop after some steps, and go on with the cluster of `then`.

        Raises RuntimeError with what launcher said where it ends otherwise.
        """
        stopped = self.train(*cell.overrides(), "--cluster", "two.yaml", STOP="1")
        if stopped.returncode != 130 or "stopped safely" not in stopped.stderr:
            raise RuntimeError(f"{cell.name}: not stopped: {stopped.stderr[-2000:]}")
        return self._to_the_end(cell, then)

    def _to_the_end(self, cell: Cell, cluster: str, *more: str) -> Tried:
        done = self.train(*cell.overrides(), *more, "--cluster", cluster)
        if done.returncode:
            raise RuntimeError(f"{cell.name}: {done.stderr[-2000:]}")
        directory = self.folder / "runs" / cell.name
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        logs = "".join(log.read_text() for log in sorted(directory.glob("logs/*/rank-0.log")))
        return Tried(
            {line["step"]: line["loss"] for line in lines if "loss" in line},
            next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line),
            _logits_apart(directory, cell),
            next(line for line in logs.splitlines() if "verified: " in line),
        )


def _logits_apart(directory: Path, cell: Cell) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    live = torch.load(directory / "logits.pt")
    half = cell.precision == "bf16"
    if half and cell.strategy.startswith("zero"):
        model.to(torch.bfloat16)  # DeepSpeed computes in it throughout; the others cast on the way
    casts = half and model.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
        logits = model(input_ids=torch.arange(1, 65).reshape(1, 64)).logits
    return float((logits.float() - live).abs().max())


def cells() -> list[Cell]:
    """Every cell that can be run on a CPU."""
    return [
        Cell(strategy, precision, offload)
        for strategy in STRATEGIES
        for precision in PRECISIONS
        for offload in OFFLOADS[strategy]
        if (strategy, offload) != ("fsdp", "parameters")  # PyTorch's needs an accelerator to offload from
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the table to docs/concepts/strategies.md")
    write = parser.parse_args().write
    from tests.conftest import sentences

    results: dict[Cell, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sentences(2000))
        reference = {precision: bench.whole(Cell("ddp", precision)) for precision in PRECISIONS}
        for number, cell in enumerate(cells()):
            if cell.strategy == "ddp":
                results[cell] = ""
                continue
            results[cell] = _try(bench, cell, reference[cell.precision], ("one.yaml", "two.yaml")[number % 2])
    if write:
        write_table({cell: not wrong for cell, wrong in results.items()})
    sys.exit(any(results.values()))


def _try(bench: Bench, cell: Cell, ddp: Tried, then: str) -> str:
    """What is wrong with a cell; empty where nothing is. Prints a line."""
    try:
        tried = bench.in_parts(cell, then)
    except RuntimeError as error:
        print(f"FAIL {error}", flush=True)
        return str(error)
    apart = max(abs(tried.losses[step] - ddp.losses[step]) for step in range(1, STEPS + 1))
    same = tried.logits_apart < SAME_LOGITS[cell.precision]
    wrong = "" if apart < CLOSE and same else "too far apart"
    print(
        f"{'FAIL' if wrong else 'ok':<5}{cell.name:<24}loss {apart:.1e} from DDP's, "
        f"logits {tried.logits_apart:.1e} from the live model's, went on with {then}",
        flush=True,
    )
    return wrong


def write_table(tried: Mapping[Cell, bool], page: Path = PAGE) -> None:
    """Put into the table what was `tried` on this CPU, and whether it was good. What ran on a GPU stays, and
    so does what was not tried this time."""
    day = datetime.now(UTC).date().isoformat()
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    stood = {
        Cell(strategy, precision, offload): said
        for strategy, offload, *cells in rows
        for precision, said in zip(HEADS, cells, strict=True)
    }

    def said(cell: Cell) -> str:
        old = stood.get(cell, "rendered only")
        if cell not in tried:
            return old
        new = f"tested on CPU, {day}" if tried[cell] else "fails on CPU"
        on_gpu = re.search("ran on one GPU, .*", old)
        return f"{new}; {on_gpu[0]}" if on_gpu else new

    lines = [f"| strategy | offload | {' | '.join(HEADS)} |", "|---|---|---|---|---|"]
    for strategy in STRATEGIES:
        for offload in OFFLOADS[strategy]:
            cells = " | ".join(said(Cell(strategy, precision, offload)) for precision in HEADS)
            lines.append(f"| {strategy} | {offload} | {cells} |")
    page.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
