"""How long a safe stop takes: from the wish until every rank is gone and its checkpoint committed."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.choose import Plan
from launcher.run import journal
from launcher.run.directory import RunDirectory
from launcher.run.heartbeat import FILE_SPEED, read_beat

STEPS = 3
"""Steps until the ranks have stopped: the one under way, the next where that was too far for them to agree in
it, and one for luck."""
SLACK = 1.5
"""A checkpoint may take so many times as long as the longest lately."""
MARGIN = 10.0
"""Seconds for noticing the wish, and for the processes to end."""


@dataclass(frozen=True, slots=True)
class Need:
    """Seconds that a safe stop takes, and whether that was measured in this run."""

    seconds: float
    measured: bool


def need_of(directory: RunDirectory, plan: Plan, attempt: int | None = None) -> Need:
    """What a stop of this run takes, by its own last steps and checkpoints, else by the plan.

    `attempt`: the one that is under way; without it the newest.
    """
    number = directory.next_attempt() - 1 if attempt is None else attempt
    beats = [read_beat(directory.heartbeat(number, rank)) for rank in range(plan.batch.world_size)]
    steps = [beat.step_seconds for beat in beats if beat is not None and beat.step_seconds is not None]
    saves = [beat.save_seconds for beat in beats if beat is not None and beat.save_seconds is not None]
    saves += [event["save_seconds"] for event in journal.read(directory.journal) if event.get("save_seconds")]
    step = max(steps, default=_predicted_step(plan))
    save = max(saves) if saves else (plan.checkpoint_bytes or 0) / FILE_SPEED
    return Need(STEPS * step + SLACK * save + MARGIN, bool(steps and saves))


def _predicted_step(plan: Plan) -> float:
    return 0.0 if plan.forecast is None else sum(plan.forecast.seconds.values())
