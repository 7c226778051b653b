"""Launcher on this machine's GPU: against the stock Trainer and a hand-written compiled loop, item by item,
and its predictions of memory and time against what was measured.

    ./scripts/bench_gpu FILE.json [--seconds 500] [--only 'NAME;NAME'] [--profile 'NAME;NAME']

Each row is a process of its own, launcher's the real `launcher train`. The first three start one by one; then
several start and compile at a time. One is measured at a time, so that all fit into ten minutes. Rows are
taken in order of what they matter, and those that the time does not suffice for are left out of the JSON: the
pages that `scripts/gpu_pages.py` makes of it call them not measured. Nothing is needed from outside: the text
is the Python standard library's source, the vocabulary GPT-2's in size.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.run import journal, processes
from scripts.gpu_meter import VARIABLE, Measuring
from scripts.gpu_rows import ENDLESS

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 1024
SHAPES: Mapping[str, tuple[int, int, int]] = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
"""Layers, heads and width (Radford et al. 2019, table 2)."""

AT_A_TIME = 7
LOOK_AHEAD = 3
"""Rows that may start before one that is due and needs more memory than is free. More, and it never would."""

ALONE = 3
"""Rows, the first ones, that nothing else runs beside."""

LAST_START = 30
"""Seconds before the end in which no row is started."""

ROW_SECONDS = 240
"""After which a row is given up."""


@dataclass(frozen=True)
class Row:
    """One thing to measure. `memory`: GB it may take on the GPU, so that rows in the making fit beside it."""

    name: str
    kind: str
    model: str
    micro_batch: int
    memory: int
    compiled: bool = True
    checkpointing: bool | int = False
    accumulation: int = 1
    dropout: float = 0.0
    precision: str = "bf16"
    settings: dict[str, Any] = field(default_factory=dict)
    warm: int = 10
    window: int = 10
    windows: int = 5

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.accumulation * BLOCK

    @property
    def brief(self) -> bool:
        """Whether it is about memory: a few steps, not compiled."""
        return not self.compiled and self.window == BRIEF["window"]


FAST = ("tanh_gelu", "causal_attention", "chunked_loss", "padded_vocabulary", "fused_adamw", "tf32")
BRIEF: Mapping[str, Any] = {"compiled": False, "warm": 3, "window": 2, "windows": 3}
"""Settings of brief rows."""

LONG: Mapping[str, Any] = {"warm": 2, "window": 1, "windows": 4}
"""Rows whose steps take long."""

MEMORY: Sequence[tuple[str, int, bool | int, int]] = (
    ("gpt2-medium", 16, 12, 30),
    ("gpt2", 8, False, 12),
    ("gpt2", 16, False, 20),
    ("gpt2", 8, True, 8),
    ("gpt2", 32, True, 16),
    ("gpt2-medium", 4, False, 16),
    ("gpt2-medium", 16, False, 35),
    ("gpt2-medium", 8, True, 14),
    ("gpt2-large", 4, False, 28),
    ("gpt2-large", 8, True, 25),
    ("gpt2-xl", 2, False, 40),
    ("gpt2-xl", 8, False, 75),
    ("gpt2-xl", 8, True, 45),
)
"""Model, micro-batch, gradient checkpointing (a number: of the first layers), and GB to keep free for it."""

CHECKPOINTED: Mapping[bool | int, str] = {False: "", True: ", checkpointed"}

STRATEGIES: Sequence[tuple[str, str, str]] = (
    ("zero2", "none", "bf16"),
    ("zero3", "none", "bf16"),
    ("fsdp", "none", "bf16"),
    ("ddp", "none", "fp16"),
    ("zero2", "optimizer", "bf16"),
    ("zero3", "parameters", "bf16"),
    ("fsdp", "parameters", "bf16"),
    ("zero1", "none", "bf16"),
    ("zero2", "none", "fp16"),
    ("ddp", "none", "fp32"),
)
"""Strategy, offload and precision, on one GPU: what each holds there, and that it runs at all."""


def rows() -> list[Row]:
    """In order of what they matter."""
    return [
        *against("gpt2", 32, 45, 20),
        Row(
            "gpt2-xl launcher, micro-batch 16, accumulation 8",
            *("launcher", "gpt2-xl", 16, 78),
            accumulation=8,
            **LONG,
        ),
        Row("gpt2 launcher, accumulation 16", "launcher", "gpt2", 32, 18, accumulation=16, **LONG),
        Row("gpt2 loop, accumulation 16", "loop", "gpt2", 32, 20, accumulation=16, **LONG),
        Row("gpt2-xl launcher", "launcher", "gpt2-xl", 8, 52, warm=5, window=3),
        *against("gpt2-medium", 16, 60, 26, window=5),
        Row("gpt2-xl stock", "stock", "gpt2-xl", 8, 85, compiled=False, warm=5, window=3),
        *against("gpt2-large", 16, 85, 42, warm=5, window=3),
        Row("gpt2-xl loop", "loop", "gpt2-xl", 8, 55, warm=5, window=3),
        *ablation(),
        *(
            Row(
                f"{model}, micro-batch {micro_batch}{CHECKPOINTED.get(on, f', {on} layers checkpointed')}",
                *("launcher", model, micro_batch, gigabytes),
                checkpointing=on,
                **BRIEF,
            )
            for model, micro_batch, on, gigabytes in MEMORY
        ),
        *(
            Row(
                f"gpt2-medium, {strategy}, offload {offload}, {precision}",
                *("launcher", "gpt2-medium", 8, 30),
                precision=precision,
                settings={"train.strategy": strategy, "train.offload": offload},
                **BRIEF,
            )
            for strategy, offload, precision in STRATEGIES
        ),
        Row("gpt2 stock, micro-batch 8", "stock", "gpt2", 8, 16, **BRIEF),
        Row("gpt2 launcher, dropout 0.1", "launcher", "gpt2", 32, 20, dropout=0.1),
        Row("gpt2 stock, dropout 0.1", "stock", "gpt2", 32, 50, dropout=0.1, compiled=False),
        Row("gpt2 launcher, micro-batch 64", "launcher", "gpt2", 64, 32),
        Row("gpt2 launcher, micro-batch 8", "launcher", "gpt2", 8, 12),
        Row("gpt2-medium launcher, checkpointed", "launcher", "gpt2-medium", 16, 20, checkpointing=True),
    ]


def against(model: str, micro_batch: int, stock: int, others: int, **steps: int) -> list[Row]:
    """Launcher, the stock Trainer as it comes, and the loop; GB of the stock and of the two others."""
    about = dict[str, Any](steps)
    return [
        Row(f"{model} launcher", "launcher", model, micro_batch, others, **about),
        Row(f"{model} stock", "stock", model, micro_batch, stock, compiled=False, **about),
        Row(f"{model} loop", "loop", model, micro_batch, others, **about),
    ]


def ablation() -> list[Row]:
    """Launcher's gpt2 with one thing switched off, and the stock Trainer with the one switch it has."""
    return [
        *(
            Row(f"gpt2 without {item}", "launcher", "gpt2", 32, 28, settings={f"train.fast.{item}": False})
            for item in FAST
        ),
        Row("gpt2 without compile", "launcher", "gpt2", 32, 22, compiled=False),
        Row("gpt2 stock, compiled", "stock", "gpt2", 32, 28),
    ]


