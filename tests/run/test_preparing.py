"""A wish to stop while text is prepared, by signal, by file and by whoever lends the machines.

With a whole command: tests/test_survival.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import Interrupted, LauncherError, MachineError, RunDirectoryError
from launcher.run import journal
from launcher.run.directory import RunDirectory, hold, write_text
from launcher.run.holding import only_supervisor
from launcher.run.outcome import Facts, Outcome
from launcher.run.preparing import stoppable
from launcher.run.requests import ask_to_stop
from tests.conftest import small_run, write_json
from tests.run.machines import Machines


def prepare(directory: RunDirectory, lender: Machines, ask: Callable[[], object]) -> None:
    """Something long, in the middle of which somebody asks for a stop."""
    asking = threading.Timer(0.3, ask)
    with stoppable(directory, lender, print):
        asking.start()
        time.sleep(60)


def stopped(directory: RunDirectory, lender: Machines, ask: Callable[[], object]) -> Interrupted:
    """What preparing ends with where somebody asks for a stop in the middle of it."""
    before = [signal.getsignal(number) for number in lender.asking]
    with pytest.raises(Interrupted) as caught:
        prepare(directory, lender, ask)
    assert [signal.getsignal(number) for number in lender.asking] == before
    assert caught.value.exit_code == 130
    assert not directory.stop_request.exists()
    return caught.value


def ends(directory: RunDirectory) -> list[tuple[str, int]]:
    return [(each["outcome"], each["exit_code"]) for each in journal.events(directory.journal, "ended")]


@pytest.mark.parametrize("number", Machines.asking)
def test_each_signal_ends_preparing_and_the_run_with_it(
    directory: RunDirectory, number: signal.Signals
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # a shell may have had it ignored
    try:
        error = stopped(directory, Machines(), lambda: os.kill(os.getpid(), number))
    finally:
        signal.signal(number, before)
    assert error.message == "stopped while its text was prepared"
    assert "the same command goes on" in (error.hint or "")
    assert ends(directory) == [("STOPPED", 130)]


@pytest.mark.parametrize("by", ["person", "signal"])
def test_a_request_is_heard_while_text_is_prepared(directory: RunDirectory, by: str) -> None:
    asked = by == "person"
    stopped(directory, Machines(), lambda: ask_to_stop(directory, "person" if asked else "signal"))
    assert ends(directory) == [("STOPPED", 130)]


def test_what_a_scheduler_takes_is_queued_again_and_else_told(directory: RunDirectory) -> None:
    lender = Machines(requeues=True)

    def take() -> None:
        lender.known = Facts(preempted=True)

    error = stopped(directory, lender, take)
    assert error.message.endswith("while its text was prepared; queued again")
    assert lender.handed == [Outcome.PREEMPTED]
    assert ends(directory) == [], "the next job goes on"
    lender.known, lender.requeues = Facts(), False
    stopped(directory, lender, take)
    assert ends(directory) == [("PREEMPTED", 130)]


def test_a_job_whose_time_never_suffices_for_more_of_the_text_is_given_up(directory: RunDirectory) -> None:
    cache = directory.root / "stores"
    run = small_run()
    write_json(directory.config, {**run, "data": {**run["data"], "cache_dir": str(cache)}})
    lender = Machines(requeues=True)

    def end() -> LauncherError:
        lender.known = Facts()
        with pytest.raises(LauncherError) as caught:
            prepare(directory, lender, lambda: setattr(lender, "known", Facts(time_limit=True)))
        return caught.value

    assert [end().exit_code for _ in range(2)] == [130, 130]
    write_text(cache / "a" / "units" / "00000.json", "")
    assert [end().exit_code for _ in range(2)] == [130, 130], "another piece was finished"
    error = end()
    assert error.message.startswith("NO_PROGRESS: 3 times in a row the job's time ran out")
    assert lender.handed == [Outcome.TIME_LIMIT] * 4
    assert ends(directory) == [("NO_PROGRESS", 1)]
    assert end().exit_code == 130, "handed in again"


def test_who_takes_the_machines_may_tell_of_it_after_the_signal(directory: RunDirectory) -> None:
    lender = Machines(requeues=True)
    lender.told_seconds = 20.0

    def take() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        lender.known = Facts(preempted=True)

    with pytest.raises(Interrupted, match="queued again"):
        prepare(directory, lender, take)


def test_nothing_is_written_for_a_run_that_is_not_there_yet(tmp_path: Path) -> None:
    directory, lender = RunDirectory(tmp_path / "runs" / "new"), Machines()
    with only_supervisor(directory, lender, print):
        with pytest.raises(RunDirectoryError, match="is being trained by another command"):
            hold(directory.lock, directory, "another command")
        stopped(directory, lender, lambda: ask_to_stop(directory, "person"))
    assert not (tmp_path / "runs").exists()
    with only_supervisor(directory, lender, print):
        directory.config.write_text("name: new\n")
    assert directory.config.exists()


def test_a_lock_that_was_taken_away_meanwhile_keeps_nobody_out(directory: RunDirectory) -> None:
    first = hold(directory.lock, directory, "us")

    def take_away() -> None:
        directory.lock.unlink()
        first.close()

    waits = threading.Timer(0.05, take_away)
    waits.start()
    second = hold(directory.lock, directory, "us")
    assert os.path.samestat(directory.lock.stat(), os.fstat(second.fileno()))
    second.close()
    waits.join()


def test_a_wish_that_what_prepares_takes_for_a_fault_of_its_own_is_heard(directory: RunDirectory) -> None:
    def deny() -> None:
        with stoppable(directory, Machines(), print), contextlib.suppress(Exception):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)

    with pytest.raises(Interrupted, match="stopped while"):
        deny()
    assert ends(directory) == [("STOPPED", 130)]


DEAF = """
import ctypes, functools, os, signal, sys
from pathlib import Path
from launcher.run import preparing
from launcher.run.directory import RunDirectory
from launcher.run.local import Local
from launcher.errors import MachineError
from launcher.run.outcome import Facts
preparing.UNWIND_SECONDS = float(sys.argv[2])

