"""The supervisor: one loop that starts the ranks, watches them, and tries again until a typed end.

It keeps nothing to itself. Whatever the next one must know is in the journal and in the files of the ranks,
so it may be killed at any time: ranks whose supervisor is gone stop safely, and the next one goes on.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from launcher.errors import Interrupted, LauncherError, TrainingError
from launcher.plan.choose import Plan
from launcher.run import journal
from launcher.run.checkpoints import committed, newest_step
from launcher.run.directory import RunDirectory
from launcher.run.following import Following
from launcher.run.launching import Launching
from launcher.run.outcome import (
    Attempt,
    End,
    Evidence,
    Facts,
    Outcome,
    Patience,
    RankEnd,
    Restart,
    Verdict,
    attempt_of,
    decide,
    first_failure,
    what_next,
)
from launcher.run.requests import (
    ask_to_stop,
    asked_by,
    forget_all_but_persons,
    is_overtaken,
    is_replaced,
)
from launcher.run.stopping import need_of

Say = Callable[[str], None]
POLL_SECONDS = 0.05
START_SECONDS = 2.0
"""Ranks that have not begun to train so long after a wish to stop are ended."""
LAST_SECONDS = 2.0
"""What is kept of a job's time to end ranks that did not stop in it; KillWait comes on top, for a requeue."""
PATIENCE = Patience()
TAIL_LINES = 15
"""Lines of launch.log shown when no rank lived long enough to say what went wrong."""
REPLACED = "another supervisor takes over: the scheduler has started this run elsewhere"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Each asks for a safe stop."""


def is_finished(directory: RunDirectory, steps: int | None) -> bool:
    """Whether the last attempt finished a run of `steps` steps and its model is there.

    Who moves the newest checkpoints away goes back to train from an older one.
    """
    ends = journal.events(directory.journal, "attempt_ended")
    newest = committed(directory.checkpoints)[-1:]
    return bool(
        ends
        and all(checkpoint.step >= ends[-1]["step"] for checkpoint in newest)
        and ends[-1]["outcome"] == Outcome.FINISHED
        and ends[-1]["planned_steps"] == steps
        and directory.model.is_dir()
    )


def supervise(
    directory: RunDirectory,
    launching: Launching,
    say: Say,
    patience: Patience = PATIENCE,
    asking: Sequence[signal.Signals] = SIGNALS,
) -> int:
    """Run attempts until the run ends, and return the step it finished at. Call it while holding
    `run.holding.only_supervisor`.

    Ctrl-C or another of `asking` asks the ranks for a safe stop with a checkpoint; a second Ctrl-C ends them
    at once. Raises Interrupted when stopped so, when the scheduler starts the run again by itself, or when
    another supervisor takes over, and TrainingError (or the rank's own kind of error) when the run failed.
    """
    plan = directory.read_orders().plan
    assert plan.steps is not None
    with _noted(asking) as signals:
        while True:
            signals.pass_on(directory)
            if asked_by(directory) is not None:
                return _end(directory, End(Outcome.STOPPED, "asked for before it began"), None, say)
            number = _record_start(directory, plan)
            ended = _run(directory, launching, number, plan.batch.world_size, signals)
            record_end(directory, ended, planned_steps=plan.steps)
            following = what_next(history(directory), patience)
            if isinstance(following, End):
                return _end(directory, following, ended, say)
            _restart(directory, launching, ended, following, signals, say)
            if is_replaced(directory, number):
                raise Interrupted(REPLACED)


def end_without_ranks(directory: RunDirectory, launching: Launching, reason: str, say: Say) -> None:
    """Write down an attempt that the end of the job's time came before, and hand the run back.

    Raises Interrupted where the scheduler starts the run again, and TrainingError where attempt after attempt
    has come to nothing.
    """
    plan = directory.read_orders().plan
    number = _record_start(directory, plan)
    directory.logs(number).mkdir(parents=True)
    verdict = Verdict(Outcome.TIME_LIMIT, reason)
    ended = Ended(number, verdict, (), newest_step(directory.checkpoints), 0.0, None)
    record_end(directory, ended, planned_steps=plan.steps)
    following = what_next(history(directory), PATIENCE)
    if isinstance(following, End):
        _end(directory, following, ended, say)
    else:
        _restart(directory, launching, ended, following, Signals(), say)


def _record_start(directory: RunDirectory, plan: Plan) -> int:
    """Write down that another attempt begins; returns its number."""
    number = directory.next_attempt()
    journal.record(
        directory.journal,
        "attempt_started",
        attempt=number,
        world_size=plan.batch.world_size,
        nodes=plan.nodes,
        from_step=newest_step(directory.checkpoints),
    )
    return number


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


def record_end(
    directory: RunDirectory, ended: Ended, *, planned_steps: int | None, orphaned: bool = False
) -> None:
    """Write down how an attempt ended; `orphaned`: its supervisor did not live to."""
    first = first_failure(ended.ends)
    journal.record(
        directory.journal,
        "attempt_ended",
        attempt=ended.number,
        outcome=ended.verdict.outcome,
        reason=ended.verdict.reason,
        retry=ended.verdict.retry,
        step=ended.step,
        planned_steps=planned_steps,
        seconds=round(ended.seconds, 1),
        stop_seconds=None if ended.stop_seconds is None else round(ended.stop_seconds, 2),
        exit_code=ended.exit_code,
        signals=list(ended.signals),
        rank=None if first is None else first.rank,
        **({"orphaned": True} if orphaned else {}),
    )


def record_run_end(directory: RunDirectory, end: End, step: int, exit_code: int) -> None:
    """Write down how the run ended, `step` steps far."""
    journal.record(
        directory.journal, "ended", outcome=end.outcome, reason=end.reason, step=step, exit_code=exit_code
    )


def history(directory: RunDirectory) -> list[Attempt]:
    """The attempts since the run last ended, oldest first."""
    found: list[Attempt] = []
    began: dict[int, dict[str, Any]] = {}
    for event in journal.read(directory.journal):
        if event["event"] == "attempt_started":
            began[event["attempt"]] = event
        elif event["event"] == "attempt_ended":
            found.append(attempt_of(began.get(event["attempt"], {}), event))
        elif event["event"] == "ended":
            found = []
    return found


def _run(
    directory: RunDirectory, launching: Launching, number: int, world_size: int, signals: Signals
) -> Ended:
    """One attempt, from start to verdict.

    Raises Interrupted where another supervisor takes over, which writes down how it ended.
    """
    begun = time.monotonic()
    before = len(signals.received)
    ranks = launching.start(number)
    following = Following(directory, number, world_size, starter_seconds=ranks.leave_seconds)
    asked: float | None = None
    by_person = at_once = killed = starter_killed = outlived = replaced = False
    while True:
        # The other may wait no longer than for the ranks' last words: it is not asked twice.
        replaced = replaced or is_replaced(directory, number)
        facts = launching.facts(signals.received[before:])
        taken = asked is None and (facts.asks_to_stop or replaced)
        _ask(directory, number, signals, taken=taken, replaced=replaced)
        by = asked_by(directory)
        by_person |= by == "person"
        if by is not None and asked is None:
            asked = time.monotonic()
        if (exit_code := ranks.poll()) is not None:
            if exit_code >= 0 or killed or not following.living_here():
                break
            # What started them was killed: they stop safely by themselves, and nothing may begin beside them.
            outlived |= asked is None
        followed = following.look()
        in_vain = _in_vain(directory, number, asked, trains=followed.trains, replaced=replaced)
        interrupted = signals.received[before:].count(signal.SIGINT) > 1
        if interrupted or in_vain or _too_late(facts):
            at_once = True
        if at_once or followed.is_over:
            if followed.hang is not None:
                following.collect_stacks()
            if exit_code is None:
                ranks.end()
                starter_killed = True
            following.kill_here()
            killed = True
            continue
        time.sleep(POLL_SECONDS)
    if replaced or is_replaced(directory, number):
        raise Interrupted(REPLACED)
    last = following.read(time.monotonic())
    evidence = Evidence(
        world_size=world_size,
        ends=last.ends,
        facts=launching.facts(signals.received[before:]),
        by_person=by_person or signal.SIGINT in signals.received[before:],
        at_once=at_once,
        outlived=outlived,
        hang=following.hang,
        dead=following.dead,
    )
    return Ended(
        number,
        decide(evidence),
        last.ends,
        max(last.step, newest_step(directory.checkpoints)),
        time.monotonic() - begun,
        None if starter_killed else exit_code,
        tuple(signals.received[before:]),
        None if asked is None else time.monotonic() - asked,
    )


def _ask(directory: RunDirectory, number: int, signals: Signals, *, taken: bool, replaced: bool) -> None:
    """Write down the wishes to stop: of signals, and where the machines are `taken`, the scheduler's."""
    if not replaced:
        signals.pass_on(directory)
    if taken and not is_overtaken(directory, number):
        ask_to_stop(directory, "scheduler")


def _too_late(facts: Facts) -> bool:
    """Whether a stop has taken so long that the supervisor would be killed with the ranks, at the end of the
    job's time: then nobody would ask for its requeue."""
    return facts.time_limit and facts.ends_at is not None and facts.ends_at - time.time() < LAST_SECONDS


def _in_vain(
    directory: RunDirectory, number: int, asked: float | None, *, trains: bool, replaced: bool
) -> bool:
    """Whether ranks that were asked to stop are waited for no longer. Before the first step there is nothing
    to save; on a node that was given up they never come to agree with the others on a step; and beside a
    later attempt they may save nothing."""
    if is_overtaken(directory, number):
        return True
    if asked is None:
        return False
    waited = time.monotonic() - asked
    if not trains:
        return waited > START_SECONDS
    return replaced and waited > need_of(directory, directory.read_orders().plan, number).seconds


def _restart(
    directory: RunDirectory,
    launching: Launching,
    ended: Ended,
    restart: Restart,
    signals: Signals,
    say: Say,
) -> None:
    """Say why, and wait; a wish to stop ends the wait. Raises Interrupted if the scheduler takes over."""
    outcome, why = ended.verdict.outcome, restart.why
    journal.record(
        directory.journal, "restart", attempt=directory.next_attempt(), in_seconds=restart.seconds, why=why
    )
    if launching.hands_over(outcome, why):
        forget_all_but_persons(directory)
        raise Interrupted(
            f"attempt {ended.number} ended at step {ended.step}: {outcome}: {why}; queued again"
        )
    if asked_by(directory) == "scheduler":
        directory.stop_request.unlink(missing_ok=True)
    say(
        f"attempt {ended.number} ended at step {ended.step}: {outcome}: {why}; "
        f"attempt {directory.next_attempt()} begins in {restart.seconds:.0f} s"
    )
    until = time.monotonic() + restart.seconds
    while time.monotonic() < until and asked_by(directory) is None:
        time.sleep(POLL_SECONDS)
        signals.pass_on(directory)


def _end(directory: RunDirectory, end: End, ended: Ended | None, say: Say) -> int:
    """Write down how the run ended; returns its step or raises what tells of it."""
    step = newest_step(directory.checkpoints) if ended is None else ended.step
    error = None if end.outcome is Outcome.FINISHED else _error(directory, end, ended, step)
    record_run_end(directory, end, step, 0 if error is None else error.exit_code)
    directory.stop_request.unlink(missing_ok=True)
    if error is not None:
        raise error
    return step


def _error(directory: RunDirectory, end: End, ended: Ended | None, step: int) -> LauncherError:
    """What tells a person of an end that is not FINISHED."""
    again = "run the same command again to go on"
    if end.outcome is Outcome.STOPPED:
        saved = newest_step(directory.checkpoints)
        if ended is None or saved < step or not ended.ends:
            where = f"from step {saved}" if saved else "from the beginning"
            return Interrupted("ended at once" if ended else "stopped", hint=f"{again} {where}")
        took = "" if ended.stop_seconds is None else f", {ended.stop_seconds:.1f} s after it was asked"
        return Interrupted(f"stopped safely at step {step} with a checkpoint{took}", hint=again)
    assert ended is not None
    return failure(directory, end, ended)


def failure(directory: RunDirectory, end: End, ended: Ended) -> LauncherError:
    """The first failure of the last attempt in its own words, with its own exit code."""
    said = {Outcome.NO_PROGRESS: f"NO_PROGRESS: {end.reason}"}.get(end.outcome)
    logs = f"the ranks' own logs are in {directory.logs(ended.number)}"
    first = first_failure(ended.ends)
    if ended.verdict.outcome is Outcome.HUNG or (first is None and ended.ends):
        return TrainingError(said or f"{end.outcome}: {end.reason}", hint=logs)
    if first is None:
        return TrainingError(f"{said or end.reason}{_tail(directory, ended.number)}", hint=logs)
    error = LauncherError if first.exit_code != TrainingError.exit_code else TrainingError
    found = error(
        said or f"rank {first.rank}: {first.error}",
        hint=first.hint or f"the traceback is in {directory.log(ended.number, first.rank)}",
    )
    found.exit_code = first.exit_code
    return found


def _tail(directory: RunDirectory, attempt: int) -> str:
    """The end of what the starter of the ranks said, where it said anything."""
    log = directory.launch_log(attempt)
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return f"; the end of {log}:\n" + "\n".join(f"  {line}" for line in lines)


class Signals:
    """The signals that came. Their handler only notes them: it may interrupt the writing of a wish."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._passed_on = 0

    def pass_on(self, directory: RunDirectory) -> None:
        """Write down the wish to stop that each signal since the last call is."""
        while self._passed_on < len(self.received):
            number = self.received[self._passed_on]
            self._passed_on += 1
            ask_to_stop(directory, "person" if number == signal.SIGINT else "signal")


@contextmanager
def _noted(asking: Sequence[signal.Signals]) -> Iterator[Signals]:
    """While inside, these signals are noted; not one that is ignored, as nohup has SIGHUP be."""
    signals = Signals()

    def note(number: int, _frame: FrameType | None) -> None:
        signals.received.append(number)

    heard = [number for number in asking if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
