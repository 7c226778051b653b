"""The supervisor: one loop that starts the ranks, watches them, and tries again until a typed end.

It keeps nothing to itself. Whatever the next one must know is in the journal and in the files of the ranks,
so it may be killed at any time: ranks whose supervisor is gone stop safely, and the next one goes on.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType

from launcher.errors import Interrupted, LauncherError, TrainingError
from launcher.plan.choose import Plan
from launcher.run import journal
from launcher.run.attempt import POLL_SECONDS, REPLACED, Ended, Signals, run_attempt
from launcher.run.by_hand import newest_by_hand
from launcher.run.checkpoints import committed, newest_step
from launcher.run.directory import RunDirectory
from launcher.run.launching import Launching, facts_in_time
from launcher.run.outcome import (
    EVERY_RANK,
    Attempt,
    End,
    Evidence,
    Outcome,
    Patience,
    Restart,
    Verdict,
    attempt_of,
    decide,
    what_next,
)
from launcher.run.requests import asked_by, forget_all_but_persons, is_replaced
from launcher.run.saying import Say

PATIENCE = Patience()
TAIL_LINES = 15
"""Lines of launch.log shown when no rank lived long enough to say what went wrong."""


def is_finished(directory: RunDirectory, steps: int | None) -> bool:
    """Whether the last attempt finished a run of `steps` steps and its model is there.

    Who moves the newest checkpoints away goes back to train from an older one.
    """
    by_hand = newest_by_hand(directory)
    if by_hand is None:
        told = journal.events(directory.journal, "attempt_ended")[-1:]
    else:
        told = [asdict(end) for end in by_hand.ends if by_hand.verdict is not None]
    newest = committed(directory.checkpoints)[-1:]
    return (
        bool(told)
        and all(checkpoint.step >= end["step"] for checkpoint in newest for end in told)
        and all(end["outcome"] == Outcome.FINISHED for end in told)
        and all(end["planned_steps"] == steps for end in told)
        and directory.model.is_dir()
    )


def supervise(directory: RunDirectory, launching: Launching, say: Say, patience: Patience = PATIENCE) -> int:
    """Run attempts until the run ends, and return the step it finished at. Call it while holding
    `run.holding.only_supervisor`.

    Ctrl-C or another signal that asks for it has the ranks stop safely, with a checkpoint; a second Ctrl-C
    ends them at once. Raises Interrupted when stopped so, when the scheduler starts the run again by itself,
    or when another supervisor takes over, and TrainingError (or the rank's own kind of error) when the run
    failed.
    """
    plan = directory.read_orders().plan
    assert plan.steps is not None
    with _noted(launching.asking) as signals:
        while True:
            if _is_asked(directory, signals):
                _hand_back(directory, launching, signals)
                return _end(directory, End(Outcome.STOPPED, "asked for before it began"), None, say)
            number = _record_start(directory, plan)
            ended = run_attempt(directory, launching, number, plan.batch.world_size, signals)
            event = record_end(directory, ended, planned_steps=plan.steps)
            following = what_next(_history(directory, event), patience)
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
    event = record_end(directory, ended, planned_steps=plan.steps)
    following = what_next(_history(directory, event), PATIENCE)
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


def record_end(
    directory: RunDirectory, ended: Ended, *, planned_steps: int | None, orphaned: bool = False
) -> journal.Event:
    """Write down how an attempt ended, and return that; `orphaned`: its supervisor did not live to."""
    return journal.note(
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
        rank=ended.verdict.rank,
        **({"orphaned": True} if orphaned else {}),
    )


def record_run_end(directory: RunDirectory, end: End, step: int, exit_code: int) -> None:
    """Write down how the run ended, `step` steps far."""
    journal.note(
        directory.journal, "ended", outcome=end.outcome, reason=end.reason, step=step, exit_code=exit_code
    )


def _history(directory: RunDirectory, ended: journal.Event) -> list[Attempt]:
    """The attempts since the run last ended, oldest first. The last one `ended` so: a full disk may not have
    taken it, and the next supervisor then takes it from what the ranks said."""
    events = journal.read(directory.journal)
    found: list[Attempt] = []
    began: dict[int, journal.Event] = {}
    for event in events if ended in events else [*events, ended]:
        if event["event"] == "attempt_started":
            began[event["attempt"]] = event
        elif event["event"] == "attempt_ended":
            found.append(attempt_of(began.get(event["attempt"], {}), event))
        elif event["event"] == "ended":
            found = []
    return found


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
    journal.note(
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
    while time.monotonic() < until and not _is_asked(directory, signals):
        time.sleep(POLL_SECONDS)


def _is_asked(directory: RunDirectory, signals: Signals) -> bool:
    """Whether a stop is wished for while no ranks run: also where a full disk does not take the wish."""
    try:
        signals.pass_on(directory)
    except OSError:
        return True
    return asked_by(directory) is not None


def _hand_back(directory: RunDirectory, launching: Launching, signals: Signals) -> None:
    """Raises Interrupted where the stop is wished for because the scheduler takes the machines, and it starts
    the run again by itself."""
    by_person = signal.SIGINT in signals.received or asked_by(directory) == "person"
    facts = facts_in_time(launching, signals.received)
    verdict = decide(Evidence(world_size=1, ends=(), facts=facts, by_person=by_person, at_once=True))
    if verdict.outcome is not Outcome.STOPPED and launching.hands_over(verdict.outcome, verdict.reason):
        forget_all_but_persons(directory)
        raise Interrupted(f"{verdict.reason} while no ranks ran; queued again")


def _end(directory: RunDirectory, end: End, ended: Ended | None, say: Say) -> int:
    """Write down how the run ended; returns its step or raises what tells of it."""
    step = newest_step(directory.checkpoints) if ended is None else ended.step
    error = None if end.outcome is Outcome.FINISHED else _error(directory, end, ended, step)
    record_run_end(directory, end, step, 0 if error is None else error.exit_code)
    directory.stop_request.unlink(missing_ok=True)
    if error is not None:
        raise error
    if end.reason != EVERY_RANK:
        say(end.reason)
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
    """The failure of the last attempt in the words of the rank that it names, with its own exit code."""
    said = {Outcome.NO_PROGRESS: f"NO_PROGRESS: {end.reason}"}.get(end.outcome)
    logs = f"the ranks' own logs are in {directory.logs(ended.number)}"
    first = next((each for each in ended.ends if each.rank == ended.verdict.rank), None)
    if ended.verdict.outcome is Outcome.HUNG or (first is None and ended.ends):
        return TrainingError(said or f"{end.outcome}: {end.reason}", hint=logs)
    if first is None:
        return TrainingError(f"{said or end.reason}{_tail(directory, ended.number)}", hint=logs)
    error = LauncherError if first.exit_code != TrainingError.exit_code else TrainingError
    found = error(
        said or f"rank {first.rank}: {first.error}",
        hint=first.remedy(directory.log(ended.number, first.rank)),
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