class Unanswered(Local):
    def facts(self, signals):
        return Facts(preempted=True)
    def hands_over(self, outcome, why):
        raise MachineError("slurmctld does not answer")

lender = Unanswered if sys.argv[3:] else Local
directory = RunDirectory(Path(sys.argv[1]))
never, _ = os.pipe()
say = functools.partial(print, file=sys.stderr, flush=True)
with preparing.stoppable(directory, lender(directory, {}), say):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.siginterrupt(number, False)
    print("in it", flush=True)
    ctypes.CDLL(None).read(never, ctypes.create_string_buffer(1), 1)
"""
"""A call that lets other threads run, and no handler of a signal: as training a tokenizer is."""


@pytest.mark.parametrize(("patience", "signals"), [("0.5", [signal.SIGTERM]), ("60", [signal.SIGINT] * 2)])
def test_what_hears_nothing_is_ended_too_at_once_with_a_second_ctrl_c(
    directory: RunDirectory, patience: str, signals: list[signal.Signals]
) -> None:
    command = [sys.executable, "-c", DEAF, str(directory.root), patience]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in it\n"
        try:
            for number in signals:
                time.sleep(0.5)  # until it is in that call
                process.send_signal(number)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.startswith("stopped while its text was prepared\n  hint: the same command goes on")
    assert ends(directory) == [("STOPPED", 130)]


def test_what_hears_nothing_is_ended_though_the_queue_does_not_answer(directory: RunDirectory) -> None:
    command = [sys.executable, "-c", DEAF, str(directory.root), "0.5", "unanswered"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == MachineError.exit_code
    assert "slurmctld does not answer" in done.stderr