class Started:
    """One row's processes."""

    def __init__(self, row: Row, work: Path, *, profile: bool) -> None:
        self.row = row
        self.name = re.sub("[^a-z0-9]+", "-", row.name)
        self.result = work / f"{self.name}.json"
        self.log = work / f"{self.name}.log"
        self.since = time.time()
        measuring = Measuring(
            result=str(self.result),
            turn=str(work / "turn"),
            started=self.since,
            tokens=row.tokens,
            warm=row.warm,
            window=row.window,
            windows=row.windows,
            profile=profile,
        )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(work),
                cwd=work,
                stdout=log,
                stderr=log,
                env=environment(**{VARIABLE: json.dumps(asdict(measuring))}),
                start_new_session=True,
            )
        self._work = work

    def _command(self, work: Path) -> list[str]:
        row = self.row
        if row.kind == "launcher":
            file = work / f"{self.name}.yaml"
            file.write_text(json.dumps(run_of(row, self.name, work)))
            settings = [f"{key}={json.dumps(value)}" for key, value in row.settings.items()]
            return [sys.executable, "-m", "launcher", "train", str(file), *settings]
        layers, heads, width = SHAPES[row.model]
        asked = {
            "layers": layers,
            "heads": heads,
            "width": width,
            "block_size": BLOCK,
            "micro_batch": row.micro_batch,
            "accumulation": row.accumulation,
            "dropout": row.dropout,
            "compile": row.compiled,
            "checkpointing": row.checkpointing,
            "precision": row.precision,
        }
        return [sys.executable, "-m", "scripts.gpu_rows", row.kind, json.dumps(asked)]

    @property
    def ready(self) -> bool:
        """Whether it has taken its first step, and waits for its turn."""
        return self.result.with_suffix(".ready").exists()

    @property
    def over(self) -> bool:
        """Whether its process has ended, has had its time, or begins anew what failed before."""
        restarts = journal.events(self._work / "runs" / self.name / "journal.jsonl", "restart")
        ended = self._process.poll() is not None or time.time() - self.since > ROW_SECONDS
        return ended or bool(restarts)

    def profiles(self) -> list[Path]:
        return list(self._work.glob(f"{self.name}.profile.txt"))

    def finished(self) -> dict[str, Any] | None:
        """What was measured, or why nothing was; None while the row goes on. Its processes are ended."""
        if self.result.exists():
            found = {**asdict(self.row), **json.loads(self.result.read_text()), **self._plan()}
        elif self.over:
            found = {**asdict(self.row), "error": self._last_words(), **self._plan()}
        else:
            return None
        found["seconds"] = time.time() - self.since
        self.end()
        return found

    def end(self) -> None:
        processes.end(self._process)

    def _plan(self) -> dict[str, Any]:
        """What launcher predicted for its rows."""
        file = self._work / "runs" / self.name / "plan.json"
        return {"plan": json.loads(file.read_text())["plan"]} if file.exists() else {}

    def _last_words(self) -> str:
        logs = [self.log, *sorted((self._work / "runs" / self.name).glob("logs/*/*.log"))]
        return "\n".join(log.read_text(errors="replace")[-1500:] for log in logs)


