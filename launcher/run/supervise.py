"""One attempt, from start to typed outcome: start the ranks, pass on a wish to stop, read how it ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from launcher.errors import Interrupted, LauncherError, TrainingError
from launcher.run import journal, local
from launcher.run.checkpoints import committed
from launcher.run.directory import RunDirectory, hold, write_text
from launcher.run.outcome import Outcome, RankEnd, first_failure, read_end

TAIL_LINES = 15
"""Lines of launch.log shown when no rank lived long enough to say what went wrong."""


def is_finished(directory: RunDirectory, steps: int | None) -> bool:
    """Whether the last attempt finished a run of `steps` steps and its model is there.

    Who moves the newest checkpoints away goes back to train from an older one.
    """
    ends = [event for event in journal.read(directory.journal) if event["event"] == "attempt_ended"]
    newest = committed(directory.checkpoints)[-1:]
    return bool(
        ends
        and all(checkpoint.step >= ends[-1]["step"] for checkpoint in newest)
        and ends[-1]["outcome"] == Outcome.FINISHED
        and ends[-1]["planned_steps"] == steps
        and directory.model.is_dir()
    )


def supervise(
    directory: RunDirectory, *, world_size: int, steps: int | None, environment: Mapping[str, str]
) -> int:
    """Run one attempt and return the step it ended at. Call it while holding `only_supervisor`.

    Ctrl-C or SIGTERM asks the ranks for a safe stop with a checkpoint; a second one ends them at
    once. Raises Interrupted when stopped so, TrainingError (or the rank's own kind of error) when
    the attempt failed.
    """
    attempt = directory.next_attempt()
    directory.stop_request.unlink(missing_ok=True)
    journal.record(directory.journal, "attempt_started", attempt=attempt, world_size=world_size)
    with _signals_ask(directory) as interrupts:
        process = local.start(directory, attempt, environment)
        while process.poll() is None:
            if len(interrupts) > 1:
                local.end(process)
            time.sleep(0.1)
    ends = [end for rank in range(world_size) if (end := read_end(directory.record(attempt, rank)))]
    outcome = _outcome(ends, world_size)
    step = max((end.step for end in ends), default=0)
    journal.record(
        directory.journal,
        "attempt_ended",
        attempt=attempt,
        outcome=outcome,
        step=step,
        planned_steps=steps,
        exit_code=process.returncode,
        signals=interrupts,
    )
    directory.stop_request.unlink(missing_ok=True)
    if outcome == Outcome.FINISHED:
        return step
    if outcome == Outcome.STOPPED:
        raise Interrupted(
            f"stopped safely at step {step} with a checkpoint", hint="run the same command again to go on"
        )
    if len(interrupts) > 1:
        raise Interrupted(
            "ended at once", hint="run the same command again to go on from the last checkpoint"
        )
    raise _failure(directory, attempt, ends)


def _outcome(ends: list[RankEnd], world_size: int) -> Outcome:
    failure = first_failure(ends)
    if failure is not None:
        return failure.outcome
    if len(ends) < world_size:
        return Outcome.CRASHED
    return Outcome.STOPPED if any(end.outcome == Outcome.STOPPED for end in ends) else Outcome.FINISHED


def _failure(directory: RunDirectory, attempt: int, ends: list[RankEnd]) -> LauncherError:
    first = first_failure(ends)
    if first is None:
        log = directory.launch_log(attempt)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return TrainingError(
            f"a rank was killed or never started; the end of {log}:\n"
            + "\n".join(f"  {line}" for line in lines),
            hint=f"the ranks' own logs are in {directory.logs(attempt)}",
        )
    error = LauncherError if first.exit_code != TrainingError.exit_code else TrainingError
    failure = error(
        f"rank {first.rank}: {first.error}",
        hint=first.hint or f"the traceback is in {directory.log(attempt, first.rank)}",
    )
    failure.exit_code = first.exit_code
    return failure


@contextmanager
def _signals_ask(directory: RunDirectory) -> Iterator[list[int]]:
    """While inside, SIGINT, SIGTERM and SIGHUP write a stop request; yields the signals received so far."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        write_text(directory.stop_request, "asked by a signal to the supervisor\n")

    before = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_supervisor(directory: RunDirectory) -> Iterator[None]:
    """Hold the run, so that two commands never train it at a time, nor one beside ranks left by another."""
    directory.root.mkdir(parents=True, exist_ok=True)
    with hold(directory.lock, directory, "another command"):
        hold(directory.ranks_lock, directory, "ranks whose supervisor is gone").close()
        yield
