"""What is handed in, and what is refused before it waits in a queue for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.config.load import load_cluster, load_run
from launcher.config.schema import SlurmSection
from launcher.errors import MachineError, RequestError
from launcher.run import slurm as commands
from launcher.run.assemble import assemble
from launcher.run.directory import RunDirectory
from launcher.run.doctor import examine
from launcher.run.excluding import avoid
from launcher.run.machine import Machine
from launcher.run.slurm import clock, job_state
from launcher.run.submitting import check_submission
from scripts.slurm_cluster import GPUS, GRACE, KILL_WAIT, Cluster
from scripts.slurm_drill import Place, cluster_file

MACHINE = Machine("login", 4, 2**34, (), None)


def where(place: Place, monkeypatch: pytest.MonkeyPatch, **change: Any) -> Path:
    """A cluster file of the drill's with `change` in it, in the folder that the test is now in."""
    monkeypatch.chdir(place.folder)
    for name, value in place.slurm.environment.items():
        monkeypatch.setenv(name, value)
    asked = cluster_file("batch")
    asked["slurm"] |= change.pop("slurm", {})
    place.write("cluster.yaml", asked | change)
    return place.folder / "cluster.yaml"


def notes(file: Path) -> list[str]:
    """What is said of a submission with this cluster file. Raises what is wrong with it."""
    said: list[str] = []
    run = load_run(file.with_name("run.yaml"))
    check_submission(assemble(run, load_cluster(file), MACHINE), said.append)
    return said


def test_what_the_cluster_can_do_is_not_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    said = notes(where(place, monkeypatch, slurm={"time_limit": "1:00:00", "memory": "10G"}))
    assert {note.split(":")[1] for note in said} <= {" preemption", " run directory"}


