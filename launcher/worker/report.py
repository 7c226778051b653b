"""Rank 0's numbers as they come: metrics.jsonl and the progress bar."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.data.phases import Phases
from launcher.plan.choose import Plan
from launcher.worker.checkpoint import Saved
from launcher.worker.dataset import TrainingRows
from launcher.worker.metrics import MetricsFile, Progress, Throughput


class Report(TrainerCallback):
    """Writes one line for each report of training and each evaluation.

    `flops_per_token` (PaLM count) and the plan's peak give MFU; None where unknown.
    """

    def __init__(
        self,
        plan: Plan,
        rows: TrainingRows,
        phases: Phases,
        file: MetricsFile,
        progress: Progress,
        *,
        flops_per_token: float | None,
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._phases = phases
        self._file = file
        self._progress = progress
        self._throughput = Throughput()
        self._flops_per_token = flops_per_token

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._throughput = Throughput()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        tokens = self._tokens_in(state.global_step - 1)
        state.num_input_tokens_seen += tokens
        self._throughput.count(tokens)
        self._progress.advance()
        if control.should_evaluate or control.should_save:
            self._throughput.leave()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._throughput.resume()

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
            numbers |= self._speed(state)
        if "loss" in logs or "eval_loss" in logs:
            self._file.write({name: _finite(value) for name, value in numbers.items()})
            self._progress.report(numbers)

    def saved(self, saved: Saved) -> None:
        """A checkpoint was committed."""
        about = {"save_seconds": saved.seconds, "save_stall_seconds": saved.stall_seconds}
        self._file.write({"step": saved.step, "time": time.time(), **about, "save_bytes": saved.bytes})
        print(
            f"saved step {saved.step}: {saved.bytes / 2**20:.1f} MiB in {saved.seconds:.2f} s, "
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
        rate, peak = self._throughput.read(), self._plan.peak_flops
        mfu = None
        if self._flops_per_token is not None and peak is not None:
            mfu = rate * self._flops_per_token / (peak * self._plan.batch.world_size)
        memory = torch.cuda.max_memory_allocated() if self._plan.device == "cuda" else None
        return {
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": rate,
            "mfu": mfu,
            "peak_memory_bytes": memory,
        }


def _finite(value: float | int | None) -> float | int | str | None:
    """JSON has no NaN or infinity: they are written as words, so that every line stays JSON."""
    return value if value is None or math.isfinite(value) else str(value)
