"""Attempts whose ranks were started by hand: the journal knows nothing of them, their last words do."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.run import journal
from launcher.run.directory import RunDirectory
from launcher.run.outcome import Evidence, RankEnd, Verdict, decide, first_failure, read_end
from launcher.run.requests import asked_by


@dataclass(frozen=True, slots=True)
class ByHand:
    """One such attempt. `verdict` is None where a rank has no last word: it lives or was killed."""

    number: int
    world_size: int
    ends: tuple[RankEnd, ...]
    verdict: Verdict | None

    @property
    def step(self) -> int | None:
        """The furthest that a rank told of."""
        return max((end.step for end in self.ends), default=None)


def newest_by_hand(directory: RunDirectory) -> ByHand | None:
    """The newest attempt, if it is one; nothing is written."""
    number = directory.next_attempt() - 1
    told = journal.events(directory.journal, "attempt_started")
    if number <= max((each["attempt"] for each in told), default=0):
        return None
    world_size = len(list(directory.logs(number).glob("rank-*.log")))
    found = (read_end(directory.record(number, rank)) for rank in range(world_size))
    ends = tuple(end for end in found if end is not None)
    by_person = asked_by(directory) == "person"
    over = bool(ends) and (len(ends) == world_size or first_failure(ends) is not None)
    verdict = decide(Evidence(world_size, ends, by_person=by_person)) if over else None
    return ByHand(number, world_size, ends, verdict)
