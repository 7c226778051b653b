"""One attempt of a run, from the start of its ranks to what it came to."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass

from launcher.errors import Interrupted
from launcher.run.checkpoints import newest_step
from launcher.run.directory import RunDirectory
from launcher.run.following import LOOK_SECONDS, Following
from launcher.run.launching import Launching
from launcher.run.outcome import Evidence, Facts, RankEnd, Verdict, decide
from launcher.run.requests import ask_to_stop, asked_by, is_overtaken, is_replaced
from launcher.run.saying import warn
from launcher.run.stopping import need_of

POLL_SECONDS = 0.05
START_SECONDS = 2.0
"""Ranks that have not begun to train so long after a wish to stop are ended."""
LAST_SECONDS = 2.0
"""What is kept of a job's time to end ranks that did not stop in it; KillWait comes on top, for a requeue."""
REPLACED = "another supervisor takes over: the scheduler has started this run elsewhere"


class Signals:
    """The signals that came. Their handler only notes them: it may interrupt the writing of a wish."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._passed_on = 0

    def pass_on(self, directory: RunDirectory) -> None:
        """Write down the wish to stop that each signal since the last call is. Raises OSError where that
        cannot be: the next call tries again."""
        while self._passed_on < len(self.received):
            number = self.received[self._passed_on]
            ask_to_stop(directory, "person" if number == signal.SIGINT else "signal")
            self._passed_on += 1


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that is over. `exit_code`: of what started the ranks; None where the supervisor ended it.
    `stop_seconds`: from the first wish to stop until the ranks were gone."""

    number: int
    verdict: Verdict
    ends: tuple[RankEnd, ...]
    step: int
    seconds: float
    exit_code: int | None
    signals: tuple[int, ...] = ()
    stop_seconds: float | None = None


def run_attempt(
    directory: RunDirectory, launching: Launching, number: int, world_size: int, signals: Signals
) -> Ended:
    """One attempt, from start to verdict.

    Raises Interrupted where another supervisor takes over, which writes down how it ended.
    """
    course = _Course(directory, launching, number, world_size, signals)
    while True:
        course.pass_on_wishes()
        if course.is_over():
            break
        if not course.end_ranks_if_due():
            time.sleep(POLL_SECONDS)
    if course.is_replaced():
        raise Interrupted(REPLACED)
    return course.ended()


