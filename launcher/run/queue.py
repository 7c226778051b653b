"""A run's job in SLURM's queue, as seen from a login node and without the job's help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from launcher.errors import LauncherError
from launcher.run import journal, slurm
from launcher.run.directory import RunDirectory

REASONS: Final[Mapping[str, str]] = {
    "Priority": "other jobs go first",
    "Resources": "not enough nodes are free",
    "BeginTime": "SLURM holds a requeued job back for two minutes",
    "Dependency": "another job has to end well first",
    "DependencyNeverSatisfied": "the job it waits for did not end well: scancel it",
    "JobHeldUser": "held by its owner: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "PartitionTimeLimit": "its time limit is over the partition's: it will never start",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives: it will never start",
    "AssocGrpGRES": "the account has all the GPUs that it may have",
    "QOSMaxGRESPerUser": "you have all the GPUs that the qos gives one user",
    "Reservation": "its reservation has not begun",
}
"""Why a job waits: SLURM's word, and ours."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A run's newest job. `position` counts from 1 among the waiting jobs of its partition, None for one that
    does not wait; `start` (seconds since the epoch) is when it began, or is expected to, None where SLURM
    cannot tell. `state` is FORGOTTEN where slurmctld knows it no more.
    """

    job: str
    state: str
    reason: str
    why: str | None = None
    nodes: str = ""
    restarts: int = 0
    position: int | None = None
    waiting: int | None = None
    start: float | None = None

    @property
    def is_over(self) -> bool:
        return self.state not in slurm.GOES_ON


def last_job(directory: RunDirectory, event: str = "submitted") -> str | None:
    """The job that this run was submitted as last; None: it never was."""
    jobs = [each["job"] for each in journal.events(directory.journal, event)]
    return jobs[-1] if jobs else None


def find_job(directory: RunDirectory) -> QueuedJob | None:
    """The newest job of this run; None for one that was never submitted, or where SLURM does not answer."""
    return _look_up(last_job(directory))


def find_preparation(directory: RunDirectory) -> QueuedJob | None:
    """The newest array of jobs that prepare the text of this run, as `find_job` has the run's own."""
    return _look_up(last_job(directory, "preparation_submitted"))


def _look_up(job: str | None) -> QueuedJob | None:
    if job is None:
        return None
    try:
        state = slurm.job_state(job)
        if state is None:
            return QueuedJob(job, "FORGOTTEN", "")
        position, waiting = _position(job, state.partition) if state.state == "PENDING" else (None, None)
    except LauncherError:
        return None
    return QueuedJob(
        job,
        state.state,
        state.reason,
        REASONS.get(state.reason.partition(",")[0]),
        state.nodes,
        state.restarts,
        position,
        waiting,
        state.start,
    )


def _position(job: str, partition: str) -> tuple[int | None, int]:
    """Which of the waiting jobs of its partition it is, in the order they are tried, and of how many."""
    asked = ("squeue", "--noheader", "--states=PENDING", f"--partition={partition}", "--array")
    waiting = slurm.said(*asked, "--sort=-p,i", "--format=%i").split()
    return (waiting.index(job) + 1 if job in waiting else None), len(waiting)


def cancel(job: str) -> None:
    """Take a job out of the queue. Raises what `slurm.said` does."""
    slurm.said("scancel", job)
