from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.config.schema import ClusterConfig
from launcher.errors import MachineError, RequestError
from launcher.run import journal, node_check, slurm_ranks
from launcher.run.directory import RunDirectory
from launcher.run.nodes import Findings
from launcher.run.outcome import Outcome
from launcher.run.slurm import JobState
from launcher.run.slurm_facts import Seen, facts_of
from launcher.run.slurm_ranks import Look, Slurm, outlive_own_requeue, words_of_slurmstepd
from tests.conftest import small_plan


def test_slurmstepd_speaks_where_the_ranks_of_its_node_write(tmp_path: Path) -> None:
    """As seen with Slurm 22.05: srun's own standard error has nothing of it."""
    (tmp_path / "node-n2.log").write_text(
        "rank 0: CUDA out of memory, and not *** STEP 1.0 ON n1 CANCELLED AT 1 DUE TO TIME LIMIT ***\n"
        "slurmstepd-n2: error: *** STEP 13.1 ON n2 CANCELLED AT 2026-11-26T05:43:01 DUE TO PREEMPTION ***\n"
    )
    (tmp_path / "node-n3.log").write_text("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=13.1.\n")
    words = words_of_slurmstepd(tmp_path)
    facts = facts_of(Seen(None, 0, words), now=0.0, need=0.0)
    assert (facts.preempted, facts.time_limit, facts.out_of_memory) == (True, False, True)


def test_srun_says_that_a_task_had_no_memory() -> None:
    words = "srun: error: n2: task 0: Out Of Memory\n"
    assert facts_of(Seen(None, 0, words), now=0.0, need=0.0).out_of_memory


def test_slurmctld_is_asked_about_the_job_for_as_long_as_somebody_wants_to_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, before = threading.Event(), set(threading.enumerate())
    monkeypatch.setattr("launcher.run.slurm.job_state", lambda *_: asked.set())
    with Look("1").again_and_again():
        assert asked.wait(10)
        (looking,) = set(threading.enumerate()) - before
    looking.join(10)
    assert not looking.is_alive()


def test_when_the_job_ends_is_told_by_the_clock_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """slurmctld's is 90 seconds ahead, and nearly a whole one more: by what it says, the job would end before
    we knew."""
    running = JobState("1", "RUNNING", "None", 0, "n1", "batch", False, 1000.0, 4600.0)
    monkeypatch.setattr("launcher.run.slurm.job_state", lambda *_: running)
    monkeypatch.setattr("launcher.run.slurm.clock", lambda _: 2090.0)
    monkeypatch.setattr("time.time", lambda: 2000.0)
    seen = Look("1").now()
    assert seen is not None
    assert seen.end == 4509.0


def test_a_requeue_may_be_asked_for_in_any_thread() -> None:
    """Where text is prepared in one long call, it is not the main thread that sees the end of the job."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(outlive_own_requeue).result()
        assert signal.getsignal(signal.SIGTERM) is before
        outlive_own_requeue()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


ONE_NODE = ClusterConfig(name="c", launch="slurm", gpu="cpu", gpus_per_node=1)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Job 7 on one node, of which slurmctld says nothing."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setattr("launcher.run.slurm.hosts", lambda _: ("n1",))
    monkeypatch.setattr("launcher.run.slurm.job_state", lambda *_: None)
    monkeypatch.setattr(slurm_ranks, "outlive_own_requeue", lambda: None)
    return Slurm(RunDirectory(tmp_path), ONE_NODE)


def test_a_job_that_may_not_be_queued_again_ends_its_run_in_words(
    job: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: str) -> str:
        raise RequestError("SLURM refuses: Requested operation is presently disabled for job 7")

    monkeypatch.setattr("launcher.run.slurm.said", refuses)
    with pytest.raises(MachineError, match="does not queue job 7 again: SLURM refuses") as told:
        job.hands_over(Outcome.TIME_LIMIT, "the time limit")
    assert "launcher submit" in (told.value.hint or "")
    (end,) = journal.events(RunDirectory(tmp_path).journal, "ended")
    assert (end["outcome"], end["step"]) == ("TIME_LIMIT", 0)


def test_a_job_of_too_few_nodes_is_not_begun(job: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = SimpleNamespace(plan=replace(small_plan(), nodes=2))
    monkeypatch.setattr(RunDirectory, "read_orders", lambda _: orders)
    with pytest.raises(MachineError, match="job 7 has 1 of the 2 nodes that the run is planned for"):
        job.check_nodes()


@pytest.mark.usefixtures("job")
def test_of_a_job_of_more_nodes_the_first_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = SimpleNamespace(plan=replace(small_plan(), nodes=2))
    monkeypatch.setattr(RunDirectory, "read_orders", lambda _: orders)
    monkeypatch.setattr("launcher.run.slurm.hosts", lambda _: ("n1", "n2", "n3"))
    directory = RunDirectory(tmp_path)
    node_check.record(directory, ["n1", "n2"], Findings(), time.time())
    Slurm(directory, ONE_NODE.model_copy(update={"nodes": 2})).check_nodes()
    assert len(journal.events(directory.journal, "nodes_checked")) == 1, "they were sound just now"
