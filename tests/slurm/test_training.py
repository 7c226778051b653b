"""One run over two nodes, driven through what SLURM does to it, to the weights it would have had anyway.

The long form, with every event on its own, is `scripts/slurm_drill`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from scripts.slurm_cluster import Cluster
from scripts.slurm_drill import SAVE_EVERY, STEPS, Place, another_version, nodes_of, preempted


@contextmanager
def on_two_cores() -> Iterator[None]:
    """Two ranks have a thread each, as they have on the nodes: sums of floats hang on how many there are."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_a_run_goes_on_through_a_bad_node_and_a_preemption(slurm: Cluster, place: Place) -> None:
    """n1 has another version of a package: the job is queued again without it. Then the steps, and they
    alone, are told to end, and the job asks for its own requeue. Its log is followed all the while."""
    another_version(slurm)
    run = place.submit("drill", "grace")
    following = place.start("logs", "runs/drill", "-f")
    run.wait_for_step(SAVE_EVERY + 2)
    assert nodes_of(run) == ["n2", "n3"]
    preempted(run)
    run.wait_for_end()

    ends = run.ends()
    assert [end["outcome"] for end in ends] == ["PREEMPTED", "FINISHED"]
    assert SAVE_EVERY < ends[0]["step"] < ends[1]["step"] == STEPS
    assert run.steps_lost() == 0
    (checked, *_) = [event for event in run.events() if event["event"] == "nodes_checked"]
    assert checked["culprits"] == ["n1"]
    assert "n1 has fsspec 2000.1" in checked["faults"][0]
    log, complained = following.communicate(timeout=60)
    assert (following.returncode, complained) == (0, ""), "it ends with the run"
    verified = [line.partition("]")[0] for line in log.splitlines() if "verified: " in line]
    assert verified.count("[rank 0") == 2, "before each attempt trains"
    job = slurm.job(run.job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2")

    place.write("two.json", {"name": "two", "gpu": "cpu", "gpus_per_node": 2})
    with on_two_cores():
        undisturbed = place.launcher("train", "run.yaml", "name=undisturbed", "--cluster", "two.json")
    assert undisturbed.returncode == 0, undisturbed.stderr
    models = [
        place.folder / "runs" / name / "model" / "model.safetensors" for name in ("drill", "undisturbed")
    ]
    assert models[0].read_bytes() == models[1].read_bytes()
