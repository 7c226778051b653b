"""All ranks agree on the step at which they stop, save or evaluate.

Wishes (a signal to any rank, a request file, a clock that has run out) differ between ranks; acting
on them alone would leave some ranks waiting for others. So every step all ranks reduce their wishes
by maximum over a CPU side group, without waiting, and act on the result one step later: the same
result at the same step everywhere.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask for a safe stop."""


class StopSignals:
    """Notes that a signal asked for a stop; a second SIGINT is honoured at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def install(self) -> None:
        for number in ASKING:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@dataclass(frozen=True, slots=True)
class Wishes:
    """What one rank wants, or what all have agreed on."""

    stop: bool = False
    save: bool = False
    evaluate: bool = False


class Agreement:
    """Wishes in at each step, the agreed ones of the step before out."""

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    def step(self, mine: Wishes) -> Wishes:
        """Put this rank's wishes in; get what all ranks agreed on from those of the step before."""
        agreed = self.settle()
        flags = torch.tensor([mine.stop, mine.save, mine.evaluate], dtype=torch.int32)
        work = None
        if self._group is not None:
            work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flags, work)
        return agreed

    def settle(self) -> Wishes:
        """Wait for the exchange under way, if any, and return what it agreed on."""
        if self._pending is None:
            return Wishes()
        flags, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        stop, save, evaluate = (bool(flag) for flag in flags.tolist())
        return Wishes(stop, save, evaluate)
