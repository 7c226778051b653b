"""Rank 0's numbers as they come: metrics.jsonl and the progress bar."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.data.phases import Phases
from launcher.plan.choose import Plan
from launcher.sizes import size_in_words
from launcher.worker.ceiling import matmul_flops
from launcher.worker.checkpoint import Saved
from launcher.worker.dataset import TrainingRows
from launcher.worker.engine import DTYPES
from launcher.worker.metrics import MetricsFile, Progress
from launcher.worker.step_times import Slowest, StepTimes, slowest

NAMED_EVERY_SECONDS = 600.0
"""The log names a slow rank at most so often; metrics.jsonl does in each line."""


class Report(TrainerCallback):
    """Writes one line for each report of training and each evaluation.

    `flops_per_token` (PaLM count) gives MFU against the plan's peak, a datasheet's, and `matmul_share`
    against what a large product reaches on rank 0's GPU; None where unknown.
    """

    def __init__(
        self,
        plan: Plan,
        rows: TrainingRows,
        phases: Phases,
        times: StepTimes,
        file: MetricsFile,
        progress: Progress,
        *,
        flops_per_token: float | None,
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._phases = phases
        self._times = times
        self._file = file
        self._progress = progress
        self._tokens_told = 0
        self._flops_per_token = flops_per_token
        self._matmul_flops: float | None = None
        self._slowest_before: int | None = None
        self._named: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._plan.device == "cuda" and self._flops_per_token is not None:
            self._matmul_flops = matmul_flops(DTYPES[self._plan.precision])
        self._tokens_told = state.num_input_tokens_seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.num_input_tokens_seen += self._tokens_in(state.global_step - 1)
        self._progress.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **about: Any,
    ) -> None:
        logs: dict[str, float] = about["logs"]
        numbers: dict[str, float | int | None] = {"step": state.global_step, "time": time.time(), **logs}
        if "loss" in logs:
            numbers |= {"time": self._times.spent.ended, **self._speed(state)}
        if "loss" in logs or "eval_loss" in logs:
            self._file.write({name: _finite(value) for name, value in numbers.items()})
            self._progress.report(numbers)

    def saved(self, saved: Saved) -> None:
        """A checkpoint was committed."""
        about = {"save_seconds": saved.seconds, "save_stall_seconds": saved.stall_seconds}
        self._file.write({"step": saved.step, "time": time.time(), **about, "save_bytes": saved.bytes})
        print(
            f"saved step {saved.step}: {size_in_words(saved.bytes)} in {saved.seconds:.2f} s, "
            f"for {saved.stall_seconds:.2f} s of which training stood still",
            flush=True,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._progress.close()
        self._file.close()

    def _tokens_in(self, step: int) -> int:
        """Tokens of one optimizer step over the whole world, padding left out."""
        return int(self._rows.lengths(self._phases.samples_of_step(step).tolist()).sum())

    def _speed(self, state: TrainerState) -> dict[str, float | int | None]:
        spent = self._times.spent
        tokens, self._tokens_told = (
            state.num_input_tokens_seen - self._tokens_told,
            state.num_input_tokens_seen,
        )
        tokens_per_second = tokens / max(spent.training, 1e-9)
        memory = torch.cuda.max_memory_allocated() if self._plan.device == "cuda" else None
        behind = slowest(spent.by_rank, spent.step_seconds)
        self._name(behind)
        return {
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": tokens_per_second,
            "mfu": self._share(tokens_per_second, self._plan.peak_flops),
            "matmul_share": self._share(tokens_per_second, self._matmul_flops),
            "data_wait_seconds": spent.data_wait,
            "host_seconds": spent.host,
            "slowest_rank": None if behind is None else behind.rank,
            "slowest_rank_lag_seconds": None if behind is None else behind.lag,
            "peak_memory_bytes": memory,
        }

    def _share(self, tokens_per_second: float, flops: float | None) -> float | None:
        """Of the FLOP/s that every GPU could do, `flops` each, those that the model needed."""
        if self._flops_per_token is None or flops is None:
            return None
        return tokens_per_second * self._flops_per_token / (flops * self._plan.batch.world_size)

    def _name(self, behind: Slowest | None) -> None:
        """Say in the log which rank is slow, once it has been so in two reports in a row."""
        before, self._slowest_before = self._slowest_before, None if behind is None else behind.rank
        if behind is None or behind.rank != before:
            return
        now = time.monotonic()
        if self._named is not None and now - self._named < NAMED_EVERY_SECONDS:
            return
        self._named = now
        print(
            f"rank {behind.rank} is the slowest: {behind.lag * 1000:.1f} ms a step behind the median rank, "
            f"{max(behind.data_wait_lag, 0.0) * 1000:.1f} ms of them waiting for data",
            flush=True,
        )


def _finite(value: float | int | None) -> float | int | str | None:
    """JSON has no NaN or infinity: they are written as words, so that every line stays JSON."""
    return value if value is None or math.isfinite(value) else str(value)
