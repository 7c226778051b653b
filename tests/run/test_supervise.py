"""The loop, over ranks that are plain scripts: what it makes of their words, signals and silences.

Attempts of real ranks: tests/test_survival.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from launcher.errors import Interrupted, LauncherError, RunDirectoryError, TrainingError
from launcher.run import checkpoints as ledger
from launcher.run import journal
from launcher.run.attempt import LAST_SECONDS
from launcher.run.directory import RunDirectory, hold, write_text
from launcher.run.heartbeat import read_beat
from launcher.run.holding import only_supervisor
from launcher.run.outcome import Facts, Outcome, Patience, read_end
from launcher.run.processes import lives
from launcher.run.requests import ask_to_stop, asked_by
from launcher.run.supervise import is_finished, supervise
from tests.conftest import lacks
from tests.run.machines import Machines

F, S, C, M = Outcome.FINISHED, Outcome.STOPPED, Outcome.CRASHED, Outcome.OUT_OF_MEMORY
QUICK = Patience(attempts=2, shortest=0.01, factor=2)
PRELUDE = """
import os, pathlib, sys, time
from launcher.run.directory import RunDirectory
from launcher.run.heartbeat import Beat, write_beat
from launcher.run.outcome import Outcome, RankEnd
directory, attempt = RunDirectory(pathlib.Path(sys.argv[1])), int(sys.argv[2])
directory.logs(attempt).mkdir(parents=True)

def beat(rank, step, quiet=0.0, phase="training", **more):
    beat = Beat(rank, os.uname().nodename, os.getpid(), phase, step, 0.0, time.time(), quiet, 60.0, **more)
    write_beat(directory.heartbeat(attempt, rank), beat)

def say(rank, outcome, step, error=None, **more):
    end = RankEnd(rank, Outcome(outcome), step, time.time(), error, **more)
    end.write(directory.record(attempt, rank))

def until_asked():
    while not directory.stop_request.exists():
        time.sleep(0.01)

def outlive_starter(*ranks):
    if os.fork():
        time.sleep(1.5)
        os.kill(os.getpid(), 9)
    starter = os.getppid()
    for rank in ranks:
        beat(rank, 5)
    while os.getppid() == starter:
        time.sleep(0.05)
