"""The learning rate of a run whose batch size changes on the way.

A schedule is a curve over the length of training, and follows the measure that the length is given in. In
steps it is stock. In tokens or epochs it goes by the samples trained, so that where steps become larger, and
so fewer, the learning rate goes on from where it was rather than jump. Warmup is in steps either way. As long
as all steps are alike the two are one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from launcher.data.phases import Phases


def follow_samples(scheduler: LRScheduler, phases: Phases, *, warmup: int, steps: int) -> None:
    """Have a stock schedule of `steps` steps take its value at the place that the samples have come to."""
    assert isinstance(scheduler, LambdaLR)

    def at_place(curve: Callable[[Any], float]) -> Callable[[int], float]:
        # A function has no state, so none comes back from a checkpoint: the phases are those of this attempt.
        return lambda step: curve(place(phases, step, warmup=warmup, steps=steps))

    scheduler.lr_lambdas = [at_place(curve) for curve in scheduler.lr_lambdas]


def take_up(scheduler: LRScheduler) -> None:
    """Set the rate of the step to come by the schedule as it is now: the one that was saved is of a run that
    may have been shorter, whose rate had come to nothing."""
    assert isinstance(scheduler, LambdaLR)
    rates = [
        base * curve(scheduler.last_epoch)
        for base, curve in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def place(phases: Phases, step: int, *, warmup: int, steps: int) -> float:
    """The step of a run of equal steps at which as large a part of what follows warmup would be done.

    Exactly `step` where all steps are alike.
    """
    if step <= warmup:
        return step
    done, whole = (phases.consumed(end) - phases.consumed(warmup) for end in (step, steps))
    return warmup + (steps - warmup) * done / whole
