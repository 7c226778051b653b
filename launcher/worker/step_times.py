"""Where a rank's time goes between two reports, and which rank the others wait for.

Nothing here waits for a device: what a report is about ends with a `Lap`, which is read once the device has
got there. Ranks exchange their times then, as the loss has made them meet anyway.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Self

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.plan.choose import Plan
from launcher.plan.sharding import zero_stage
from launcher.worker.stop import Agreement

NOTABLE = 0.1
"""A rank is named where its own time is so much of the median rank's longer than that."""
OF_A_STEP = 0.01
"""And so much of a step: a rank that waits 20 microseconds for its data where others wait 10 slows nobody."""


@dataclass(frozen=True, slots=True)
class OwnTime:
    """Seconds a step which no other rank can lengthen: waiting for data, and the forward pass."""

    data_wait: float
    forward: float

    @property
    def total(self) -> float:
        return self.data_wait + self.forward


@dataclass(frozen=True, slots=True)
class Slowest:
    """The rank whose own time is the longest, and by how many seconds a step more than the median rank's."""

    rank: int
    lag: float
    data_wait_lag: float


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of this rank between two reports, and each rank's own time in them, by rank.

    `training`: of the device that trains, in `steps` of them, evaluations and saving left out; they ended at
    `ended`, in seconds since the epoch. `host`: the main thread inside steps; data, reports, evaluations and
    saving are outside. On a GPU that is the time it takes to hand out the work, and whatever makes it wait;
    on a CPU it is the work.
    """

    data_wait: float
    host: float
    by_rank: Sequence[OwnTime]
    training: float = 0.0
    steps: int = 1
    ended: float = 0.0

    @property
    def step_seconds(self) -> float:
        return self.training / self.steps


def slowest(by_rank: Sequence[OwnTime], step_seconds: float) -> Slowest | None:
    """The rank that is behind the others; None where they are alike.

    `step_seconds`: how long a step takes. Of an even number of ranks the lower median counts.
    """
    usual = median_low(each.total for each in by_rank)
    rank = max(range(len(by_rank)), key=lambda rank: by_rank[rank].total)
    lag = by_rank[rank].total - usual
    if lag <= max(NOTABLE * usual, OF_A_STEP * step_seconds):
        return None
    usual_wait = median_low(each.data_wait for each in by_rank)
    return Slowest(rank, lag, by_rank[rank].data_wait - usual_wait)


class Moment(ABC):
    """When whatever trains gets to where this is made."""

    @abstractmethod
    def since(self, earlier: Self) -> float:
        """Seconds from an `earlier` moment of the same kind."""


class HostMoment(Moment):
    """Now: the host does the work itself."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def since(self, earlier: HostMoment) -> float:
        return self._at - earlier._at


class StreamMoment(Moment):
    """When the current CUDA stream has done what it was given up to here. Known only once it has."""

    def __init__(self) -> None:
        self._event = stream_event()
        self._event.record()

    def since(self, earlier: StreamMoment) -> float:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000


class Stopwatch(ABC):
    """Seconds spent inside `running`."""

    @abstractmethod
    @contextmanager
    def running(self) -> Iterator[None]: ...

    @abstractmethod
    def lap(self) -> Callable[[], float]:
        """What gives the seconds since the last lap, once the device has got here."""


class HostStopwatch(Stopwatch):
    """The calling thread's time."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def lap(self) -> Callable[[], float]:
        seconds, self._seconds = self._seconds, 0.0
        return lambda: seconds


class StreamStopwatch(Stopwatch):
    """The current CUDA stream's time, taken up as the GPU gets through it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        begin, end = self._spare.pop() if self._spare else (stream_event(), stream_event())
        begin.record()
        yield
        end.record()
        self._open.append((begin, end))
        self._take_up()

    def lap(self) -> Callable[[], float]:
        seconds, self._seconds = self._seconds, 0.0
        still_open, self._open = self._open, deque()
        return lambda: seconds + sum(begin.elapsed_time(end) / 1000 for begin, end in still_open)

    def _take_up(self) -> None:
        while self._open and self._open[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._open.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
            self._spare.append((begin, end))


def stream_event() -> torch.cuda.Event:
    """A moment in a CUDA stream that can be told from others in milliseconds."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class TimedIterator(Iterator[Any]):
    """An iterator whose `next` is timed."""

    def __init__(self, inner: Iterator[Any], stopwatch: Stopwatch) -> None:
        self._inner = inner
        self._stopwatch = stopwatch

    def __next__(self) -> Any:
        with self._stopwatch.running():
            return next(self._inner)


@dataclass(frozen=True, slots=True)
class Lap:
    """What `Spent` is made of, as far as it is known before the device has got to the end of it."""

    began: Moment
    ended: Moment
    aside: Sequence[tuple[Moment, Moment]]
    data_wait: Callable[[], float]
    forward: Callable[[], float]
    host: float
    steps: int
    at: float

    def training(self) -> float:
        return self.ended.since(self.began) - sum(back.since(left) for left, back in self.aside)


class StepTimes(TrainerCallback):
    """Times this rank's steps. A callback of every rank: at each report all exchange their own times."""

    def __init__(self, plan: Plan, agreement: Agreement) -> None:
        self._agreement = agreement
        # Gathering parameters, a sharded forward pass waits for other ranks.
        self._forward_is_own = plan.strategy != "fsdp" and zero_stage(plan.strategy) != 3
        self._on_cuda = plan.device == "cuda"
        self._start()

    def _start(self) -> None:
        self.data_wait: Stopwatch = HostStopwatch()
        self.forward: Stopwatch = StreamStopwatch() if self._on_cuda else HostStopwatch()
        self._host = 0.0
        self._steps = 0
        self._step_began = time.perf_counter()
        self._began = self._now()
        self._left: Moment | None = self._began  # until its first step training pauses
        self._aside: list[tuple[Moment, Moment]] = []
        self.spent = Spent(0.0, 0.0, [OwnTime(0.0, 0.0)])

    def _now(self) -> Moment:
        return StreamMoment() if self._on_cuda else HostMoment()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._host += time.perf_counter() - self._step_began
        self._steps += 1

    def go_on(self) -> None:
        """Training goes on: a step's micro-batches are asked for, which is waited for like any other's."""
        if self._left is not None:
            self._aside.append((self._left, self._now()))
            self._left = None

    def leave(self) -> None:
        """Training pauses here until it goes on, for an evaluation or a save."""
        self._left = self._left or self._now()

    def lap(self) -> Lap:
        """What a report of the steps so far is about, up to here or to where training paused. The next one
        begins anew."""
        began, self._began = self._began, self._left or self._now()
        aside, self._aside = self._aside, []
        steps, self._steps = max(self._steps, 1), 0
        host, self._host = self._host, 0.0
        waits = self.data_wait.lap(), self.forward.lap()
        return Lap(began, self._began, aside, *waits, host=host, steps=steps, at=time.time())

    def read(self, lap: Lap, *, together: bool) -> None:
        """Take in a lap whose end the device has reached. `together`: with the other ranks, who wait."""
        data_wait = lap.data_wait()
        own = (data_wait / lap.steps, lap.forward() / lap.steps if self._forward_is_own else 0.0)
        by_rank = [OwnTime(*each) for each in (self._agreement.gather(own) if together else [own])]
        self.spent = Spent(data_wait, lap.host, by_rank, lap.training(), lap.steps, lap.at)
