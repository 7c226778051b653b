"""status, logs and stop on jobs, from the login node."""

from __future__ import annotations

import json
from typing import Any

from scripts.slurm_cluster import Cluster
from scripts.slurm_drill import Place, cluster_file


def held(place: Place, line: str, name: str) -> str:
    """Submit a run whose job does `line` in place of training; returns the job."""
    config = cluster_file("batch") | {"nodes": 2}
    config["slurm"] |= {"setup": [line], "cpus_per_node": 8}
    place.write("held.yaml", config)
    done = place.launcher("submit", "run.yaml", f"name={name}", "--cluster", "held.yaml", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)[0]["job"])


def status(place: Place, name: str) -> dict[str, Any]:
    done = place.launcher("status", f"runs/{name}", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_a_job_that_waits_says_why_and_is_taken_out_by_stop(slurm: Cluster, place: Place) -> None:
    first = held(place, "exec sleep 60", "first")
    slurm.wait(lambda: slurm.job(first)["JobState"] == "RUNNING", "the first runs", 20)
    running = status(place, "first")
    assert (running["job"]["job"], running["job"]["state"], running["job"]["nodes"]) == (
        first,
        "RUNNING",
        "n[1-2]",
    )
    second, third = (held(place, "exec sleep 60", name) for name in ("second", "third"))
    slurm.wait(lambda: slurm.job(third)["Reason"] in ("Priority", "Resources"), "both wait", 30)
    waits = [status(place, name) for name in ("second", "third")]
    assert [each["state"] for each in waits] == ["queued", "queued"]
    assert [(each["job"]["position"], each["job"]["waiting"]) for each in waits] == [(1, 2), (2, 2)]
    said = place.launcher("status", "runs/third").stdout
    assert f"{third} PENDING" in said
    assert "number 2 of 2 that wait" in said
    assert "expected start" in said

    stopped = place.launcher("stop", "runs/third")
    assert stopped.returncode == 0, stopped.stderr
    assert slurm.job(third)["JobState"] == "CANCELLED"
    assert slurm.job(second)["JobState"] == "PENDING"
    assert place.launcher("stop", "runs/third").returncode == 2, "there is nothing left to stop"
    table = place.launcher("status", "runs").stdout
    assert "queued" in table


def test_the_jobs_that_prepare_text_are_taken_out_by_stop_too(slurm: Cluster, place: Place) -> None:
    config = cluster_file("batch") | {"nodes": 1}
    config["slurm"] |= {"extra": ["--hold"]}
    place.write("held.yaml", config)
    prepare = ("submit", "run.yaml", "--cluster", "held.yaml", "--json", "--prepare", "2")
    done = place.launcher(*prepare)
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    array = slurm.job(told["job"])["Dependency"].partition(":")[2].partition("_")[0]
    slurm.run("scancel", told["job"])
    again = place.launcher(*prepare)
    assert (again.returncode, f"job {array} of this run is PENDING" in again.stderr) == (2, True)

    stopped = place.launcher("stop", told["directory"])
    assert stopped.returncode == 0, stopped.stderr
    assert slurm.job(array)["JobState"] == "CANCELLED"
