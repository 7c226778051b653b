from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.schema import Container
from launcher.render.srun import Step, meeting_port, srun_command, step_environment

STEP = Step(
    "/runs/a b", 3, 123456, ("n1", "n2"), "/runs/a b/logs/attempt-003", "/env/accelerate", "/env/python"
)


def test_one_launcher_on_each_node_meets_on_the_first() -> None:
    command = srun_command(STEP)
    assert command[0] == "srun"
    assert {
        "--nodes=2",
        "--nodelist=n1,n2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    } <= set(command)
    assert "--export=ALL" in command
    assert command[-3:-1] == ["sh", "-c"]
    assert "--rdzv_backend c10d" in command[-1]
    assert f"--main_process_ip n1 --main_process_port {meeting_port(123456, 3)}" in command[-1]
    assert "localhost" not in " ".join(command)


def test_what_differs_between_nodes_is_expanded_on_them(tmp_path: Path) -> None:
    """The node's shell command, run by a real shell as on node 7."""
    program = tmp_path / "accelerate"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    shell = srun_command(replace(STEP, accelerate=str(program)))[-3:]
    done = subprocess.run(shell, capture_output=True, text=True, check=True, env={"SLURM_NODEID": "7"})
    words = done.stdout.splitlines()
    assert words[words.index("--machine_rank") + 1] == "7"
    assert words[words.index("--config_file") + 1] == "/runs/a b/accelerate.yaml"
    assert words[-1] == "/runs/a b"


def test_one_node_has_nobody_to_meet() -> None:
    command = srun_command(replace(STEP, hosts=("n1",)))
    assert "--nodes=1" in command
    assert "main_process" not in command[-1]


def test_jobs_have_ports_of_their_own() -> None:
    ports = [meeting_port(job, 1) for job in range(5000, 15000)]
    assert len(set(ports)) == 10000
    first, second = ({meeting_port(job, attempt) for attempt in range(20)} for job in (7, 8))
    assert len(first | second) == 40, "and so have a job's attempts"
    assert min(ports) >= 1024
    assert max(ports) < 32768


def test_pyxis_is_told_by_srun() -> None:
    container = Container(runtime="pyxis", image="nvcr.io#nvidia/pytorch:25.01", mounts=["/data", "/a:/b"])
    command = srun_command(replace(STEP, container=container, shown=("/runs/a b",)))
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01" in command
    assert "--container-mounts=/runs/a b:/runs/a b,/data:/data,/a:/b" in command
    assert "apptainer" not in command[-1]


def test_apptainer_stands_before_the_launcher() -> None:
    container = Container(runtime="apptainer", image="torch image.sif", mounts=["/data"])
    command = srun_command(replace(STEP, container=container, shown=("/runs/a b",)))
    assert command[-1].startswith(
        "exec apptainer exec --nv --bind '/runs/a b' --bind /data 'torch image.sif' /env/accelerate launch"
    )


@pytest.mark.parametrize("given", [{}, {"LAUNCHER_ATTEMPT": "9"}])
def test_the_attempt_is_not_to_be_set_by_hand(given: dict[str, str]) -> None:
    assert step_environment(3, given)["LAUNCHER_ATTEMPT"] == "3"
