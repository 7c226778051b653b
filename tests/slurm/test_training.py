"""One run over two nodes, driven through what SLURM does to it, to the weights it would have had anyway.

The long form, with every event on its own, is `scripts/slurm_drill`.
"""

from __future__ import annotations

import json

from scripts.slurm_cluster import Cluster
from scripts.slurm_drill import SAVE_EVERY, STEPS, Place, another_version, nodes_of, preempted, requeued


def test_a_run_goes_on_through_a_bad_node_and_being_taken_twice(slurm: Cluster, place: Place) -> None:
    """n1 has another version of a package: the job is queued again without it. Then the steps, and they
    alone, are told to end, and later the whole job."""
    another_version(slurm)
    run = place.submit("drill", "grace")
    run.wait_for_step(SAVE_EVERY + 2)
    assert nodes_of(run) == ["n2", "n3"]
    preempted(run)
    slurm.wait(lambda: len(run.ends()) == 1, "the preempted attempt has ended", 60)
    run.wait_for_step(run.ends()[0]["step"] + 2)
    requeued(run)
    run.wait_for_end()
    slurm.run("umount", check=False)

    ends = run.ends()
    assert [end["outcome"] for end in ends] == ["PREEMPTED", "PREEMPTED", "FINISHED"]
    assert ends[0]["step"] < ends[1]["step"] < ends[2]["step"] == STEPS
    assert run.steps_lost() == 0
    (checked, *_) = [event for event in run.events() if event["event"] == "nodes_checked"]
    assert checked["culprits"] == ["n1"]
    assert "n1 has fsspec 2000.1" in checked["faults"][0]
    job = slurm.job(run.job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "3")

    place.write(
        "two.json", {"name": "two", "gpu": "cpu", "gpus_per_node": 2, "env": {"OMP_NUM_THREADS": "1"}}
    )
    undisturbed = place.launcher("train", "run.yaml", "name=undisturbed", "--cluster", "two.json")
    assert undisturbed.returncode == 0, undisturbed.stderr
    models = [
        place.folder / "runs" / name / "model" / "model.safetensors" for name in ("drill", "undisturbed")
    ]
    assert models[0].read_bytes() == models[1].read_bytes()
    plans = [json.loads((model.parent.parent / "plan.json").read_text())["plan"] for model in models]
    assert [plan["nodes"] for plan in plans] == [2, 1]