"""


class Scripted(Machines):
    """Ranks that do what a script says, one script for each attempt, the last one again and again."""

    def __init__(
        self,
        directory: RunDirectory,
        *scripts: str,
        leave_seconds: float = 0.0,
        requeues: bool = False,
        takes_over: bool = False,
    ) -> None:
        super().__init__(requeues=requeues)
        self._directory = directory
        self._scripts = scripts
        self._leave_seconds = leave_seconds
        self.takes_over = takes_over
        self.attempts = 0

    def start(self, attempt: int) -> ScriptedRanks:
        script = self._scripts[min(self.attempts, len(self._scripts) - 1)]
        self.attempts += 1
        command = [sys.executable, "-c", PRELUDE + script, str(self._directory.root), str(attempt)]
        command.append("launcher.worker")  # by which a rank is told from any other process
        return ScriptedRanks(subprocess.Popen(command), self._leave_seconds)


class ScriptedRanks:
    def __init__(self, process: subprocess.Popen[bytes], leave_seconds: float) -> None:
        self.leave_seconds = leave_seconds
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def events(directory: RunDirectory, name: str) -> list[dict[str, Any]]:
    return journal.events(directory.journal, name)


def end_of(directory: RunDirectory, launching: Scripted) -> LauncherError:
    """What a run that does not finish ends with."""
    with pytest.raises(LauncherError) as caught:
        supervise(directory, launching, lambda text: None, QUICK)
    return caught.value


@pytest.fixture
def later() -> Iterator[Callable[[Callable[[], bool], Callable[[], object]], None]]:
    """Do something, in another thread, as soon as something holds."""
    threads: list[threading.Thread] = []

    def do(holds: Callable[[], bool], what: Callable[[], object]) -> None:
        def wait() -> None:
            while not holds():
                time.sleep(0.01)
            what()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield do
    for thread in threads:
        thread.join(timeout=20)


def test_it_tries_again_while_there_are_new_steps_and_then_says_why_it_gives_up(
    directory: RunDirectory,
) -> None:
    said: list[str] = []
    launching = Scripted(
        directory,
        'say(1, "CRASHED", 3, "OSError: gone"); time.sleep(0.1); say(0, "CRASHED", 3, "its echo")',
        'say(1, "CRASHED", 4, "OSError: gone")',
        'say(0, "CRASHED", 4, "OSError: gone again")',
    )
    with pytest.raises(TrainingError) as caught:
        supervise(directory, launching, said.append, QUICK)
    assert caught.value.message.startswith("NO_PROGRESS: 2 attempts in a row brought no new step")
    assert "OSError: gone again" in caught.value.message
    assert str(directory.log(4, 0)) in (caught.value.hint or "")
    assert [event["step"] for event in events(directory, "attempt_ended")] == [3, 4, 4, 4]
    assert {event["outcome"] for event in events(directory, "attempt_ended")} == {"CRASHED"}
    assert [event["in_seconds"] for event in events(directory, "restart")] == [0.01, 0.01, 0.02]
    (end,) = events(directory, "ended")
    assert (end["outcome"], end["exit_code"], end["step"]) == ("NO_PROGRESS", 1, 4)
    assert len(said) == 3
    assert "rank 1: OSError: gone" in said[0]
    # Whoever starts it again has all chances anew.
    end_of(directory, launching)
    assert len(events(directory, "attempt_ended")) == 4 + 3


def test_a_checkpoint_is_progress_though_ranks_that_were_killed_told_of_no_step(
    directory: RunDirectory,
) -> None:
    """A heartbeat is up to a second old, and a short step's checkpoint is newer."""
    words = """
from launcher.run import checkpoints as ledger
beat(0, 0), beat(1, 0)
step = 10 * attempt
ledger.commit(ledger.begin(directory.checkpoints, step), step=step, samples=1, world_size=2, created=0.0)
os._exit(9)
"""
    launching = Scripted(directory, words, words, words, 'say(0, "FINISHED", 40); say(1, "FINISHED", 40)')
    assert supervise(directory, launching, lambda text: None, QUICK) == 40
    assert [event["step"] for event in events(directory, "attempt_ended")] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("word", "code", "outcome"),
    [
        ('"CRASHED", 0, "data.train: gone", hint="put it back", exit_code=2, retry=False', 2, C),
        ('"OUT_OF_MEMORY", 4, "it held much", hint="train.micro_batch=1"', 1, M),
        ('"DIVERGED", 4, "the loss is nan", hint="data.skip.steps"', 1, Outcome.DIVERGED),
    ],
)
def test_what_another_attempt_would_meet_again_ends_at_once_with_its_own_words(
    directory: RunDirectory, word: str, code: int, outcome: Outcome
) -> None:
    launching = Scripted(directory, f"say(1, {word})")
    error = end_of(directory, launching)
    assert launching.attempts == 1
    assert error.exit_code == code
    assert f"rank 1: {word.split(chr(34))[3]}" == error.message
    assert error.hint == word.split('hint="')[1].split('"')[0]
    assert events(directory, "ended")[0]["outcome"] == outcome


def test_where_no_rank_lived_to_say_it_the_end_of_the_launch_log_is_shown(directory: RunDirectory) -> None:
    log = 'directory.launch_log(attempt).write_bytes(b"\\n".join(b"line %d \\xff" % n for n in range(100)))'
    error = end_of(directory, Scripted(directory, log))
    assert "killed or never started" in error.message
    assert "line 99" in error.message
    assert "line 10 " not in error.message


@pytest.mark.parametrize(
    ("rank", "starter", "leave_seconds", "code"), [(0, 60, 0.0, None), (0, 1, 60.0, 0), (3, 0.5, 2.0, 0)]
)
def test_what_started_the_ranks_is_ended_once_all_have_left_or_given_time_to_end(
    directory: RunDirectory, rank: float, starter: float, leave_seconds: float, code: int | None
) -> None:
    words = f"""
for rank in range(2):
    if not os.fork():
        beat(rank, 20)
        say(rank, "FINISHED", 20)
        time.sleep({rank})
        os._exit(0)
os.wait(), os.wait()
time.sleep({starter})
"""
    launching = Scripted(directory, words, leave_seconds=leave_seconds)
    begun = time.monotonic()
    assert supervise(directory, launching, lambda text: None, QUICK) == 20
    assert time.monotonic() - begun < 30
    (ended,) = events(directory, "attempt_ended")
    assert (ended["outcome"], ended["exit_code"]) == ("FINISHED", code)


