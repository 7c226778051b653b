"""Who trains a run: one supervisor at a time, and none beside ranks that another has left behind."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from launcher.errors import RunDirectoryError
from launcher.run import journal
from launcher.run.attempt import Ended
from launcher.run.directory import RunDirectory, hold, take_back, write_text
from launcher.run.following import Following
from launcher.run.launching import Launching
from launcher.run.outcome import Evidence, decide
from launcher.run.requests import ask_to_stop
from launcher.run.saying import Say
from launcher.run.supervise import record_end

HANDOVER_SECONDS = 600.0
"""How long a supervisor whose job was given to this one may take to see it, on a node that may be cut off."""
ORPHANS_SECONDS = 600.0
"""How long ranks whose supervisor was killed may take to stop safely."""
SEEN_SECONDS = 5.0
"""In this time a rank of another machine that lives is seen to: it beats once a second."""
POLL_SECONDS = 0.5


@contextmanager
def only_supervisor(directory: RunDirectory, launching: Launching, say: Say) -> Iterator[None]:
    """Hold the run, so that two commands never train it at a time.

    Where who runs here `takes_over`, another supervisor, on a node that the scheduler no longer reaches, is
    asked to leave and waited for.

    Ranks whose supervisor was killed are waited for, and how their attempt ended is written down. Raises
    RunDirectoryError where another command, or ranks started by hand, train it. A folder that did not exist
    before, and that nothing was written to, is taken back.
    """
    made = [folder for folder in (directory.root, *directory.root.parents) if not folder.exists()]
    directory.root.mkdir(parents=True, exist_ok=True)
    takes_over = launching.takes_over
    with _take_over(directory, say) if takes_over else hold(directory.lock, directory, "another command"):
        directory.handover.unlink(missing_ok=True)
        left = _open_attempt(directory)
        if left is None:
            hold(directory.ranks_lock, directory, "ranks that were started by hand").close()
        else:
            following = Following(directory, left["attempt"], left["world_size"])
            _wait_for(following, directory, say, takes_over=takes_over)
            _close(following, directory, left, launching)
        try:
            yield
        finally:
            if made:
                take_back(directory, made)


def _take_over(directory: RunDirectory, say: Say) -> TextIO:
    said, until = False, time.monotonic() + HANDOVER_SECONDS
    with _no_longer_wanted(directory):
        while True:
            try:
                return hold(directory.lock, directory, "another command")
            except RunDirectoryError:
                if time.monotonic() > until:
                    raise
            if not said:
                said = True
                say("another supervisor still has this run: asking it to leave, and waiting for it")
            write_text(directory.handover, "")
            time.sleep(POLL_SECONDS)


@contextmanager
def _no_longer_wanted(directory: RunDirectory) -> Iterator[None]:
    """Whoever waits inside for another to leave wants the run no longer when that has come to an end: else
    the other would leave it to nobody."""
    try:
        yield
    finally:
        directory.handover.unlink(missing_ok=True)


def _open_attempt(directory: RunDirectory) -> dict[str, Any] | None:
    """The attempt that began and, by the journal, never ended."""
    told = journal.events(directory.journal, "attempt_started", "attempt_ended")
    return told[-1] if told and told[-1]["event"] == "attempt_started" else None


def _wait_for(following: Following, directory: RunDirectory, say: Say, *, takes_over: bool) -> None:
    """Return once no rank of the attempt is left. Those that do not get on are killed.

    A lock may hold on one machine only, so ranks of others are looked at for a while. Where they live, who
    `takes_over` asks them to stop, and their supervisor to leave.
    """
    begun = time.monotonic()
    said, until = False, begun + ORPHANS_SECONDS
    with _no_longer_wanted(directory):
        while True:
            followed = following.look()
            left, elsewhere = following.living_here(), following.living_elsewhere()
            if takes_over and elsewhere:
                ask_to_stop(directory, "scheduler")
                write_text(directory.handover, "")
            busy = _busy(directory, elsewhere)
            late = time.monotonic() > until
            if busy is None:
                looked = time.monotonic() - begun > SEEN_SECONDS or not following.without_word_elsewhere()
                if not left and looked:
                    return
            elif late and not left:
                raise busy  # they are on other machines
            if not said:
                said = True
                say(
                    f"attempt {following.number} lost its supervisor; waiting for its ranks to save and "
                    f"stop, {ORPHANS_SECONDS:.0f} s at most"
                )
            if left and (followed.is_over or late):
                why = followed.hang.how if followed.hang else "late" if late else "the others are gone"
                say(f"killing what is left of attempt {following.number}: {why}")
                following.kill_here()
            time.sleep(POLL_SECONDS)


def _busy(directory: RunDirectory, elsewhere: Collection[int]) -> RunDirectoryError | None:
    """Who still trains the run: ranks that live `elsewhere`, or that hold its lock; None: nobody is seen."""
    if elsewhere:
        return RunDirectoryError(
            f"{directory.root} is being trained by ranks on another machine: {sorted(elsewhere)}",
            hint="wait for them to end, or have them stop: launcher stop, or scancel",
        )
    try:
        hold(directory.ranks_lock, directory, "ranks whose supervisor is gone").close()
    except RunDirectoryError as error:
        return error
    return None


def _close(following: Following, directory: RunDirectory, left: dict[str, Any], launching: Launching) -> None:
    """Write down how an attempt ended whose supervisor did not live to see it."""
    number, world_size = left["attempt"], left["world_size"]
    last = following.read(time.monotonic())
    evidence = Evidence(
        world_size=world_size,
        ends=last.ends,
        facts=launching.past(number),
        dead=following.dead,
        orphaned=True,
    )
    steps = directory.read_orders().plan.steps
    assert steps is not None
    ended = Ended(number, decide(evidence), last.ends, last.step, time.time() - left["time"], None)
    record_end(directory, ended, planned_steps=steps, orphaned=True)
