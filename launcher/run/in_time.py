"""What a job does before its ranks run, ended while there is still time to have the job queued again.

At the end of its time SLURM ends a job for good (TIMEOUT). While there are ranks the supervisor sees to it,
and `run.preparing` while text is prepared; nodes that are tried know nothing of time.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from launcher.run.directory import RunDirectory
from launcher.run.launching import Launching
from launcher.run.saying import Say
from launcher.run.supervise import end_without_ranks

LEAD_SECONDS: Final = 10.0
"""What is kept of a job's time: nothing is to be saved, and slurmctld has to hear of the requeue."""


class OutOfTime(BaseException):
    """The job's time is nearly over. No error, which somebody might handle on its way."""


@contextmanager
def in_time(directory: RunDirectory, launching: Launching, doing: str, say: Say) -> Iterator[None]:
    """End what is done inside, which is `doing` in words, when the job's time runs out.

    That is an attempt of the run like any other: its outcome is TIME_LIMIT, and the job is queued again.
    Raises Interrupted then, and TrainingError once a few in a row have brought no step.
    """
    try:
        with alarm(launching.ends_at()):
            yield
    except OutOfTime:
        reason = f"the job's time ran out while {doing}; slurm.time_limit may be too short"
        end_without_ranks(directory, launching, reason, say)


@contextmanager
def alarm(ends_at: float | None) -> Iterator[None]:
    """Raises OutOfTime inside once LEAD_SECONDS are left until `ends_at`."""
    if ends_at is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, _raise)
    timer = signal.setitimer(signal.ITIMER_REAL, max(0.01, ends_at - LEAD_SECONDS - time.time()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise OutOfTime
