"""What SLURM's commands say, as they said it (Slurm 22.05), and what is read from it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from launcher.config.schema import SlurmSection
from launcher.errors import MachineError, RequestError
from launcher.run.slurm import (
    Node,
    fields_of,
    gpus_in,
    own_job,
    read_job,
    refusal,
    said,
    seconds_in,
    submission_environment,
)

JOB = (
    "JobId=9 JobName=my run UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901751 Nice=0 "
    "Account=(null) QOS=(null) "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:00:02 TimeLimit=01:00:00 TimeMin=N/A SubmitTime=2026-11-26T03:31:10 "
    "EligibleTime=2026-11-26T03:31:10 AccrueTime=2026-11-26T03:31:10 StartTime=2026-11-26T03:31:11 "
    "EndTime=2026-11-26T03:32:14 Deadline=N/A PreemptEligibleTime=2026-11-26T03:31:11 "
    "PreemptTime=2026-11-26T03:31:14 SuspendTime=None Partition=grace NodeList=n[1-2] BatchHost=n1 "
    "NumNodes=2 Command=/runs/a=b c/job.sbatch"
)


def test_a_job() -> None:
    job = read_job(JOB)
    assert (job.job, job.state, job.restarts, job.nodes) == ("9", "RUNNING", 2, "n[1-2]")
    assert job.preempted
    assert job.end == datetime(2026, 11, 26, 3, 32, 14, tzinfo=UTC).timestamp()
    assert not job.is_over


def test_a_job_that_waits() -> None:
    line = "JobId=9 JobName=x JobState=PENDING Reason=BeginTime Restarts=1 StartTime=Unknown EndTime=Unknown "
    line += "EligibleTime=Unknown Partition=batch NodeList=(null)"
    job = read_job(line)
    assert (job.nodes, job.start, job.preempted) == ("", None, False)


def test_a_value_may_hold_spaces() -> None:
    assert fields_of("A=1 B=two words C= D/E:F=(null)") == {
        "A": "1",
        "B": "two words",
        "C": "",
        "D/E:F": "(null)",
    }


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:2", 2),
        ("gpu:a100:8(S:0-1),nvme:1", 8),
        ("gpu:a:2,gpu:b:2", 4),
        ("(null)", 0),
        ("", 0),
        ("gpu", 1),
    ],
)
def test_gpus_among_generic_resources(gres: str, count: int) -> None:
    assert gpus_in(gres) == count


@pytest.mark.parametrize(("kind", "count"), [("a100", 4), ("a100_1g.5gb", 7), ("h100", 0), (None, 11)])
def test_gpus_of_a_type(kind: str | None, count: int) -> None:
    assert gpus_in("gpu:a100:4(S:0),gpu:a100_1g.5gb:7", kind) == count


@pytest.mark.parametrize(
    "state", ["IDLE+DRAIN", "DOWN*", "MIXED+DRAIN", "DOWN+NOT_RESPONDING", "IDLE*+DRAIN"]
)
def test_a_node_that_takes_no_job(state: str) -> None:
    assert Node("n1", state, 1, 1, "", None).is_out


@pytest.mark.parametrize("state", ["IDLE", "ALLOCATED", "IDLE+CLOUD+POWERED_DOWN", "IDLE+POWERING_DOWN"])
def test_a_node_that_is_powered_down_comes_up_for_a_job(state: str) -> None:
    assert not Node("n1", state, 1, 1, "", None).is_out


@pytest.mark.parametrize(("value", "seconds"), [("30 sec", 30), ("0", 0), ("UNLIMITED", None), (None, None)])
def test_seconds_of_a_setting(value: str | None, seconds: int | None) -> None:
    assert seconds_in(value) == seconds


@pytest.mark.parametrize(
    ("words", "key", "hint"),
    [
        (
            "sbatch: error: invalid partition specified: nope\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "slurm.partition",
            "sinfo",
        ),
        (
            "sbatch: error: Batch job submission failed: "
            "Invalid account or account/partition combination specified\n",
            "slurm.account",
            "sacctmgr",
        ),
    ],
)
def test_slurms_words_and_ours(words: str, key: str, hint: str) -> None:
    error = refusal("sbatch", words)
    assert isinstance(error, RequestError)
    assert error.key == key
    assert words.splitlines()[-1].partition("failed: ")[2] in error.message
    assert hint in (error.hint or "")


def test_a_controller_that_does_not_answer_is_nobodys_wish() -> None:
    error = refusal("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert isinstance(error, MachineError)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match="there is no sbatch here"):
        said("sbatch")


def test_an_element_of_an_array_goes_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert own_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "46")
    assert own_job() == "46"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "46")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert own_job() == "46_0"


def test_a_job_has_nothing_of_the_one_that_it_is_submitted_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no variable of sbatch's overrules the job script: a time limit, an array, a job without requeue."""
    kept = {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_CONF_SERVER": "ctl:6817",
        "SBATCH_ACCOUNT": "mine",
        "SBATCH_EXPORT": "NONE",
        "SLURMS": "x",
    }
    gone = {"SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SRUN_CPUS_PER_TASK", "SBATCH_TIMELIMIT", "SBATCH_ARRAY_INX"}
    gone |= {"SBATCH_NO_REQUEUE", "SBATCH_MEM_PER_NODE", "SBATCH_GPUS_PER_NODE", "SBATCH_PARTITION"}
    for name, value in {**kept, **dict.fromkeys(gone, "1")}.items():
        monkeypatch.setenv(name, value)
    found = submission_environment(SlurmSection(partition="gpu"))
    assert {name: found.get(name) for name in kept} == kept
    assert not gone & set(found)
    assert found["PATH"]


@pytest.mark.parametrize("state", ["REQUEUED", "REQUEUE_HOLD", "STAGE_OUT"])
def test_a_job_that_is_to_start_again_is_not_over(state: str) -> None:
    assert not read_job(JOB.replace("JobState=RUNNING", f"JobState={state}")).is_over
