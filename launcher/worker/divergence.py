"""Whether training has diverged: NaN, infinity, or a loss that has exploded.

It looks only at what is read for the report anyway, which is the same on every rank, so it costs no
synchronisation; and at the weights themselves before they are saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from shlex import quote

import torch

from launcher.errors import TrainingError
from launcher.run.checkpoints import newest_step
from launcher.run.directory import RunDirectory
from launcher.worker.engine import own_part

REPORTS = 5
"""So many reports in a row must be far too high before the loss has exploded."""
ABOVE_BEST = 2.0
"""How far above the lowest loss reported so far that is, in nats."""
ABOVE_UNIFORM = 1.0
"""And how far above the loss of guessing every token alike, in nats."""

EXPLODED = "the loss has exploded"


class Diverged(TrainingError):
    """Training has diverged; it names the steps and what to do."""


class Divergence:
    """Follows the reports of a run whose tokenizer has `vocabulary` tokens (None: not known).

    `tolerates_overflow`: with fp16 an infinite gradient norm is how the loss scale is found, not a fault.
    """

    def __init__(
        self, directory: RunDirectory, step: int, vocabulary: int | None, *, tolerates_overflow: bool
    ) -> None:
        self._directory = directory
        self._sound = step
        self._vocabulary = vocabulary
        self._tolerates_overflow = tolerates_overflow
        self._best = math.inf
        self._high = 0

    @property
    def has_exploded(self) -> bool:
        return self._high >= REPORTS

    def report(self, logs: Mapping[str, float], step: int) -> None:
        """Take in a report of training at `step`. Raises Diverged where it is not finite."""
        watched = ("loss",) if self._tolerates_overflow else ("loss", "grad_norm")
        for name in watched:
            if not math.isfinite(logs.get(name, 0.0)):
                raise self.error(f"{name} is {logs[name]}", step)
        self._best = min(self._best, logs["loss"])
        if logs["loss"] > self._limit():
            self._high += 1
        else:
            self._high, self._sound = 0, step

    def flaw(self, parameters: Iterable[torch.nn.Parameter]) -> str | None:
        """What must not be saved: this rank's part of the weights, if not finite, or an exploded loss."""
        if self.has_exploded:
            return EXPLODED
        found = [own_part(parameter).isfinite().all() for parameter in parameters]
        return None if all(torch.stack(found).tolist()) else "the weights are not finite"

    def error(self, what: str, step: int) -> Diverged:
        """What to raise at `step`. What came before the last sound report, or the last checkpoint, whose
        weights are finite, is not suspect."""
        newest = newest_step(self._directory.checkpoints)
        first = self._sound + 1 if self.has_exploded else max(self._sound, newest) + 1
        first = min(first, step)
        steps, span = (
            (f"step {step}", f"{step}") if first == step else (f"steps {first} to {step}", f"{first}-{step}")
        )
        back = (
            f"move the checkpoints after step {first - 1} out of {self._directory.checkpoints}, then "
            if newest >= first
            else ""
        )
        run = quote(str(self._directory.root))
        return Diverged(
            f"training diverged in {steps}: {what} at step {step}; nothing was saved there",
            hint=f"`launcher data show {run} --step {first}` shows a step's text; {back}run "
            f"again with 'data.skip.steps=[{span}]' to leave these out, or under another name with a lower "
            "train.learning_rate",
        )

    def _limit(self) -> float:
        uniform = math.log(self._vocabulary) if self._vocabulary else 0.0
        return max(self._best + ABOVE_BEST, uniform + ABOVE_UNIFORM)
