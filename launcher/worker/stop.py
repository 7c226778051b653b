"""All ranks agree on the step at which they stop, save or evaluate.

Wishes (a signal to any rank, a request file, a clock that has run out) differ between ranks; acting
on them alone would leave some ranks waiting for others. So in every step all ranks reduce their wishes
by maximum over a CPU side group, without waiting, and act on the result where the step ends: the same
result at the same step everywhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
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
        self._parent = os.getppid()

    @property
    def ask_to_stop(self) -> bool:
        """Whether a signal came, or whoever started this rank is gone and nobody watches it any more."""
        return self.received is not None or os.getppid() != self._parent

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
    give_up: bool = False
    """Training has diverged."""

    def flags(self) -> tuple[bool, ...]:
        return self.stop, self.save, self.evaluate, self.give_up


class Agreement:
    """In each step: propose, go on with the step, then settle what was proposed and act on it."""

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    def propose(self, mine: Wishes) -> None:
        """Put this rank's wishes in, without waiting for the others'. Call `settle` before the next."""
        flags = torch.tensor(mine.flags(), dtype=torch.int32)
        work = None
        if self._group is not None:
            work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flags, work)

    def settle(self) -> Wishes:
        """What all ranks agreed on from their last proposals; waits for them. Nothing if there are none."""
        if self._pending is None:
            return Wishes()
        flags, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return Wishes(*map(bool, flags.tolist()))

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank. Waits for all of them; what was proposed stays as it is."""
        if self._group is None:
            return mine
        flag = torch.tensor([mine], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def gather(self, mine: Sequence[float]) -> list[list[float]]:
        """Each rank's numbers, by rank; all give as many. Waits for all; proposals stay as they are."""
        if self._group is None:
            return [list(mine)]
        numbers = torch.tensor(mine, dtype=torch.float64)
        found = [torch.empty_like(numbers) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, numbers, group=self._group)
        return [each.tolist() for each in found]
