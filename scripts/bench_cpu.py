"""The launcher against a bare PyTorch loop and the stock Trainer, same shape, world and precision, on a CPU.

    ./scripts/bench_cpu [--rounds 15] [--write]

All train the same GPT-2 shape on the Python standard library's source with two ranks over gloo. All are
started once, and then take turns: the ranks of the others are stopped (SIGSTOP) while those of one take a few
steps. So the parts of a round are seconds apart, and a machine that other work makes slower or faster favours
none.
`--write` keeps the result in docs/benchmarks/cpu.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from launcher.run import processes

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
SHAPE = {"layers": 4, "heads": 4, "width": 256, "block_size": 256, "micro_batch": 8, "accumulation": 1}
TOKENS = RANKS * SHAPE["micro_batch"] * SHAPE["accumulation"] * SHAPE["block_size"]
VOCABULARY = 4096
WARM = 5
TURN = 6
ENDLESS = 100_000
PATIENCE = 600


class Side:
    """One of the three: its processes, and a file that gets a line with the time as each step ends."""

    def __init__(self, command: list[str], work: Path, file: Path, read: Callable[[str], float]) -> None:
        self._process = subprocess.Popen(
            command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._file = file
        self._read = read

    def take(self, steps: int) -> float:
        """Go on until so many steps have ended, and stop again: tokens per second from the first end on.

        What was left of the step that the last turn cut through is not counted, nor a step whose line comes
        now and which ended before: launcher reports a step late.
        """
        done = self._lines()
        resumed = time.time()
        self._send(signal.SIGCONT)
        until = time.monotonic() + PATIENCE
        while len(self._lines()) < len(done) + steps:
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"no more steps in {self._file}")
            time.sleep(0.1)
        self._send(signal.SIGSTOP)
        ends = [end for line in self._lines()[len(done) :] if (end := self._read(line)) > resumed]
        return (len(ends) - 1) * TOKENS / (ends[-1] - ends[0])

    def end(self) -> None:
        processes.end(self._process)

    def _lines(self) -> list[str]:
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _family(self) -> list[psutil.Process]:
        alive = self._process.poll() is None
        return psutil.Process(self._process.pid).children(recursive=True) if alive else []

    def _send(self, number: int) -> None:
        """To the ranks only: torch's launcher, stopped for long, would take itself for lost and end them."""
        for member in self._family():
            if "LOCAL_RANK" in member.environ():
                member.send_signal(number)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="keep the result in docs/benchmarks/cpu.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        configure(work)
        sides = [start_launcher(work)]
        try:
            sides[0].take(WARM)
            threads = int(json.loads((work / "runs/bench/plan.json").read_text())["plan"]["threads_per_rank"])
            for script in ("bare_loop", "stock_trainer"):
                sides.append(start_script(work, threads, script))
                sides[-1].take(WARM)
            rows = [measure(number, sides) for number in range(asked.rounds)]
        finally:
            for side in sides:
                side.end()
    ratios = [statistics.median(row[0] / row[other] for row in rows) for other in (1, 2)]
    print(f"median ratio {ratios[0]:.3f} to the bare loop, {ratios[1]:.3f} to the stock Trainer")
    if asked.write:
        (ROOT / "docs/benchmarks/cpu.md").write_text(page(rows, ratios, threads), encoding="utf-8")


def measure(number: int, sides: list[Side]) -> list[float]:
    """Tokens per second of each in its place, one after the other; who goes first alternates."""
    turn = number % len(sides)
    rates = {side: side.take(TURN) for side in [*sides[turn:], *sides[:turn]]}
    row = [rates[side] for side in sides]
    launcher, bare, stock = row
    print(
        f"round {number + 1}: launcher {launcher:,.0f} tokens/s, bare {bare:,.0f}, stock {stock:,.0f},"
        f" ratios {launcher / bare:.3f} and {launcher / stock:.3f}",
        flush=True,
    )
    return row


def configure(work: Path) -> None:
    library = sysconfig.get_path("stdlib")
    (work / "run.yaml").write_text(
        json.dumps(
            {
                "name": "bench",
                "model": {
                    "name": "gpt2",
                    "tokenizer": {"train": {"vocab_size": VOCABULARY}},
                    "overrides": {
                        "n_layer": SHAPE["layers"],
                        "n_head": SHAPE["heads"],
                        "n_embd": SHAPE["width"],
                        "n_positions": SHAPE["block_size"],
                        "resid_pdrop": 0.0,
                        "embd_pdrop": 0.0,
                        "attn_pdrop": 0.0,
                    },
                },
                "data": {
                    "train": [f"{library}/*.py"],
                    "sample_by": "document",
                    "validation": 0,
                    "block_size": SHAPE["block_size"],
                },
                "train": {
                    "batch_size": RANKS * SHAPE["micro_batch"] * SHAPE["accumulation"],
                    "micro_batch": SHAPE["micro_batch"],
                    "steps": ENDLESS,
                    "log_every": 1,
                    "precision": "fp32",
                },
                "checkpoint": {"every": ENDLESS},
                "report_to": [],
            }
        )
    )
    (work / "cluster.yaml").write_text(json.dumps({"gpu": "cpu", "gpus_per_node": RANKS}))


def start_launcher(work: Path) -> Side:
    command = [sys.executable, "-m", "launcher", "train", "run.yaml", "--cluster", "cluster.yaml"]
    return Side(
        command, work, work / "runs/bench/metrics.jsonl", lambda line: float(json.loads(line)["time"])
    )


def start_script(work: Path, threads: int, script: str) -> Side:
    manifest = next((work / "runs" / ".stores").glob("*/manifest.json"))
    asked = {
        **SHAPE,
        "vocabulary": VOCABULARY,
        "steps": ENDLESS,
        "threads": threads,
        "tokens": str(next(manifest.parent.glob("train-*.bin"))),
        "ends": str(work / script),
    }
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", f"--nproc-per-node={RANKS}", str(ROOT / f"scripts/{script}.py")]
    return Side([*command, json.dumps(asked)], work, work / script, float)


def page(rows: list[list[float]], ratios: list[float], threads: int) -> str:
    import torch

    lines = [
        f"| {n + 1} | {ours:,.0f} | {bare:,.0f} | {stock:,.0f} | {ours / bare:.3f} | {ours / stock:.3f} |"
        for n, (ours, bare, stock) in enumerate(rows)
    ]
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    return "\n".join(
        [
            "# CPU: the launcher against a bare PyTorch loop and the stock Trainer",
            "",
            "`./scripts/bench_cpu --write` wrote this page. All train the same shape and take turns of a",
            "few seconds; times on shared machines vary, so the ratio of a round is what counts.",
            "",
            f"{RANKS} ranks over gloo, {threads} thread(s) each, fp32; {shape}, vocabulary {VOCABULARY}; "
            f"turns of {TURN - 1} steps after {WARM} of warming up. "
            f"Python {platform.python_version()}, torch {torch.__version__}.",
            "",
            "| round | launcher, tokens/s | bare loop | stock Trainer | to bare | to stock |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            f"Median ratio: **{ratios[0]:.3f}** to the bare loop, **{ratios[1]:.3f}** to the stock Trainer.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
