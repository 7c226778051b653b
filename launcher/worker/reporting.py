"""A Trainer whose reports do not make the device wait: their numbers are read one step later.

To read a tensor is to wait until the device has computed all it was given before. A report that did so at
once would leave it without work until the host has handed out the next step. `docs/decisions/0022` has every
place where the host still waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_pt_utils import nested_gather

from launcher.worker.divergence import Divergence
from launcher.worker.step_times import Lap, StepTimes


class Reading:
    """Scalars by name, on their way to the host as soon as the device has computed them.

    Of one that is spread over ranks, as FSDP's gradient norm is, the ranks' parts are put together: all begin
    a reading at the same step.
    """

    def __init__(self, numbers: Mapping[str, torch.Tensor | float]) -> None:
        self._numbers = {name: _on_its_way(number) for name, number in numbers.items()}
        self._arrived: torch.cuda.Event | None = None
        if any(isinstance(each, torch.Tensor) and each.is_cuda for each in numbers.values()):
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def has_arrived(self) -> bool:
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> dict[str, float]:
        """The numbers. Waits until the device has come to where the reading was begun, and no further."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name: float(number) for name, number in self._numbers.items()}


def _on_its_way(number: torch.Tensor | float) -> torch.Tensor | float:
    if not isinstance(number, torch.Tensor):
        return number
    whole: Any = number.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()
    # From a GPU to pinned memory. A copy on a CPU too: what it was read from is summed up in place.
    copied: torch.Tensor = whole.to("cpu", non_blocking=True, copy=True)
    return copied


@dataclass(frozen=True, slots=True)
class LateReport:
    """A report of `steps` of training, the last of which left `state`, that is yet to be made.

    `numbers`: `loss`, the sum over the steps; and the last one's `grad_norm`, where there is one.
    """

    state: TrainerState
    numbers: Reading
    learning_rate: float
    steps: int
    lap: Lap

    def logs(self) -> dict[str, float]:
        """What callbacks are told. Waits for the device to have done the steps."""
        numbers = self.numbers.wait()
        return {**numbers, "loss": numbers["loss"] / self.steps, "learning_rate": self.learning_rate}


class ReportingTrainer(Trainer):
    """`transformers.Trainer` but for when it reports, and that its state keeps no reports.

    Callbacks are told of a step with the state as that step left it.
    """

    _late: LateReport | None = None
    _times: StepTimes
    _divergence: Divergence

    def _init_training_state(self, max_steps: int, *arguments: Any, **about: Any) -> tuple[int, int]:
        """A checkpoint's state has the `log_every` that it was made with, which may be another now."""
        done: tuple[int, int] = super()._init_training_state(max_steps, *arguments, **about)
        self.state.compute_steps(self.args, max_steps)
        return done

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell the callbacks. Nothing is kept in the state: metrics.jsonl is the record, and a state
        that grows with every line would grow every checkpoint."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        *arguments: Any,
        **about: Any,
    ) -> None:
        """Begin this step's report, if one is due, and make the one before.

        Where training pauses or ends its own is made too: what follows is to find every number written, and
        not to save what has diverged.
        """
        due = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        self.report_late()
        self.control.should_log = False
        if due:
            self._late = self._begin_report(tr_loss, grad_norm, about.get("learning_rate"))
        ends = self.control.should_epoch_stop or self.control.should_training_stop
        if ends or self.control.should_evaluate or self.control.should_save:
            self.report_late()
            self._times.leave()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *arguments, **about)

    def _begin_report(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, learning_rate: float | None
    ) -> LateReport:
        """A report of the steps since the last one. `tr_loss`, their sum on this rank, begins anew."""
        lap = self._times.lap()  # before the reading, which is waited for
        numbers: dict[str, torch.Tensor | float] = {
            "loss": nested_gather(tr_loss, self.args.parallel_mode).mean()
        }
        if grad_norm is not None:
            numbers["grad_norm"] = grad_norm
        reading = Reading(numbers)
        tr_loss.zero_()
        steps = self.state.global_step - self._globalstep_last_logged
        self._globalstep_last_logged = self.state.global_step
        rate = self._get_learning_rate() if learning_rate is None else learning_rate
        return LateReport(copy(self.state), reading, rate, steps, lap)

    def report_late(self, *, together: bool = True) -> None:
        """Make the report that was begun last, if it is yet to be made. Raises Diverged where its numbers are
        not finite. `together`: all ranks do so at once."""
        late, self._late = self._late, None
        if late is None:
            return
        logs = late.logs()
        self._times.read(late.lap, together=together)
        self._total_loss_scalar += logs["loss"] * late.steps
        self.control = self.callback_handler.on_log(self.args, late.state, self.control, logs)
        self._divergence.report(logs, late.state.global_step)

    def report_what_is_there(self) -> None:
        """After a failure, on this rank alone: the last report, if its numbers are there without waiting."""
        # What has failed before is what is told; a GPU that is broken answers with an error even when asked.
        with suppress(Exception):
            if self._late is not None and self._late.numbers.has_arrived():
                self.report_late(together=False)