class _Course:
    """An attempt under way, and what has happened to it so far."""

    def __init__(
        self, directory: RunDirectory, launching: Launching, number: int, world_size: int, signals: Signals
    ) -> None:
        self._begun = time.monotonic()
        self._directory = directory
        self._launching = launching
        self._number = number
        self._world_size = world_size
        self._signals = signals
        self._before = len(signals.received)
        self._ranks = launching.start(number)
        leave_seconds = self._ranks.leave_seconds
        self._following = Following(directory, number, world_size, starter_seconds=leave_seconds)
        self._facts = Facts()
        self._asked: float | None = None
        """When the first wish to stop was seen."""
        self._by_signal = False
        """The ranks were asked so, as no wish could be written."""
        self._exit_code: int | None = None
        """Of what started the ranks, where it was not killed here."""
        self._killed = False
        """What was left of it here."""
        self._by_person = False
        self._at_once = False
        self._outlived = False
        self._replaced = False
        self._overtaken = False
        self._heard = 0
        """Signals, by when the files were last looked at."""
        self._looked = -math.inf

    @property
    def _received(self) -> list[int]:
        return self._signals.received[self._before :]

    def pass_on_wishes(self) -> None:
        """Write down the wishes to stop: of signals, and where the machines are taken, the scheduler's.

        At once where a signal came; else every LOOK_SECONDS, as a shared file system has many to answer.
        """
        now, received = time.monotonic(), len(self._received)
        if received == self._heard and now - self._looked < LOOK_SECONDS:
            return
        self._heard, self._looked = received, now
        self._overtaken = is_overtaken(self._directory, self._number)
        self._facts = self._launching.facts(self._received)
        try:
            self._write_wishes()
        except OSError as error:
            self._ask_by_signal(error)
        self._see_wish()

    def _see_wish(self) -> None:
        by = asked_by(self._directory)
        self._by_person |= by == "person"
        if (by is not None or self._by_signal) and self._asked is None:
            self._asked = time.monotonic()

    def _write_wishes(self) -> None:
        # The other may wait no longer than for the ranks' last words: it is not asked twice.
        replaced = self.is_replaced()
        if not replaced:
            self._signals.pass_on(self._directory)
        taken = (self._asked is None or self._by_signal) and (self._facts.asks_to_stop or replaced)
        if taken and not self._overtaken:
            ask_to_stop(self._directory, "scheduler")

    def _ask_by_signal(self, error: OSError) -> None:
        """Ask the ranks for a safe stop where no wish can be written, on a full disk say."""
        if not self._by_signal:
            self._by_signal = True
            warn(f"{self._directory.stop_request}: {error.strerror}: the ranks are asked to stop by SIGTERM")
        self._following.ask_here()

    def is_replaced(self) -> bool:
        """Whether another supervisor wants the run, or has wanted it since this attempt began."""
        self._replaced = self._replaced or is_replaced(self._directory, self._number)
        return self._replaced

    def is_over(self) -> bool:
        """Whether nothing is left of it here, by now."""
        exit_code = self._ranks.poll() if self._exit_code is None else self._exit_code
        if exit_code is None:
            return False
        if self._killed:
            return True
        self._exit_code = exit_code
        if exit_code == 0 and self._following.awaits_words():
            return False
        if exit_code >= 0 or not self._following.living_here():
            return True
        # What started them was killed: they stop safely by themselves, and nothing may begin beside them.
        self._outlived |= self._asked is None
        return False

    def end_ranks_if_due(self) -> bool:
        """Kill the ranks where nothing more is to come of them, or nobody waits for them any longer; whether
        that was so."""
        followed = self._following.look()
        interrupted = self._received.count(signal.SIGINT) > 1
        if interrupted or self._is_in_vain(trains=followed.trains) or _too_late(self._facts):
            self._at_once = True
        if not self._at_once and not followed.is_over:
            return False
        if followed.hang is not None:
            self._following.collect_stacks()
        if self._exit_code is None:
            self._ranks.end()
        self._following.kill_here()
        self._killed = True
        return True

    def _is_in_vain(self, *, trains: bool) -> bool:
        """Whether ranks that were asked to stop are waited for no longer. Before the first step there is
        nothing to save; on a node that was given up they never come to agree with the others on a step; and
        beside a later attempt they may save nothing."""
        if self._overtaken:
            return True
        if self._asked is None:
            return False
        waited = time.monotonic() - self._asked
        if not trains:
            return waited > START_SECONDS
        plan = self._directory.read_orders().plan
        return self._replaced and waited > need_of(self._directory, plan, self._number).seconds

    def ended(self) -> Ended:
        """What it came to, now that it is over."""
        self._see_wish()  # the ranks see one at once
        last = self._following.read(time.monotonic())
        evidence = Evidence(
            world_size=self._world_size,
            ends=last.ends,
            facts=self._launching.facts(self._received),
            by_person=self._by_person or signal.SIGINT in self._received,
            at_once=self._at_once,
            outlived=self._outlived,
            hang=self._following.hang,
            dead=self._following.dead,
        )
        return Ended(
            self._number,
            decide(evidence),
            last.ends,
            max(last.step, newest_step(self._directory.checkpoints)),
            time.monotonic() - self._begun,
            self._exit_code,
            tuple(self._received),
            None if self._asked is None else time.monotonic() - self._asked,
        )


def _too_late(facts: Facts) -> bool:
    """Whether a stop has taken so long that the supervisor would be killed with the ranks, at the end of the
    job's time: then nobody would ask for its requeue."""
    return facts.time_limit and facts.ends_at is not None and facts.ends_at - time.time() < LAST_SECONDS
