"""What was seen of real jobs (Slurm 22.05), and what it is taken for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.run.outcome import Facts
from launcher.run.slurm import JobState
from launcher.run.slurm_facts import Seen, facts_of, is_requeued

RUNNING = JobState("7", "RUNNING", "None", 0, "n[1-2]", "batch", False, 1000.0, 4600.0)
ENDING = replace(RUNNING, state="COMPLETING")
REQUEUED = replace(ENDING, restarts=1)
CANCELLED = "0: slurmstepd-n1: error: *** STEP 9.0 ON n1 CANCELLED AT 2026-11-26T03:34:41{why} ***\n"


def words(why: str = "") -> str:
    return "srun: got SIGCONT\n" + CANCELLED.format(why=f" DUE TO {why}" if why else "")


def facts(seen: Seen, now: float = 2000.0, need: float = 60.0) -> Facts:
    return replace(facts_of(seen, now=now, need=need), ends_at=None)


SEEN = {
    "nothing": (Seen(RUNNING, 0), Facts()),
    "slurmctld does not answer": (Seen(None, 0), Facts()),
    "preempted at once": (
        Seen(REQUEUED, 0, words("PREEMPTION")),
        Facts(preempted=True),
    ),
    "preempted with grace": (Seen(replace(RUNNING, preempted=True), 0, words()), Facts(preempted=True)),
    "requeued by an administrator": (
        Seen(REQUEUED, 0, words("JOB REQUEUE")),
        Facts(preempted=True),
    ),
    "requeued before this attempt": (Seen(replace(RUNNING, restarts=3), 3), Facts()),
    "cancelled": (Seen(ENDING, 0, words()), Facts(cancelled=True)),
    "the time limit has come": (
        Seen(replace(ENDING, reason="TimeLimit"), 0, words("TIME LIMIT")),
        Facts(time_limit=True),
    ),
    "the time limit is near": (Seen(replace(RUNNING, end=2059.0), 0), Facts(time_limit=True)),
    "the time limit is not near": (Seen(replace(RUNNING, end=2061.0), 0), Facts()),
    "SLURM's own warning, where it does not answer": (Seen(None, 0, warned=True), Facts(time_limit=True)),
    "SLURM's own warning, a minute early": (Seen(RUNNING, 0, warned=True), Facts()),
    "a node has failed": (
        Seen(
            REQUEUED,
            0,
            "srun: error: Node failure on n2\n" + words("NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"),
        ),
        Facts(failed_nodes=("n2",)),
    ),
    "a node has failed, and nobody says which": (
        Seen(REQUEUED, 0, words("NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS")),
        Facts(failed_nodes=("a node",)),
    ),
    "the supervisor's own node has failed": (
        Seen(REQUEUED, 0, "", down=("n1",)),
        Facts(failed_nodes=("n1",)),
    ),
    "killed for memory": (
        Seen(RUNNING, 0, "slurmstepd: error: Detected 1 oom_kill event in StepId=9.0\n"),
        Facts(out_of_memory=True),
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_it_is_taken_for(name: str) -> None:
    seen, expected = SEEN[name]
    assert facts(seen) == expected


def test_when_the_nodes_are_taken_is_told() -> None:
    assert facts_of(Seen(RUNNING, 0), now=0, need=1).ends_at == 4600.0


def test_a_requeue_is_known_by_its_count() -> None:
    assert is_requeued(Seen(REQUEUED, 0))
    assert not is_requeued(Seen(REQUEUED, 1))
    assert not is_requeued(Seen(None, 0))
