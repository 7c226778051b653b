"""Times the steps of one row of `scripts/bench_gpu`, whoever trains: launcher, the stock Trainer, or a loop.

A row's process starts, builds its model and takes its first step (which compiles) while another row may be
measured. Then it waits for its turn, warms up, and is alone on the GPU while its windows are timed. When the
result is written, it stands still until it is ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

VARIABLE = "BENCH_GPU_METER"


@dataclass(frozen=True)
class Measuring:
    """What the bench asks of a row: where the result and the turn's lock are, and how many steps to time.

    `started` is when the row's first process was started, in seconds since the epoch; `tokens` are those of
    one optimizer step; `profile`: whether to add a table of the kernels that take longest.
    """

    result: str
    turn: str
    started: float
    tokens: int
    warm: int
    window: int
    windows: int
    profile: bool


class Meter(TrainerCallback):
    """Call `begins` and `ends` around each optimizer step; the Trainer does so by itself."""

    def __init__(self) -> None:
        self._asked = Measuring(**json.loads(os.environ[VARIABLE]))
        self._done = 0
        self._waited = 0.0
        self._first_step = 0.0
        self._since = 0.0
        self._rates: list[float] = []

    def begins(self) -> None:
        if self._done == 1:
            waits = time.perf_counter()
            self._turn = Path(self._asked.turn).open("w")  # noqa: SIM115 - held until the process ends
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            self._waited = time.perf_counter() - waits

    def ends(self) -> None:
        self._done += 1
        if self._done == 1:
            torch.cuda.synchronize()
            self._first_step = time.time() - self._asked.started
        timed = self._done - 1 - self._asked.warm
        if timed < 0 or timed % self._asked.window:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        if timed:
            self._rates.append(self._asked.window * self._asked.tokens / (now - self._since))
        if len(self._rates) < self._asked.windows:
            self._since = now
        elif self._asked.profile:
            self._profile()
        else:
            self._finish([])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.begins()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.ends()

    def _profile(self) -> None:
        """From here to the second step's end, after which the row is done."""
        profiler = torch.profiler.profile()
        profiler.start()
        before = self._done

        def until_two_more() -> None:
            self._done += 1
            if self._done == before + 2:
                torch.cuda.synchronize()
                profiler.stop()
                averages = profiler.key_averages()
                orders = ("self_cuda_time_total", "self_cpu_time_total")
                self._finish([averages.table(sort_by=by, row_limit=40) for by in orders])

        self.ends = until_two_more  # type: ignore[method-assign]

    def _finish(self, tables: list[str]) -> None:
        free, total = torch.cuda.mem_get_info()
        found = {
            "tokens_per_second": statistics.median(self._rates),
            "windows": self._rates,
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "used_on_device": total - free,
            "start_to_first_step": self._first_step,
            "waited_for_turn": self._waited,
        }
        if tables:
            Path(self._asked.result).with_suffix(".profile.txt").write_text("\n".join(tables))
        temporary = Path(self._asked.result + ".tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(self._asked.result)
        while True:
            signal.pause()
