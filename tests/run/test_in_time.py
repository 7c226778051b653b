"""What comes before the ranks, in a job whose time is over too soon."""

from __future__ import annotations

import signal
import time

import pytest

from launcher.errors import Interrupted, TrainingError
from launcher.run import journal
from launcher.run.directory import RunDirectory
from launcher.run.in_time import LEAD_SECONDS, OutOfTime, alarm, in_time
from launcher.run.outcome import Outcome
from tests.run.machines import Machines


def soon() -> float:
    """The end of a job's time, when what is done before it is to end just now."""
    return time.time() + LEAD_SECONDS + 0.05


class Short(Machines):
    """Those of a job whose time is over soon."""

    def ends_at(self) -> float | None:
        return soon()


def spend(directory: RunDirectory, job: Short) -> None:
    """The end of the job's time comes while nodes are tried."""
    with in_time(directory, job, "its nodes were tried", lambda _: None):
        time.sleep(20)


def work() -> None:
    """Longer than there is time for."""
    time.sleep(20)
    raise AssertionError("it was let go on")


def test_what_takes_too_long_is_ended_before_the_end_of_the_jobs_time() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTime), alarm(soon()):
        work()
    assert signal.getsignal(signal.SIGALRM) is before
    with alarm(None):
        pass
    with alarm(time.time() + 3600):
        pass


def test_the_job_is_queued_again_until_that_has_come_to_nothing_too_often(directory: RunDirectory) -> None:
    job = Short(requeues=True)
    for _ in range(2):
        with pytest.raises(Interrupted, match=r"its nodes were tried.*queued again"):
            spend(directory, job)
    with pytest.raises(TrainingError, match=r"NO_PROGRESS: 3 attempts in a row.*time_limit may be too short"):
        spend(directory, job)
    assert job.handed == [Outcome.TIME_LIMIT] * 2
    events = journal.read(directory.journal)
    ended = [each for each in events if each["event"] == "attempt_ended"]
    assert [(each["attempt"], each["outcome"], each["step"]) for each in ended] == [
        (number, "TIME_LIMIT", 0) for number in (1, 2, 3)
    ]
    assert events[-1]["outcome"] == "NO_PROGRESS"
