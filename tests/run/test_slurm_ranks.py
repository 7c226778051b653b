from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.run.slurm_facts import Seen, facts_of
from launcher.run.slurm_ranks import Look, outlive_own_requeue, words_of_slurmstepd


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
