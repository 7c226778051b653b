"""Stopping while text is prepared: there is nothing to save, so whoever asks for a stop gets it at once.

What prepares is interrupted where it is, and keeps what it has finished (`data.making`).
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from launcher.errors import Interrupted, LauncherError, TrainingError
from launcher.run import journal
from launcher.run.checkpoints import newest_step
from launcher.run.directory import RunDirectory
from launcher.run.launching import Launching, facts_in_time
from launcher.run.outcome import End, Evidence, Outcome, decide
from launcher.run.requests import asked_by, forget_all_but_persons
from launcher.run.saying import Say
from launcher.run.supervise import PATIENCE, record_run_end
from launcher.run.text import count_finished

POLL_SECONDS = 0.2
UNWIND_SECONDS = 5.0
"""How long what prepares may take to come to an end: then the process ends all the same. Training a
tokenizer, say, is one long call that hears nothing."""

GOES_ON = "the same command goes on with it: what is finished is kept"


@contextmanager
def stoppable(directory: RunDirectory, launching: Launching, say: Say) -> Iterator[None]:
    """While inside, a wish to stop ends the run, which trains nothing yet: a signal that asks for
    it, the file of requests, or whoever lends the machines. A second Ctrl-C ends the process at once.

    Raises Interrupted, and TrainingError where job after job has run out of time before more of the text was
    finished; how the run ended is then in its journal, where it has been written down.
    """
    stopping = _Stopping(directory, launching, say)
    heard = [number for number in launching.asking if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stopping.note) for number in heard}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watching = threading.Thread(target=stopping.watch, args=(reading, frozenset(heard)), daemon=True)
    watching.start()
    try:
        try:
            yield
        except BaseException:  # a library may make its own of the one that the handler raised in it, or none
            if not stopping.is_asked:
                raise
        if stopping.is_asked:
            raise stopping.end() from None
    finally:
        stopping.is_over.set()
        os.write(writing, b"\0")
        watching.join()
        signal.set_wakeup_fd(woken)
        os.close(reading)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopping:
    """Who asked for a stop, and what comes of it."""

    def __init__(self, directory: RunDirectory, launching: Launching, say: Say) -> None:
        self.is_over = threading.Event()
        self.is_asked = False
        self._directory = directory
        self._launching = launching
        self._say = say
        self._received: list[int] = []
        self._ending = threading.Lock()

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The handler of signals: the first one ends what is done."""
        self._received.append(number)
        if not self.is_asked:
            self.is_asked = True
            raise Interrupted("interrupted")

    def watch(self, signals: int, asking: frozenset[int]) -> None:
        """Look for wishes that are no signals, and end a process that does not heed its own: `signals` is
        where their numbers arrive, whatever the main thread is at."""
        came: list[int] = []
        since: float | None = None
        while not self.is_over.is_set():
            if select.select([signals], [], [], POLL_SECONDS)[0]:
                came += [number for number in os.read(signals, 64) if number in asking]
            if since is None and (came or self._is_wished()):
                since = time.monotonic()
                if not came:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            late = since is not None and time.monotonic() - since > UNWIND_SECONDS
            if (late or came.count(signal.SIGINT) > 1) and self._ending.acquire(blocking=False):
                error: LauncherError
                try:
                    error = self._ended(came)
                except LauncherError as failure:  # the queue does not answer, say
                    error = failure
                self._say(error.told)
                os._exit(error.exit_code)

    def end(self) -> LauncherError:
        """What tells of the end, which is written down."""
        self._ending.acquire()  # for good: where the watching thread was first, it ends the process
        return self._ended(self._received)

    def _is_wished(self) -> bool:
        facts = self._launching.facts(self._received)
        return asked_by(self._directory) is not None or facts.asks_to_stop

    def _ended(self, received: Sequence[int]) -> LauncherError:
        directory, facts = self._directory, facts_in_time(self._launching, received)
        by_person = signal.SIGINT in received or asked_by(directory) == "person"
        verdict = decide(Evidence(world_size=1, ends=(), facts=facts, by_person=by_person, at_once=True))
        is_written = directory.orders.is_file()
        why = "stopped" if verdict.outcome is Outcome.STOPPED else verdict.reason
        if is_written and verdict.outcome is Outcome.TIME_LIMIT and self._is_in_vain():
            reason = f"{PATIENCE.attempts} times in a row {why} before more of its text was prepared"
            given_up = TrainingError(
                f"{Outcome.NO_PROGRESS}: {reason}",
                hint="set a longer slurm.time_limit, or prepare the text first: launcher data prepare RUN",
            )
            self._record(End(Outcome.NO_PROGRESS, reason), given_up)
            return given_up
        if is_written and self._launching.hands_over(verdict.outcome, verdict.reason):
            forget_all_but_persons(directory)
            return Interrupted(f"{why} while its text was prepared; queued again", hint=GOES_ON)
        error = Interrupted(f"{why} while its text was prepared", hint=GOES_ON)
        if is_written:
            self._record(End(verdict.outcome, error.message), error)
        directory.stop_request.unlink(missing_ok=True)
        return error

    def _record(self, end: End, error: LauncherError) -> None:
        step = newest_step(self._directory.checkpoints)
        record_run_end(self._directory, end, step, error.exit_code)

    def _is_in_vain(self) -> bool:
        """Write down that the time of a job has run out; whether it has too often with nothing to show."""
        file, finished = self._directory.journal, count_finished(self._directory.read_config())
        before = journal.events(file, "out_of_time_preparing", "ended")[1 - PATIENCE.attempts :]
        journal.note(file, "out_of_time_preparing", finished=finished)
        same = [each for each in before if each.get("finished") == finished]
        return len(same) == PATIENCE.attempts - 1