def prepare(work: Path) -> None:
    """Make the token store that all of launcher's rows train on."""
    file = work / "prepare.yaml"
    file.write_text(json.dumps(run_of(rows()[0], "prepare", work)))
    command = [sys.executable, "-m", "launcher", "data", "prepare", str(file)]
    subprocess.run(command, cwd=work, env=environment(), check=True)


def environment(**more: str) -> dict[str, str]:
    """That of every row: launcher from this tree, and the meter beside it."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "4", **more}


def run_of(row: Row, name: str, work: Path) -> dict[str, Any]:
    """The run.yaml of a row."""
    dropouts = {f"{where}_pdrop": row.dropout for where in ("resid", "embd", "attn")}
    return {
        "name": name,
        "model": {"name": row.model, "tokenizer": str(work / "tokenizer"), "overrides": dropouts},
        "data": {
            "train": [f"{sysconfig.get_path('stdlib')}/*.py"],
            "sample_by": "document",
            "validation": 0,
            "block_size": BLOCK,
            "cache_dir": str(work / "stores"),
        },
        "train": {
            "batch_size": row.micro_batch * row.accumulation,
            "micro_batch": row.micro_batch,
            "steps": ENDLESS,
            "log_every": 10,
            "precision": row.precision,
            "strategy": "ddp",
            "compile": row.compiled,
            "gradient_checkpointing": row.checkpointing,
            "callbacks": ["scripts.gpu_meter:Meter"],
        },
        "checkpoint": {"every": ENDLESS},
        "report_to": [],
    }


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 50,257 entries: every byte, 50,000 pairs of bytes, and the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in alphabet for second in alphabet][:50_000]
    words = [*alphabet, *(first + second for first, second in pairs), "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)


def ceilings() -> dict[str, float]:
    """What this GPU reaches: FLOP/s of a large bf16 product, and bytes/s of a copy, read and written."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.empty(1 << 30, device="cuda", dtype=torch.float32) for _ in range(2))
    found: dict[str, float] = {}
    works: Sequence[tuple[str, Callable[[], torch.Tensor], float]] = (
        ("matmul_flops", lambda: a @ b, 2.0 * 8192**3),
        ("copy_bytes", lambda: y.copy_(x), 2.0 * x.nbytes),
    )
    for name, work, size in works:
        for _ in range(5):
            work()
        torch.cuda.synchronize()
        since = time.perf_counter()
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        found[name] = 20 * size / (time.perf_counter() - since)
    return found


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in ("torch", "transformers", "accelerate", "deepspeed", "triton", "liger_kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Bench:
    """Rows being taken, and what was found so far; `file` is written after each."""

    def __init__(self, work: Path, file: Path, profiled: Sequence[str], until: float) -> None:
        import torch

        device = torch.cuda.get_device_properties(0)
        self._room = device.total_memory / 1e9 - 10
        self._work, self._file, self._profiled, self._until = work, file, profiled, until
        self._going: list[Started] = []
        self._answer: dict[str, Any] = {
            "gpu": device.name,
            "memory": device.total_memory,
            "versions": versions(),
            "ceilings": ceilings(),
            "rows": [],
        }
        torch.cuda.empty_cache()

    def alone(self, chosen: Sequence[Row]) -> None:
        """Take these with no others beside them: each starts alone, and all are measured after that.

        Raises SystemExit if one fails, since all that follow are compared with them.
        """
        with (self._work / "turn").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            for row in chosen:
                self._start(row)
                while not (self._going[-1].ready or self._going[-1].over):
                    time.sleep(0.2)
        while self._going:
            self._collect()
        if failed := [row["name"] for row in self._answer["rows"] if "error" in row]:
            raise SystemExit(f"nothing else is measured: {', '.join(failed)} failed")

    def one_by_one(self, chosen: Sequence[Row]) -> None:
        """Take these in turn, while those that come after them start."""
        waiting = list(chosen)
        while self._going or waiting:
            if time.monotonic() > self._until:
                return
            if time.monotonic() > self._until - LAST_START:
                waiting.clear()
            held = sum(each.row.memory for each in self._going)
            fitting = [row for row in waiting[:LOOK_AHEAD] if held + row.memory <= self._room]
            if fitting and len(self._going) < AT_A_TIME:
                waiting.remove(fitting[0])
                self._start(fitting[0])
            else:
                self._collect()

    def end(self) -> None:
        """Say how the rows compare, and end those that go on."""
        print("\n".join(ratios(self._answer["rows"])), flush=True)
        for each in self._going:
            each.end()

    def _start(self, row: Row) -> None:
        self._going.append(Started(row, self._work, profile=row.name in self._profiled))

    def _collect(self) -> None:
        time.sleep(0.2)
        for each in list(self._going):
            if (found := each.finished()) is not None:
                self._going.remove(each)
                self._answer["rows"].append(found)
                self._file.write_text(json.dumps(self._answer, indent=1))
                tell(found)
                for table in each.profiles():
                    self._file.with_name(f"profile-{each.name}.txt").write_text(table.read_text())


def tell(found: Mapping[str, Any]) -> None:
    if "error" in found:
        print(f"{found['name']}: FAILED after {found['seconds']:.0f} s\n{found['error']}", flush=True)
        return
    print(
        f"{found['name']}: {found['tokens_per_second']:,.0f} tokens/s, peak"
        f" {found['peak_allocated'] / 2**30:.2f} GiB, first step after {found['start_to_first_step']:.0f} s,"
        f" {found['seconds']:.0f} s in all",
        flush=True,
    )


def ratios(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """How launcher's rows compare with the stock Trainer's and the loop's of the same name, a line each."""
    every = {row["name"]: row for row in found if "error" not in row}
    lines = []
    for name, row in every.items():
        for other in ("stock", "loop"):
            theirs = every.get(name.replace(" launcher", f" {other}"))
            if theirs is not None and theirs is not row:
                faster = row["tokens_per_second"] / theirs["tokens_per_second"]
                larger = row["peak_allocated"] / theirs["peak_allocated"]
                lines.append(f"{name}: {faster:.3f} of {other}'s tokens/s, {larger:.2f} of its memory")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="where to write what was found")
    parser.add_argument("--seconds", type=float, default=500, help="start no row that would end later")
    parser.add_argument(
        "--only",
        default="",
        help="names of rows, with semicolons between: these, in this order after those that start alone",
    )
    parser.add_argument("--profile", default="", help="names of rows to add tables of kernels for")
    asked = parser.parse_args()
    every = {row.name: row for row in rows()}
    names = [name for name in asked.only.split(";") if name] or list(every)
    if unknown := [name for name in names if name not in every]:
        parser.error(f"no such rows: {'; '.join(unknown)}")
    first = [row for row in rows()[:ALONE] if row.name in names]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_tokenizer(work / "tokenizer")
        prepare(work)
        bench = Bench(work, asked.json, asked.profile.split(";"), time.monotonic() + asked.seconds)
        try:
            bench.alone(first)
            bench.one_by_one([every[name] for name in names if every[name] not in first])
        finally:
            bench.end()


if __name__ == "__main__":
    main()
