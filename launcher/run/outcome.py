"""How an attempt ended, and what to do next: decided from recorded facts, never from an exit code alone.

`decide` and `what_next` are pure. The facts are the ranks' last words, who asked for a stop, what the
heartbeats showed, and what the scheduler says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path


class Outcome(StrEnum):
    """The typed ways an attempt, or a whole run, can end."""

    FINISHED = "FINISHED"
    """Every rank trained to the end, and the model is there."""
    STOPPED = "STOPPED"
    """A person asked for it."""
    PREEMPTED = "PREEMPTED"
    """The scheduler took the nodes for someone else."""
    TIME_LIMIT = "TIME_LIMIT"
    """The scheduler's time for the job ran out."""
    NODE_FAILED = "NODE_FAILED"
    HUNG = "HUNG"
    """A rank stopped getting on, and the supervisor ended the attempt."""
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DIVERGED = "DIVERGED"
    """The loss or the weights became NaN, infinite, or exploded."""
    CRASHED = "CRASHED"
    NO_PROGRESS = "NO_PROGRESS"
    """Of a run, never of an attempt: it crashed again and again without a new step."""


FAILURES = frozenset({Outcome.CRASHED, Outcome.OUT_OF_MEMORY, Outcome.DIVERGED})
"""What a rank may say of itself when it fails."""
UNLIMITED = frozenset({Outcome.PREEMPTED, Outcome.TIME_LIMIT, Outcome.NODE_FAILED})
"""Not the run's doing: it restarts however often they come."""
FINAL = frozenset({Outcome.FINISHED, Outcome.STOPPED, Outcome.OUT_OF_MEMORY, Outcome.DIVERGED})
"""Another attempt would change nothing, or is not wanted."""
EVERY_RANK = "every rank finished"
"""Why an attempt finished of which there is nothing more to tell."""


@dataclass(frozen=True, slots=True)
class RankEnd:
    """One rank's last word. `time` is seconds since the epoch; `error` is None unless it failed.

    Of one that finished: of how many `planned_steps`, and where there is something to tell of that, `reason`.
    `retry`: whether another attempt may fare better. It may not where launcher itself refused, with a reason.
    """

    rank: int
    outcome: Outcome
    step: int
    time: float
    error: str | None = None
    hint: str | None = None
    exit_code: int = 1
    retry: bool = True
    planned_steps: int | None = None
    reason: str | None = None

    def remedy(self, log: Path) -> str:
        """What to do about its failure, or else where more is told of it: `log` is the rank's."""
        return self.hint or f"{'the traceback' if self.retry else 'its log'} is in {log}"

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")