def test_a_shared_file_system_is_asked_twice_a_second(directory: RunDirectory) -> None:
    launching = Scripted(
        directory, 'beat(0, 2); time.sleep(1); say(0, "FINISHED", 20); say(1, "FINISHED", 20)'
    )
    with patch("launcher.run.attempt.asked_by", wraps=asked_by) as looked:
        assert supervise(directory, launching, lambda text: None, QUICK) == 20
    assert looked.call_count < 10


def test_a_last_word_that_a_network_file_system_shows_late_is_waited_for(directory: RunDirectory) -> None:
    words = """
os.uname = lambda: type("There", (), {"nodename": "n9"})
beat(0, 20), beat(1, 20)
say(0, "FINISHED", 20)
time.sleep(1)
if not os.fork():
    time.sleep(1.5)
    say(1, "FINISHED", 20)
"""
    launching = Scripted(directory, words)
    assert supervise(directory, launching, lambda text: None, QUICK) == 20
    assert launching.attempts == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_asks_for_a_safe_stop(
    directory: RunDirectory, later: Callable[..., None], number: int
) -> None:
    words = 'beat(0, 2); until_asked(); say(0, "STOPPED", 7); say(1, "STOPPED", 7)'
    later(directory.heartbeat(1, 0).exists, lambda: os.kill(os.getpid(), number))
    ledger.commit(ledger.begin(directory.checkpoints, 7), step=7, samples=56, world_size=2, created=0.0)
    error = end_of(directory, Scripted(directory, words))
    assert isinstance(error, Interrupted)
    assert error.exit_code == 130
    assert "stopped safely at step 7 with a checkpoint, " in error.message
    (ended,) = events(directory, "attempt_ended")
    assert (ended["outcome"], ended["signals"]) == ("STOPPED", [number])
    assert ended["stop_seconds"] < 10
    assert not directory.stop_request.exists()


def test_a_second_ctrl_c_ends_the_ranks_at_once(directory: RunDirectory, later: Callable[..., None]) -> None:
    later(directory.heartbeat(1, 0).exists, lambda: os.kill(os.getpid(), signal.SIGINT))
    later(directory.stop_request.exists, lambda: os.kill(os.getpid(), signal.SIGINT))
    error = end_of(directory, Scripted(directory, "beat(0, 2); time.sleep(60)"))
    assert (error.message, error.exit_code) == ("ended at once", 130)


