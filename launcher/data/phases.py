"""Which samples are in step s of a run whose batch size or bans changed on the way: pure, nothing stored.

A run is cut into phases. In a phase, each step takes the next `batch_size` samples of the order that are
not banned. A new phase begins where a run goes on with another batch size or other bans, at the sample after
the last one taken. So whatever changes, every sample that is not banned is taken once, and none twice; the
world size, micro-batch and accumulation never enter into it.

Steps are counted from 0 here: step s is the one taken after s steps are done. People count from 1.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 16

Samples: TypeAlias = NDArray[np.int64]
Ranges: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Skip:
    """What is not trained on any more: the samples that steps held, and documents by name.

    `steps`: a step as people count it, from 1, to ranges `[start, stop)` of the samples it held when it
    was named.
    """

    steps: Mapping[int, Ranges] = field(default_factory=dict)
    documents: tuple[str, ...] = ()


Banned: TypeAlias = Callable[[Skip, int], Samples]
"""`int64[n]`, ascending, each once: the samples below a bound that a Skip bans."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of `batch_size` samples without those of `skip`, from `first_step` and `first_sample` on."""

    first_step: int
    first_sample: int
    batch_size: int
    skip: Skip

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        steps = {str(step): [list(each) for each in held] for step, held in self.skip.steps.items()}
        return {
            "first_step": self.first_step,
            "first_sample": self.first_sample,
            "batch_size": self.batch_size,
            "skip": {"steps": steps, "documents": list(self.skip.documents)},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Phase:
        """The phase that `as_dict` wrote. Raises TypeError or KeyError on anything else."""
        skip = fields["skip"]
        steps = {int(step): tuple((a, b) for a, b in held) for step, held in skip["steps"].items()}
        return cls(**{**fields, "skip": Skip(steps, tuple(skip["documents"]))})


class Phases:
    """The samples of every step of a run. `banned` tells what a phase's `skip` means."""

    def __init__(self, phases: Sequence[Phase], banned: Banned) -> None:
        self.phases = tuple(phases)
        self._banned = banned
        self._free = [_Free(phase, banned) for phase in phases]

    def samples_of_step(self, step: int) -> Samples:
        """`int64[batch_size]`, ascending: the samples of one step."""
        phase, free = self._at(step)
        first = (step - phase.first_step) * phase.batch_size
        return free.nth(np.arange(first, first + phase.batch_size))

    def samples(self, from_step: int, to_step: int) -> Iterator[Samples]:
        """The samples of steps `[from_step, to_step)`, in order, in arrays of at most CHUNK."""
        starts = [phase.first_step for phase in self.phases if from_step < phase.first_step < to_step]
        for start, stop in pairwise([from_step, *starts, to_step]):
            phase, free = self._at(start)
            first, last = ((step - phase.first_step) * phase.batch_size for step in (start, stop))
            for at in range(first, last, CHUNK):
                yield free.nth(np.arange(at, min(at + CHUNK, last)))

    def consumed(self, step: int) -> int:
        """How many samples are in the steps before `step`."""
        starts = [min(phase.first_step, step) for phase in self.phases] + [step]
        sizes = [phase.batch_size for phase in self.phases]
        return sum((b - a) * size for (a, b), size in zip(pairwise(starts), sizes, strict=True))

    def position(self, step: int) -> int:
        """The sample after the last one before `step`: where a phase begins that begins there."""
        return int(self.samples_of_step(step - 1)[-1]) + 1 if step else 0

    def before(self, step: int) -> Phases:
        """The phases of the steps before `step`, which may then go on otherwise."""
        return Phases([each for each in self.phases if each.first_step < step], self._banned)

    def going_on(
        self,
        step: int,
        *,
        batch_size: int,
        steps: Collection[int],
        documents: Collection[str],
        in_force: Phases | None = None,
    ) -> Phases:
        """The phases of a run that goes on from `step` with this batch size and these bans.

        `steps`, counted from 1, are banned as they are in `in_force`, the phases by which the run was trained
        last: what step 120 held does not change when it, or a step before it, is banned.
        """
        past = self.before(step)
        last_trained = in_force or past
        if not last_trained.phases:
            last_trained = Phases([Phase(0, 0, batch_size, Skip())], self._banned)
        skip = Skip({n: last_trained.held(n) for n in sorted(set(steps))}, tuple(sorted(set(documents))))
        if past.phases and (past.phases[-1].batch_size, past.phases[-1].skip) == (batch_size, skip):
            return past
        begun = Phase(step, past.position(step), batch_size, skip)
        return Phases([*past.phases, begun], self._banned)

    def held(self, step: int) -> Ranges:
        """What step `step`, counted from 1, stands for where it is banned: ranges of samples."""
        known = self.phases[-1].skip.steps.get(step)
        return known if known is not None else _ranges(self.samples_of_step(step - 1))

    def _at(self, step: int) -> tuple[Phase, _Free]:
        if step < 0:
            raise IndexError("steps are counted from 0")
        number = bisect_right([phase.first_step for phase in self.phases], step) - 1
        return self.phases[number], self._free[number]


class _Free:
    """The samples of one phase that are not banned, by their number in it.

    Of the banned samples `b[0] < b[1] < ...`, sample b[i] has `b[i] - first_sample - i` free ones before it:
    the n-th free one has as many banned ones before it as there are such counts up to n. They are found as
    far as the run has asked, twice as far each time.
    """

    def __init__(self, phase: Phase, banned: Banned) -> None:
        self._phase = phase
        self._banned = banned
        self._reach = phase.first_sample
        self._before = np.empty(0, dtype=np.int64)

    def nth(self, numbers: Samples) -> Samples:
        """`int64[n]`: the samples of these numbers, from 0, ascending."""
        first = self._phase.first_sample
        if self._phase.skip == Skip():
            return first + numbers
        while True:
            found = first + numbers + np.searchsorted(self._before, numbers, side="right")
            if found[-1] < self._reach:
                return found
            self._look_ahead(first + 2 * (int(found[-1]) + 1 - first))

    def _look_ahead(self, reach: int) -> None:
        banned = self._banned(self._phase.skip, reach)
        banned = banned[banned >= self._phase.first_sample]
        self._before = banned - self._phase.first_sample - np.arange(len(banned))
        self._reach = reach


def phases_text(phases: Sequence[Phase]) -> str:
    """Phases as JSON."""
    return json.dumps([phase.as_dict() for phase in phases], indent=1) + "\n"


def read_phases(file: Path) -> list[Phase]:
    """The phases whose text is in `file`; none where it is not there."""
    return [Phase.from_dict(each) for each in json.loads(file.read_text())] if file.is_file() else []


def _ranges(samples: Samples) -> Ranges:
    """Ascending samples as ranges `[start, stop)`."""
    gaps = np.flatnonzero(np.diff(samples) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(samples, gaps))
