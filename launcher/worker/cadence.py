"""When to evaluate, save and stop: the plan's steps and clocks, requests, early stopping."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.config.schema import EarlyStopping
from launcher.plan.choose import Every, Plan
from launcher.worker.divergence import EXPLODED, Divergence
from launcher.worker.stop import Agreement, StopSignals, Wishes


@dataclass(slots=True)
class BestEvaluation:
    """The lowest eval_loss so far, the step it was measured at, and how long it has got on too slowly.

    `mark` is the last loss that was lower than the one before by more than the least difference that counts,
    `since` the number of evaluations after it.
    """

    loss: float | None = None
    step: int | None = None
    mark: float | None = None
    since: int = 0
    is_final: bool = False
    """Whether patience ran out: training has ended and is not taken up again."""

    def add(self, loss: float, step: int, min_delta: float) -> bool:
        """Take in one evaluation; whether it is the best."""
        self.since += 1
        if math.isnan(loss):
            return False
        if self.mark is None or loss < self.mark - min_delta:
            self.mark, self.since = loss, 0
        if self.loss is None or loss < self.loss:
            self.loss, self.step = loss, step
            return True
        return False


class Clock:
    """Whether an interval has passed; without one it never has."""

    def __init__(self, every: Every) -> None:
        self._seconds = every.seconds
        self._since = time.monotonic()

    def is_due(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds

    def restart(self) -> None:
        self._since = time.monotonic()


class Cadence(TrainerCallback):
    """Sets the Trainer's control flags, the same on every rank at the same step."""

    def __init__(
        self,
        plan: Plan,
        agreement: Agreement,
        signals: StopSignals,
        *,
        rank: int,
        stop_request: Path,
        best: BestEvaluation,
        early_stopping: EarlyStopping | None,
        divergence: Divergence,
    ) -> None:
        self._plan = plan
        self._agreement = agreement
        self._signals = signals
        self._rank = rank
        self._stop_request = stop_request
        self._best = best
        self._early_stopping = early_stopping
        self._divergence = divergence
        self._evaluation_clock = Clock(plan.eval_every)
        self._saving_clock = Clock(plan.checkpoint_every)
        self.stopped = False
        """Whether training ended because someone asked for it."""
        self.evaluation_is_due = False
        """Whether that was in an evaluation, which is then to be made when the run goes on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._evaluation_clock.restart()
        self._saving_clock.restart()

    def propose(self) -> None:
        """Put in this rank's wishes for the end of the step that is under way. Called by every rank in each
        step, as late as it can be without a rank waiting for the others' wishes where the step ends."""
        self._agreement.settle()  # the last of an evaluation; whoever wanted something then still does
        self._agreement.propose(self._wishes())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        step, last = state.global_step, state.global_step == self._plan.steps
        agreed = self._agreement.settle()
        if agreed.give_up:
            raise self._divergence.error(EXPLODED, step)
        self.stopped = agreed.stop and not last
        evaluates = self._plan.eval_every != Every()
        if agreed.evaluate or _falls_on(self._plan.eval_every, step) or (last and evaluates):
            control.should_evaluate = True
            self._evaluation_clock.restart()
        if agreed.save or _falls_on(self._plan.checkpoint_every, step) or last or self.stopped:
            control.should_save = True
            self._saving_clock.restart()
        # Training pauses with a report: where it goes on, the steps up to here are counted nowhere else.
        control.should_log |= control.should_evaluate or control.should_save
        control.should_training_stop |= self.stopped
        return control

    def evaluation_goes_on(self, step: int) -> bool:
        """Asked before each forward pass of an evaluation at `step`: False once all ranks agree to stop.

        The evaluation of the last step is always made: nothing would take it up.
        """
        if step == self._plan.steps:
            return True
        if self._agreement.settle().stop:
            self.stopped = self.evaluation_is_due = True
            return False
        self._agreement.propose(Wishes(stop=self.is_asked_to_stop()))
        return True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Whoever asked for a stop while a checkpoint was written need not wait for another one."""
        if not (self.stopped or self._best.is_final or state.global_step == self._plan.steps):
            self.stopped = self._agreement.any(self.is_asked_to_stop())
            control.should_training_stop |= self.stopped
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Steps since the last report are reported too where an evaluation or a save has ended training."""
        control.should_log |= control.should_training_stop
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._agreement.settle()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **about: Any,
    ) -> TrainerControl:
        if self._early_stopping is None:
            return control
        if self._best.add(about["metrics"]["eval_loss"], state.global_step, self._early_stopping.min_delta):
            control.should_save = True
        if self._best.since >= self._early_stopping.patience:
            self._best.is_final = True
            control.should_save = control.should_training_stop = True
        return control

    def told_of_end(self, step: int) -> str | None:
        """What there is to tell of training that has ended at `step` unasked: why that is not the last one
        planned, and which step's the model is; None: nothing."""
        best, least = self._best, 0.0 if self._early_stopping is None else self._early_stopping.min_delta
        model = f"the model is that of step {best.step or step}"
        if step == self._plan.steps:
            lowest = f"trained to the end; {model}, whose eval_loss is the lowest"
            return None if best.step in (None, step) else lowest
        if not best.is_final:
            return f"stopped early: a callback ended training; {model}"
        by = f" by {least:g}" if least else ""
        times = f"{best.since} evaluation{'' if best.since == 1 else 's'}"
        return f"stopped early: eval_loss has not fallen{by} for {times}; {model}"

    def is_asked_to_stop(self) -> bool:
        """Whether this rank knows of a wish to stop. Only rank 0 looks for the file, in each step: what the
        file system does not say in one (ESTALE, EIO), it says in the next."""
        asked = self._signals.ask_to_stop
        with contextlib.suppress(OSError):
            asked = asked or (self._rank == 0 and self._stop_request.exists())
        return asked

    def _wishes(self) -> Wishes:
        leads = self._rank == 0
        return Wishes(
            stop=self.is_asked_to_stop(),
            save=leads and self._saving_clock.is_due(),
            evaluate=leads and self._evaluation_clock.is_due(),
            give_up=self._divergence.has_exploded,
        )


def _falls_on(every: Every, step: int) -> bool:
    return every.steps is not None and step % every.steps == 0