def test_under_nohup_a_terminal_that_closes_stops_nothing(
    directory: RunDirectory, later: Callable[..., None]
) -> None:
    words = (
        "beat(0, 2); time.sleep(1); "
        'end = "STOPPED" if directory.stop_request.exists() else "FINISHED"; say(0, end, 20); say(1, end, 20)'
    )
    later(directory.heartbeat(1, 0).exists, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert supervise(directory, Scripted(directory, words), lambda text: None, QUICK) == 20
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_come_while_a_wish_is_written_are_heard(
    directory: RunDirectory, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    to_disk, more = os.fsync, [signal.SIGINT, signal.SIGINT]

    def interrupted(descriptor: int) -> None:
        to_disk(descriptor)
        if more and any(directory.stop_request.parent.glob(".stop.*")):
            os.kill(os.getpid(), more.pop())

    monkeypatch.setattr(os, "fsync", interrupted)
    later(directory.heartbeat(1, 0).exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    error = end_of(directory, Scripted(directory, "beat(0, 2); time.sleep(60)"))
    assert (error.message, error.exit_code) == ("ended at once", 130)


def test_ranks_that_outlive_what_started_them_are_waited_for_and_started_again(
    directory: RunDirectory,
) -> None:
    words = 'outlive_starter(0, 1); time.sleep(1); say(0, "STOPPED", 6); say(1, "STOPPED", 6)'
    end_of(directory, Scripted(directory, words, 'say(1, "OUT_OF_MEMORY", 6, "full")'))
    ended, other = events(directory, "attempt_ended")
    assert (ended["outcome"], ended["step"], ended["exit_code"]) == ("CRASHED", 6, -9)
    assert "what started the ranks was killed" in ended["reason"]
    assert other["outcome"] == "OUT_OF_MEMORY"


def test_ranks_without_what_started_them_are_gone_once_they_have_been_ended(
    directory: RunDirectory, later: Callable[..., None]
) -> None:
    words = """
outlive_starter(0)
slow_to_end = bytearray(b"x") * (1 << 29)
(directory.root / "alone").touch()
time.sleep(60)
"""
    later((directory.root / "alone").exists, lambda: os.kill(os.getpid(), signal.SIGINT))
    later(directory.stop_request.exists, lambda: os.kill(os.getpid(), signal.SIGINT))
    error = end_of(directory, Scripted(directory, words))
    rank = read_beat(directory.heartbeat(1, 0))
    assert rank is not None
    assert not psutil.pid_exists(rank.pid) or not lives(psutil.Process(rank.pid))
    assert error.message == "ended at once"
    assert events(directory, "attempt_ended")[0]["exit_code"] == -9


def test_a_wish_is_honoured_at_once_while_there_is_nothing_to_save(
    directory: RunDirectory, later: Callable[..., None]
) -> None:
    later(directory.heartbeat(1, 0).exists, lambda: write_text(directory.stop_request, "please"))
    error = end_of(directory, Scripted(directory, 'beat(0, 0, phase="starting"); time.sleep(60)'))
    assert isinstance(error, Interrupted)
    assert events(directory, "attempt_ended")[0]["outcome"] == "STOPPED"


def test_a_wish_is_honoured_between_two_attempts(directory: RunDirectory, later: Callable[..., None]) -> None:
    launching = Scripted(directory, 'say(0, "CRASHED", 1, "x")')
    later(lambda: bool(events(directory, "restart")), lambda: write_text(directory.stop_request, "please"))
    with pytest.raises(Interrupted):
        supervise(directory, launching, lambda text: None, Patience(shortest=1e6, longest=1e6))
    assert launching.attempts == 1


def test_machines_that_are_taken_between_two_attempts_are_handed_back(
    directory: RunDirectory, later: Callable[..., None]
) -> None:
    launching = Scripted(directory, 'say(0, "CRASHED", 1, "x")')
    launching.told_seconds = 20.0

    def take() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # the scheduler is asked first
        launching.requeues, launching.known = True, Facts(preempted=True)

    later(lambda: bool(events(directory, "restart")), take)
    with pytest.raises(Interrupted, match="took the nodes back while no ranks ran; queued again"):
        supervise(directory, launching, lambda text: None, Patience(shortest=1e6, longest=1e6))
    assert not events(directory, "ended"), "the next supervisor goes on"
    assert not directory.stop_request.exists()


def test_what_the_scheduler_takes_goes_on_without_limit(directory: RunDirectory) -> None:
    launching = Scripted(
        directory,
        *['beat(0, 0); until_asked(); say(0, "STOPPED", 0); say(1, "STOPPED", 0)'] * 4,
    )
    launching.known = Facts(preempted=True)

    def say(text: str) -> None:
        launching.requeues = launching.attempts == 3

    with pytest.raises(Interrupted) as caught:
        supervise(directory, launching, say, QUICK)
    assert "PREEMPTED" in caught.value.message
    assert [event["outcome"] for event in events(directory, "attempt_ended")] == ["PREEMPTED"] * 4
    assert not events(directory, "ended"), "the next supervisor goes on"
    assert not directory.stop_request.exists()


def test_ranks_that_do_not_stop_before_the_jobs_end_are_ended(directory: RunDirectory) -> None:
    """While there is time to have the job requeued."""
    launching = Scripted(directory, "beat(0, 5); beat(1, 5); time.sleep(60)", requeues=True)
    launching.known = Facts(time_limit=True, ends_at=time.time() + LAST_SECONDS + 1)
    with pytest.raises(Interrupted):
        supervise(directory, launching, lambda text: None, QUICK)
    (ended,) = events(directory, "attempt_ended")
    assert (ended["outcome"], ended["step"]) == ("TIME_LIMIT", 5)
    assert ended["seconds"] < 30


@pytest.fixture
def small_disk(directory: RunDirectory) -> Iterator[None]:
    """The run is on a file system of its own, of 1 MiB."""
    orders = directory.orders.read_text(encoding="utf-8")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory.root)]
    if error := subprocess.run(mount, capture_output=True, text=True).stderr:
        lacks(f"no file system can be mounted: {error.strip()}")
    write_text(directory.orders, orders)
    yield
    subprocess.run(["umount", "-l", str(directory.root)], check=True)


def fill(directory: RunDirectory) -> None:
    """Leave no room on its disk."""
    for file in (directory.root / "full", directory.journal):
        with contextlib.suppress(OSError), file.open("ab", buffering=0) as stream:
            while True:
                stream.write(b"\n" * 512)


@pytest.mark.usefixtures("small_disk")
def test_on_a_full_disk_the_ranks_are_asked_to_stop_and_the_queue_for_a_requeue(
    directory: RunDirectory, later: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    words = "import signal; beat(0, 5); signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); time.sleep(60)"
    launching = Scripted(directory, words, requeues=True)

    def fill_and_take() -> None:
        fill(directory)
        launching.known = Facts(preempted=True)

    later(directory.heartbeat(1, 0).exists, fill_and_take)
    with pytest.raises(Interrupted, match="queued again"):
        supervise(directory, launching, lambda text: None, QUICK)
    assert launching.handed == [Outcome.PREEMPTED]
    said = capfd.readouterr().err
    assert (
        f"{directory.stop_request}: No space left on device: the ranks are asked to stop by SIGTERM" in said
    )
    assert f'{directory.journal}: No space left on device: {{"time"' in said


@pytest.mark.usefixtures("small_disk")
def test_on_a_full_disk_a_signal_between_two_attempts_is_a_wish_to_stop(
    directory: RunDirectory, later: Callable[..., None]
) -> None:
    def fill_and_signal() -> None:
        fill(directory)
        os.kill(os.getpid(), signal.SIGTERM)

    later(lambda: bool(events(directory, "restart")), fill_and_signal)
    with pytest.raises(Interrupted, match="stopped"):
        supervise(
            directory,
            Scripted(directory, 'say(0, "CRASHED", 1, "x")'),
            lambda text: None,
            Patience(shortest=1e6, longest=1e6),
        )


def test_a_persons_wish_outlives_a_requeue(directory: RunDirectory) -> None:
    """It came while the job was queued again: the next supervisor heeds it."""

    class AskedMeanwhile(Scripted):
        def hands_over(self, outcome: Outcome, why: str) -> bool:
            ask_to_stop(directory, "person")
            return True

    launching = AskedMeanwhile(directory, "say(0, 'STOPPED', 5); say(1, 'STOPPED', 5)")
    launching.known = Facts(preempted=True)
    with pytest.raises(Interrupted):
        supervise(directory, launching, lambda text: None, QUICK)
    assert asked_by(directory) == "person"


@pytest.mark.parametrize(
    ("script", "last"),
    [
        ("beat(0, 5); beat(1, 5); time.sleep(60)", []),
        ('beat(0, 5); until_asked(); say(0, "STOPPED", 6); say(1, "STOPPED", 6)', [6, 6]),
    ],
)
def test_who_is_replaced_ends_its_ranks_and_leaves_the_rest_to_its_successor(
    directory: RunDirectory,
    later: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    last: list[int],
) -> None:
    """The job was started again elsewhere: its node is cut off, and the ranks there agree with nobody."""
    monkeypatch.setattr("launcher.run.stopping.MARGIN", 1.0)
    launching = Scripted(directory, script)
    begun, successor = threading.Event(), Scripted(directory, takes_over=True)
    successor.known = Facts(failed_nodes=("n1",))

    def take_over() -> None:
        with only_supervisor(directory, successor, lambda text: None):
            assert asked_by(directory) == "scheduler"
            begun.set()

    later(directory.heartbeat(1, 0).exists, take_over)
    started = time.monotonic()
    with only_supervisor(directory, launching, lambda text: None), pytest.raises(Interrupted) as caught:
        supervise(directory, launching, lambda text: None, QUICK)
    assert time.monotonic() - started < 30
    assert "another supervisor takes over" in caught.value.message
    assert begun.wait(10)
    assert not directory.handover.exists()
    (ended,) = events(directory, "attempt_ended")
    assert (ended["outcome"], ended["orphaned"]) == ("NODE_FAILED", True)
    assert [read_end(directory.record(1, rank)).step for rank in range(len(last))] == last  # type: ignore[union-attr]
    assert launching.attempts == 1


def test_another_attempt_beside_this_one_ends_it(
    directory: RunDirectory, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lock holds on one machine only, or the node was cut off from its files and is back. By then
    SLURM asks for a stop in its own ways: written down, that would stop the ranks of the other attempt."""
    monkeypatch.setattr("launcher.run.stopping.MARGIN", 1e3)
    launching = Scripted(directory, "beat(0, 5); beat(1, 5); time.sleep(60)")

    def give_up() -> None:
        directory.logs(2).mkdir()
        launching.known = Facts(preempted=True)
        os.kill(os.getpid(), signal.SIGTERM)

    later(directory.heartbeat(1, 0).exists, give_up)
    begun = time.monotonic()
    error = end_of(directory, launching)
    assert asked_by(directory) is None
    assert time.monotonic() - begun < 30, "there is nothing to be saved any more"
    assert "another supervisor takes over" in error.message
    assert not events(directory, "attempt_ended")


def test_who_was_asked_to_leave_leaves_though_the_other_waits_no_longer_and_asks_nothing_again(
    directory: RunDirectory, later: Callable[..., None]
) -> None:
    """Where the lock holds on one machine only, the successor goes on with the ranks' last words."""
    words = """
beat(0, 5), beat(1, 5)
until_asked()
say(0, "STOPPED", 6), say(1, "STOPPED", 6)
time.sleep(1)
"""

    def go_on() -> None:
        directory.handover.unlink()
        directory.stop_request.unlink()
        launching.known = Facts(preempted=True)

    later(directory.heartbeat(1, 1).exists, lambda: write_text(directory.handover, ""))
    later(lambda: directory.record(1, 1).exists() and directory.handover.exists(), go_on)
    launching = Scripted(directory, words)
    error = end_of(directory, launching)
    assert "another supervisor takes over" in error.message
    assert not events(directory, "attempt_ended")
    assert asked_by(directory) is None


def test_a_rank_that_does_not_get_on_is_named_and_ended(directory: RunDirectory) -> None:
    words = (
        'beat(0, 5, 61.0, waits=True, at="distributed_c10d.py:1 all_reduce"); '
        'beat(1, 5, 61.0, at="mine.py:7 on_step_begin"); time.sleep(60)'
    )
    error = end_of(directory, Scripted(directory, words))
    assert error.message.startswith("NO_PROGRESS")
    (hung, *_) = events(directory, "hung")
    assert (hung["rank"], hung["step"]) == (1, 5)
    how = events(directory, "attempt_ended")[0]["reason"]
    assert "rank 1 did not get on while the others waited for 61 s" in how
    assert "in mine.py:7 on_step_begin" in how
    assert events(directory, "attempt_ended")[0]["outcome"] == "HUNG"


def test_a_rank_that_is_gone_brings_the_others_down(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.run.following.ECHO_SECONDS", 0.5)
    words = (
        "beat(0, 5); (os.fork() or (beat(1, 5), os._exit(9))); os.wait(); "
        'say(0, "CRASHED", 5, "connection closed by peer"); time.sleep(60)'
    )
    begun = time.monotonic()
    error = end_of(directory, Scripted(directory, words))
    assert time.monotonic() - begun < 30
    assert "rank 1 was killed" in error.message
    assert "rank-0.log" not in (error.hint or ""), "it tells only the echo"
    assert {ended["rank"] for ended in events(directory, "attempt_ended")} == {1}


def test_an_attempt_that_lost_its_supervisor_is_written_down_by_the_next(directory: RunDirectory) -> None:
    journal.record(directory.journal, "attempt_started", attempt=1, world_size=2, nodes=1, from_step=0)
    launching = Scripted(directory, 'say(0, "STOPPED", 6); say(1, "STOPPED", 6)')
    launching.start(1)
    while not directory.record(1, 1).exists():
        time.sleep(0.05)
    with only_supervisor(directory, launching, lambda text: None):
        pass
    (ended,) = events(directory, "attempt_ended")
    assert (ended["outcome"], ended["step"], ended["orphaned"]) == ("CRASHED", 6, True)
    assert "stopped safely" in ended["reason"]
    with only_supervisor(directory, launching, lambda text: None):
        pass
    assert len(events(directory, "attempt_ended")) == 1


def test_a_rank_left_behind_by_a_dead_one_is_not_waited_for(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.run.following.ECHO_SECONDS", 0.5)
    journal.record(directory.journal, "attempt_started", attempt=1, world_size=2, nodes=1, from_step=0)
    launching = Scripted(directory, "beat(0, 5); (os.fork() or (beat(1, 5), os._exit(9))); time.sleep(60)")
    left = launching.start(1)
    while not directory.heartbeat(1, 1).exists():
        time.sleep(0.05)
    said: list[str] = []
    begun = time.monotonic()
    try:
        with only_supervisor(directory, launching, said.append):
            assert time.monotonic() - begun < 30
    finally:
        left.end()
    assert "killing what is left of attempt 1: the others are gone" in said
    assert events(directory, "attempt_ended")[0]["outcome"] == "CRASHED"


def test_ranks_that_are_seen_to_live_on_another_machine_are_waited_for(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock tells of them here: their file system has locks of one machine only."""
    monkeypatch.setattr("launcher.run.holding.SEEN_SECONDS", 1.0)
    monkeypatch.setattr("launcher.run.following.MOVING_SECONDS", 2.0)
    journal.record(directory.journal, "attempt_started", attempt=1, world_size=2, nodes=1, from_step=0)
    words = """
os.uname = lambda: type("There", (), {"nodename": "n9"})
while not directory.stop_request.exists():
    beat(0, 5), beat(1, 5)
    time.sleep(0.1)
say(0, "STOPPED", 6), say(1, "STOPPED", 6)
"""
    launching = Scripted(directory, words)
    launching.start(1)
    while not directory.heartbeat(1, 1).exists():
        time.sleep(0.05)
    monkeypatch.setattr("launcher.run.holding.ORPHANS_SECONDS", 3.0)
    said: list[str] = []
    with (
        pytest.raises(RunDirectoryError, match=r"by ranks on another machine: \[0, 1\]"),
        only_supervisor(directory, launching, said.append),
    ):
        pass
    assert asked_by(directory) is None, "a person on another machine knows nothing of it"
    assert not directory.handover.exists()
    launching.takes_over = True
    with only_supervisor(directory, launching, said.append):
        assert not directory.handover.exists()
        (ended,) = events(directory, "attempt_ended")
        assert ended["step"] == 6
    assert "waiting for its ranks" in said[0]


def test_who_waits_in_vain_wants_the_run_no_longer(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.run.holding.HANDOVER_SECONDS", 0.6)
    other = hold(directory.lock, directory, "us")
    with (
        pytest.raises(RunDirectoryError),
        only_supervisor(directory, Scripted(directory, takes_over=True), print),
    ):
        pass
    other.close()
    assert not directory.handover.exists()


def test_finished_is_the_last_attempt_at_this_length_with_its_model(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert not is_finished(directory, 20)

    def attempt(outcome: Outcome, steps: int) -> None:
        journal.record(directory.journal, "attempt_started", attempt=1)
        journal.record(directory.journal, "attempt_ended", outcome=outcome, planned_steps=steps, step=steps)

    attempt(S, 20)
    directory.model.mkdir()
    assert not is_finished(directory, 20)
    attempt(F, 20)
    assert is_finished(directory, 20)
    assert not is_finished(directory, 30), "it was asked to grow"
    attempt(C, 30)
    assert not is_finished(directory, 30)
    assert not is_finished(directory, 20), "what it made then may be gone by now"
    attempt(F, 30)
    assert is_finished(directory, 30)
    ledger.commit(ledger.begin(directory.checkpoints, 30), step=30, samples=240, world_size=1, created=0.0)
    assert is_finished(directory, 30)
    ledger.commit(ledger.begin(directory.checkpoints, 20), step=20, samples=160, world_size=1, created=0.0)
    assert is_finished(directory, 30)
    newest = directory.checkpoints / "step-00000030"
    newest.rename(tmp_path / "aside")
    assert not is_finished(directory, 30), "whoever moves it away goes back to step 20"
    (tmp_path / "aside").rename(newest)
    assert is_finished(directory, 30)
    directory.model.rmdir()
    assert not is_finished(directory, 30)