BAD: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "partition": ({"slurm": {"partition": "nope"}}, "there is no partition nope", "batch, grace, urgent"),
    "time": ({"slurm": {"time_limit": "2:00:00"}}, "gives 01:00:00 at most", "01:00:00"),
    "short": ({"slurm": {"time_limit": "0:05"}}, "is too short", "set a longer one"),
    "nodes": ({"nodes": 4}, "4 are asked for, and partition batch has 3", "set nodes: 3"),
    "excluded": ({"slurm": {"exclude": ["n1", "n2"]}}, "has 1 without those excluded", "set nodes: 1"),
    "gpus": (
        {"gpu": "a100-sxm-80gb", "gpus_per_node": 4, "slurm": {"cpus_per_node": 2}},
        f"the most that one has is {GPUS}",
        "set gpus_per_node",
    ),
    "cpus": ({"slurm": {"cpus_per_node": 64}}, "the most that one has is 8", "set slurm.cpus_per_node"),
    "memory": ({"slurm": {"memory": "100G"}}, "the most that one has is 16000", "set slurm.memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_slurm_would_let_wait_for_ever(place: Place, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    change, said, hint = BAD[name]
    with pytest.raises(RequestError) as caught:
        notes(where(place, monkeypatch, **change))
    assert said in caught.value.message
    assert hint in (caught.value.hint or "")


def test_the_place_of_what_is_wrong_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file = where(place, monkeypatch, slurm={"time_limit": "2:00:00"})
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    with pytest.raises(RequestError) as caught:
        notes(file)
    assert caught.value.message.endswith("(slurm.time_limit, cluster.yaml:10)")


def test_how_long_a_stop_may_take_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = json.loads((place.folder / "run.yaml").read_text())
    run["model"] = {"name": "gpt2-xl"}  # its checkpoint takes minutes to write
    place.write("run.yaml", run)
    said = notes(where(place, monkeypatch, slurm={"partition": "batch"}))
    assert any(f"KillWait gives {KILL_WAIT} s" in note for note in said)
    said = notes(where(place, monkeypatch, slurm={"partition": "grace"}))
    assert any(f"GraceTime of partition grace gives {GRACE} s" in note for note in said)


def test_slurms_own_words_and_ours(slurm: Cluster, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    where(place, monkeypatch)
    script = place.folder / "job.sh"
    script.write_text("#!/bin/sh\ntrue\n")
    with pytest.raises(RequestError) as caught:
        commands.submit(script, SlurmSection(), "--account=nobody")
    assert "Invalid account or account/partition combination" in caught.value.message
    assert caught.value.key == "slurm.account"


def test_no_sbatch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file = where(place, monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match="there is no scontrol here") as caught:
        notes(file)
    assert caught.value.exit_code == 3


def test_doctor_on_a_login_node(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {check.name: check for check in examine(MACHINE, load_cluster(where(place, monkeypatch)).config)}
    assert {good[name].state for name in ("slurm", "partition", "time limit", "nodes")} == {"ok"}
    assert good["nodes"].found == "3 that would do are up"
    assert "gpu" not in good, "a login node need not have one"
    bad = examine(MACHINE, load_cluster(where(place, monkeypatch, nodes=9)).config)
    (check,) = [check for check in bad if check.state == "missing"]
    assert (check.name, check.remedy) == ("nodes", "set nodes: 3, or another slurm.partition")


def test_a_node_that_is_out_is_told(slurm: Cluster, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file = where(place, monkeypatch, slurm={"exclude": ["n1"]})
    slurm.run("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=looked at")
    said = notes(file)
    assert any("1 of the 2 nodes that would do are up (n3 IDLE+DRAIN)" in note for note in said)


NAME = 'it\'s a "run" #1 (50%j)'
SETUP = ["""printf '%s|' "$SLURM_JOB_NAME" "it's" > 'said "here"'""", "if true\nthen exit 0; fi"]


def test_names_and_set_up_lines_reach_the_job_as_they_are(place: Place) -> None:
    """The set-up ends the job before the supervisor would start."""
    place.write("drill.yaml", cluster_file("batch") | {"nodes": 1})
    config = json.loads((place.folder / "drill.yaml").read_text())
    config["slurm"] |= {"setup": SETUP, "extra": ["--comment=x"]}
    place.write("drill.yaml", config)
    done = place.launcher(
        "submit", "run.yaml", f"name={json.dumps(NAME)}", "--cluster", "drill.yaml", "--json", "--wait"
    )
    assert done.returncode == 1, done.stderr  # it did not train
    assert "ended as COMPLETED" in done.stderr
    assert (place.folder / 'said "here"').read_text() == f"{NAME}|it's|"
    (told,) = json.loads(done.stdout)
    assert Path(told["directory"]).name == NAME
    assert (place.folder / "runs" / NAME / "logs" / f"job-{told['job']}.log").is_file()


def test_a_chain_and_a_sweep(slurm: Cluster, place: Place) -> None:
    config = cluster_file("batch") | {"nodes": 1}
    config["slurm"] |= {"setup": ["""basename "$PWD" >> order; sleep 1; exit $(cat code)"""]}
    place.write("drill.yaml", config)
    (place.folder / "code").write_text("0")
    place.write("next.yaml", json.loads((place.folder / "run.yaml").read_text()) | {"name": "next"})
    arguments = (
        "submit",
        "run.yaml",
        "--cluster",
        "drill.yaml",
        "--json",
        "--sweep",
        "train.learning_rate=1e-3,3e-3",
    )
    done = place.launcher(*arguments, "--then", "next.yaml")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [Path(each["directory"]).name for each in told] == [
        "drill-learning_rate=1e-3",
        "drill-learning_rate=3e-3",
        "next",
    ]
    first, second, following = (each["job"] for each in told)
    assert (first.partition("_")[2], second.partition("_")[2]) == ("0", "1")
    rates = [json.loads((Path(each["directory"]) / "plan.json").read_text()) for each in told[:2]]
    assert rates[0]["configuration"] != rates[1]["configuration"]
    assert slurm.job(following)["Dependency"].startswith(f"afterok:{first.partition('_')[0]}")
    slurm.wait(lambda: slurm.job(following)["JobState"] == "COMPLETED", "the chain has ended", 30)
    again = place.launcher("submit", "run.yaml", "--cluster", "drill.yaml", "--wait", "--then", "next.yaml")
    assert again.returncode == 1, again.stderr


def test_a_run_is_not_queued_twice_and_stays_away_from_bad_nodes_when_it_is_submitted_again(
    slurm: Cluster, place: Place
) -> None:
    config = cluster_file("batch") | {"nodes": 1}
    config["slurm"] |= {"setup": ["exec sleep 60"], "exclude": ["n3"]}
    place.write("drill.yaml", config)
    arguments = ("submit", "run.yaml", "--cluster", "drill.yaml")
    first = place.launcher(*arguments)
    assert first.returncode == 0, first.stderr
    job, root = first.stdout.split()
    assert slurm.job(job)["ExcNodeList"] == "n3"
    second = place.launcher(*arguments)
    assert second.returncode == 2
    assert f"job {job} of this run is" in second.stderr

    slurm.run("scancel", job)
    avoid(RunDirectory(Path(root)), ["n1"], "n1 has lost a GPU", time.time())
    slurm.wait(lambda: slurm.job(job)["JobState"] == "CANCELLED", "it is out of the queue", 30)
    again = place.launcher(*arguments)
    assert again.returncode == 0, again.stderr
    assert "the job stays away from n1: n1 has lost a GPU" in again.stderr
    job = again.stdout.split()[0]
    assert slurm.job(job)["ExcNodeList"] == "n[1,3]"
    slurm.wait(lambda: slurm.job(job)["JobState"] == "RUNNING", "it runs", 30)
    assert slurm.job(job)["NodeList"] == "n2"


def test_a_dry_run_prints_the_script_and_writes_nothing(place: Place) -> None:
    place.write("drill.yaml", cluster_file("batch"))
    before = sorted(place.folder.iterdir())
    done = place.launcher("submit", "run.yaml", "--cluster", "drill.yaml", "--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "launcher supervise" in done.stdout
    swept = place.launcher(
        *("submit", "run.yaml", "--cluster", "drill.yaml", "--dry-run", "--sweep", "seed=1,2")
    )
    assert "#SBATCH --array=0-1\n" in swept.stdout
    both = place.launcher(
        *("submit", "run.yaml", "--cluster", "drill.yaml", "--dry-run"), "--sweep=seed=1,2", "--prepare=2"
    )
    assert (both.returncode, both.stdout) == (2, "")
    assert sorted(place.folder.iterdir()) == before


def test_train_says_how_to_go_through_slurm(place: Place) -> None:
    place.write("drill.yaml", cluster_file("batch"))
    done = place.launcher("train", "run.yaml", "--cluster", "drill.yaml")
    assert done.returncode == 2
    assert "use `launcher submit`" in done.stderr


def test_a_job_is_found_by_its_id(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    job = slurm.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true")
    found = job_state(job)
    assert found is not None
    assert (found.state, found.reason) == ("PENDING", "JobHeldUser")
    slurm.run("scancel", job)
    ended = job_state(job)
    assert ended is not None
    assert ended.is_over
    assert job_state("999999") is None


def test_times_are_read_in_every_time_zone(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a user who has asked SLURM for `Tomorr 15:00`."""
    more = {"TZ": "America/New_York", "SLURM_TIME_FORMAT": "relative"}
    for name, value in {**slurm.environment, **more}.items():
        monkeypatch.setenv(name, value)
    job = slurm.run("sbatch", "--parsable", "--begin=now+1hour", "--output=/dev/null", "--wrap=true")
    found = job_state(job)
    slurm.run("scancel", job)
    assert found is not None
    assert found.start is not None
    assert 3500 < found.start - time.time() < 3700
    assert abs(clock() - time.time()) < 60


def test_a_job_submitted_from_a_job_is_another(
    slurm: Cluster, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_RESTART_COUNT": "7", "SBATCH_NO_REQUEUE": "1"}
    for name, value in {**slurm.environment, **inside}.items():
        monkeypatch.setenv(name, value)
    said = place.folder / "said"
    script = place.folder / "job.sh"
    script.write_text(f'#!/bin/sh\necho "<$SLURM_ARRAY_JOB_ID$SLURM_RESTART_COUNT>" > {said}\n')
    job = commands.submit(script, SlurmSection(), "--output=/dev/null")
    assert slurm.job(job)["Requeue"] == "1"
    slurm.wait(lambda: said.exists() and said.read_text() == "<>\n", "the job has its own variables", 30)


def test_the_text_is_prepared_by_jobs_and_the_run_waits_for_them(slurm: Cluster, place: Place) -> None:
    config = cluster_file("batch") | {"nodes": 1}
    # In place of training, once the run is planned.
    config["slurm"] |= {"setup": ["""[ "$SLURM_ARRAY_TASK_ID" ] || ls runs/.stores > stores"""]}
    place.write("drill.yaml", config)
    arguments = ("submit", "run.yaml", "--cluster", "drill.yaml", "--json", "--prepare", "2")
    done = place.launcher(*arguments)
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    directory = Path(told["directory"])
    drafted = json.loads((directory / "plan.json").read_text())
    assert drafted["store"] is None
    assert slurm.job(told["job"])["Dependency"].startswith("afterok:")

    def planned() -> bool:
        return json.loads((directory / "plan.json").read_text())["store"] is not None

    slurm.wait(planned, "the run is planned", 120)
    store = Path(json.loads((directory / "plan.json").read_text())["store"])
    assert store.name in (place.folder / "stores").read_text(), "it was made before the run's own job began"
    assert len(list((directory / "logs").glob("prepare-*_*.log"))) == 2
