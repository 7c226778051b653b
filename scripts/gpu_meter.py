"""Times the steps of one row of `scripts/bench_gpu`, whoever trains: launcher, the stock Trainer, or a loop.

A row's process starts, builds its model and takes its first step (which compiles) while another row may be
measured. Then it waits for its turn, warms up, and is alone on the GPU while its windows are timed. When the
result is written, it stands still until it is ended.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._dynamo.utils import calculate_time_spent
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

VARIABLE = "BENCH_GPU_METER"
LOADED = time.time()
"""When the modules of whoever trains had been loaded: this one is among the last."""


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
        self._begun = 0.0
        self._waited = 0.0
        self._first_step = 0.0
        self._ends: list[torch.cuda.Event] = []

    def begins(self) -> None:
        if self._done == 0:
            self._begun = time.time()
        if self._done == 1:
            Path(self._asked.result).with_suffix(".ready").touch()
            waits = time.perf_counter()
            self._turn = Path(self._asked.turn).open("w")  # noqa: SIM115 - held until the process ends
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            self._waited = time.perf_counter() - waits

    def ends(self) -> None:
        """Mark the step's end in the GPU's own queue: waiting for it here would leave the GPU idle."""
        self._done += 1
        if self._done == 1:
            torch.cuda.synchronize()
            self._first_step = time.time() - self._asked.started
        if self._done <= self._asked.warm:
            return
        self._ends.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._ends[-1].record()
        if len(self._ends) <= self._asked.window * self._asked.windows:
            return
        torch.cuda.synchronize()
        if self._asked.profile:
            self._profile()
        else:
            self._finish({})

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
                tables = "\n".join(averages.table(sort_by=by, row_limit=40) for by in orders)
                Path(self._asked.result).with_suffix(".profile.txt").write_text(tables)
                self._finish({"kernel_seconds": busy(profiler) / 2})

        self.ends = until_two_more  # type: ignore[method-assign]

    def _finish(self, more: dict[str, float]) -> None:
        free, total = torch.cuda.mem_get_info()
        marks = self._ends[:: self._asked.window]
        rates = [
            self._asked.window * self._asked.tokens / (1e-3 * first.elapsed_time(last))
            for first, last in itertools.pairwise(marks)
        ]
        born = psutil.Process().create_time()
        found = {
            "tokens_per_second": statistics.median(rates),
            "windows": rates,
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "used_on_device": total - free,
            "start_to_first_step": self._first_step,
            "process_age": time.time() - born,
            "loaded": LOADED - born,
            "begun": self._begun - born,
            "compiling": calculate_time_spent(),
            "waited_for_turn": self._waited,
            **more,
        }
        temporary = Path(self._asked.result + ".tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(self._asked.result)
        while True:
            signal.pause()


def busy(profiler: torch.profiler.profile) -> float:
    """Seconds in which at least one kernel ran, of all that were recorded."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()  # type: ignore[no-untyped-call]
        if event.device_type == DeviceType.CUDA
    )
    found, until = 0.0, 0.0
    for start, end in spans:
        found += max(0.0, end - max(start, until))
        until = max(until, end)
    return found * 1e-6