def read_end(file: Path) -> RankEnd | None:
    """The last word in `file`; None where the rank was killed before it could say one, or in it, and where
    the file system does not say for once."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return RankEnd(**{**said, "outcome": Outcome(said["outcome"])})


def first_failure(ends: Sequence[RankEnd]) -> RankEnd | None:
    """The failure that came first: the others are usually only its echo."""
    failed = [end for end in ends if end.outcome in FAILURES]
    return min(failed, key=lambda end: end.time, default=None)


@dataclass(frozen=True, slots=True)
class Facts:
    """What whoever lends the machines knows of an attempt; on one's own machine mostly nothing.

    `preempted` and `time_limit` become true before the ranks are taken where there is notice: the supervisor
    then asks them for a safe stop. `ends_at`: when the machines are taken, in seconds since the epoch.
    `out_of_memory`: the kernel or the scheduler killed a process for its memory. `cancelled`: a person ended
    the job by the scheduler's own means.
    """

    preempted: bool = False
    time_limit: bool = False
    cancelled: bool = False
    out_of_memory: bool = False
    failed_nodes: tuple[str, ...] = ()
    ends_at: float | None = None

    @property
    def asks_to_stop(self) -> bool:
        return self.preempted or self.time_limit or self.cancelled


@dataclass(frozen=True, slots=True)
class Hang:
    """Ranks that no longer got on: for how many seconds, since which step, and how that was seen.

    `time` is when it was noticed, in seconds since the epoch.
    """

    ranks: tuple[int, ...]
    step: int
    seconds: float
    how: str
    time: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of an attempt that is over.

    `by_person`: a stop was asked for by a person's own request or Ctrl-C. `at_once`: the supervisor killed
    the ranks because nobody wanted to wait, or nothing was there to be saved. `dead`: ranks seen to be gone
    without a last word. `outlived`: nobody asked for a stop, and ranks outlived what had started them.
    `orphaned`: its supervisor did not live to see it end.
    """

    world_size: int
    ends: tuple[RankEnd, ...]
    facts: Facts = Facts()
    by_person: bool = False
    at_once: bool = False
    hang: Hang | None = None
    dead: tuple[int, ...] = ()
    outlived: bool = False
    orphaned: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt came to, and why, in words. `retry`: whether another one may fare better. `rank`: the
    one that `reason` names, the first of several."""

    outcome: Outcome
    reason: str
    retry: bool = True
    rank: int | None = None


def decide(evidence: Evidence) -> Verdict:
    """What the attempt came to."""
    first = first_failure(evidence.ends)
    if len(evidence.ends) == evidence.world_size and first is None:
        return _ended_well(evidence)
    if first is not None and (first.outcome is not Outcome.CRASHED or not first.retry):
        return Verdict(first.outcome, f"rank {first.rank}: {first.error}", first.retry, first.rank)
    taken = _taken(evidence.facts)
    if evidence.at_once and (evidence.by_person or taken is None):
        return Verdict(Outcome.STOPPED, "the ranks were ended at once")
    if taken is not None:
        return taken
    if evidence.facts.out_of_memory and len(evidence.ends) < evidence.world_size:
        killed = f"{_were_killed(evidence.dead)} for the memory of this machine"
        return Verdict(Outcome.OUT_OF_MEMORY, killed, rank=_first(evidence.dead))
    hang = evidence.hang
    if hang is not None and (first is None or first.time >= hang.time):
        return Verdict(Outcome.HUNG, hang.how, rank=_first(hang.ranks))
    if evidence.dead:
        return Verdict(Outcome.CRASHED, _were_killed(evidence.dead), rank=_first(evidence.dead))
    if first is not None:
        return Verdict(Outcome.CRASHED, f"rank {first.rank}: {first.error}", rank=first.rank)
    if evidence.orphaned:
        return Verdict(Outcome.CRASHED, "its supervisor was killed, and ranks with it")
    return Verdict(Outcome.CRASHED, "a rank was killed or never started")


def _ended_well(evidence: Evidence) -> Verdict:
    """Every rank came to an end of its own accord."""
    if all(end.outcome is Outcome.FINISHED for end in evidence.ends):
        told = next((end.reason for end in evidence.ends if end.reason is not None), EVERY_RANK)
        return Verdict(Outcome.FINISHED, told)
    if evidence.by_person:
        return Verdict(Outcome.STOPPED, "a person asked for it")
    if (taken := _taken(evidence.facts)) is not None:
        return taken
    if evidence.outlived:
        return Verdict(
            Outcome.CRASHED, "what started the ranks was killed; they stopped safely by themselves"
        )
    if evidence.orphaned:
        return Verdict(Outcome.CRASHED, "its supervisor was killed; the ranks stopped safely by themselves")
    return Verdict(Outcome.STOPPED, "a signal asked for it")


def _taken(facts: Facts) -> Verdict | None:
    """What the attempt came to where the scheduler ended it."""
    if facts.cancelled:
        return Verdict(Outcome.STOPPED, "the job was cancelled")
    if facts.failed_nodes:
        return Verdict(Outcome.NODE_FAILED, f"{', '.join(facts.failed_nodes)} failed")
    if facts.preempted:
        return Verdict(Outcome.PREEMPTED, "the scheduler took the nodes back")
    if facts.time_limit:
        return Verdict(Outcome.TIME_LIMIT, "the job's time ran out")
    return None


def named(ranks: Sequence[int]) -> str:
    """Ranks, as a sentence begins with them."""
    if not ranks:
        return "a rank"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _first(ranks: Sequence[int]) -> int | None:
    return ranks[0] if ranks else None


def _were_killed(ranks: Sequence[int]) -> str:
    return f"{named(ranks)} {'was' if len(ranks) < 2 else 'were'} killed"


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the journal says of an attempt: the step it `began` from, and the furthest `step` it saw."""

    outcome: Outcome
    began: int
    step: int
    retry: bool = True
    orphaned: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a run that crashes or hangs is tried again without a new step, and how long it waits.

    The first pause is `shortest` seconds, each one after it `factor` times as long, `longest` at most. A new
    step begins the count anew.
    """

    attempts: int = 3
    shortest: float = 2.0
    factor: float = 5.0
    longest: float = 600.0

    def pause(self, fruitless: int) -> float:
        """Seconds to wait after so many attempts without a new step."""
        return float(min(self.longest, self.shortest * self.factor**fruitless))


@dataclass(frozen=True, slots=True)
class Restart:
    """Try again in so many seconds."""

    seconds: float
    why: str


@dataclass(frozen=True, slots=True)
class End:
    """The run ends here."""

    outcome: Outcome
    reason: str


def what_next(history: Sequence[Attempt], patience: Patience) -> Restart | End:
    """Whether to try again after `history`, the attempts since the run last ended, oldest first.

    Preemption and node failure restart without limit. A crash, a hang or the end of a job's time restarts
    while each attempt or so brings a new step; after `patience.attempts` in a row without one: NO_PROGRESS.
    """
    last = history[-1]
    if last.outcome in FINAL or not last.retry:
        return End(last.outcome, last.reason)
    count = fruitless(history)
    if last.outcome in UNLIMITED and (last.outcome is not Outcome.TIME_LIMIT or count < patience.attempts):
        return Restart(0.0, last.reason)
    if count >= patience.attempts:
        return End(
            Outcome.NO_PROGRESS, f"{count} attempts in a row brought no new step; the last: {last.reason}"
        )
    return Restart(patience.pause(count), last.reason)


def fruitless(history: Sequence[Attempt]) -> int:
    """How many crashes, hangs and ends of a job's time there were since an attempt last went beyond all.

    One whose supervisor was killed does not count: whoever started the run again wanted it tried.
    """
    furthest = count = 0
    for attempt in history:
        furthest = max(furthest, attempt.began)
        if attempt.step > furthest:
            count, furthest = 0, attempt.step
        elif attempt.outcome not in UNLIMITED - {Outcome.TIME_LIMIT} and not attempt.orphaned:
            count += 1
    return count


def attempt_of(began: dict[str, object], ended: dict[str, object]) -> Attempt:
    """The attempt that two lines of the journal tell of: `attempt_started` and `attempt_ended`."""
    known = {field.name for field in fields(Attempt)} - {"began", "outcome"}
    told = {name: value for name, value in ended.items() if name in known}
    return Attempt(
        outcome=Outcome(str(ended["outcome"])),
        began=int(str(began.get("from_step", 0))),
        **told,  # type: ignore[arg-type]
    )
