from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.schema import SlurmSection
from launcher.errors import RequestError
from launcher.render.sbatch import (
    BatchJob,
    cpus_per_node,
    prepare_command,
    quoted,
    render_job,
    supervise_command,
    sweep_command,
)
from launcher.run.assemble import job_template

TEMPLATE = job_template(None)


def job(name: str = "run", directory: str = "runs/run", **slurm: object) -> BatchJob:
    command = supervise_command("launcher", directory)
    return BatchJob(name, directory, command, 2, 4, 32, SlurmSection.model_validate(slurm), {}, 120)


def lines(job: BatchJob) -> list[str]:
    return render_job(job, TEMPLATE).splitlines()


def test_every_key_is_an_option() -> None:
    rendered = lines(
        job(
            partition="gpu",
            account="lab",
            qos="high",
            time_limit="1-00:00:00",
            constraint="a100&ib",
            reservation="r",
            exclude=["n1", "n2"],
            exclusive=True,
            memory="200G",
            extra=["--mail-type=END", "#SBATCH --comment=x"],
        )
    )
    options = {line.removeprefix("#SBATCH ") for line in rendered if line.startswith("#SBATCH")}
    assert options >= {
        *("--job-name=run", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=32"),
        *("--partition=gpu", "--account=lab", "--qos=high", "--time=1-00:00:00", '--constraint="a100&ib"'),
        *(
            "--reservation=r",
            "--exclude=n1,n2",
            "--exclusive",
            "--mem=200G",
            "--mail-type=END",
            "--comment=x",
        ),
        *("--requeue", "--open-mode=append", "--signal=B:USR1@120", "--output=runs/run/logs/job-%j.log"),
    }


def test_a_type_of_gpu_and_with_whom_the_nodes_are_shared() -> None:
    rendered = lines(job(gpu_type="a100", exclusive="user"))
    assert {"#SBATCH --gpus-per-node=a100:4", "#SBATCH --exclusive=user"} <= set(rendered)
    on_cpu = replace(job(gpu_type="a100"), gpus_per_node=None)
    assert not [line for line in lines(on_cpu) if "gpus" in line]


def test_what_is_not_asked_for_is_not_there() -> None:
    rendered = "\n".join(lines(job()))
    for option in (
        "partition",
        "account",
        "qos",
        "time=",
        "constraint",
        "mem",
        "exclude",
        "exclusive",
        "array",
    ):
        assert f"--{option}" not in rendered


def test_no_gpu_is_asked_for_on_the_cpu() -> None:
    rendered = render_job(replace(job(), gpus_per_node=None), TEMPLATE)
    assert "gpus" not in rendered
    assert "#SBATCH --cpus-per-task=32\n" in rendered


@pytest.mark.parametrize(
    ("slurm", "on_cpu", "cpus"),
    [
        (SlurmSection(), False, 32),
        (SlurmSection(), True, 4),
        (SlurmSection(exclusive=True), False, None),
        (SlurmSection(exclusive="user"), False, 32),
        (SlurmSection(exclusive=True, cpus_per_node=5), False, 5),
    ],
)
def test_cpus_of_a_node(slurm: SlurmSection, on_cpu: bool, cpus: int | None) -> None:
    assert cpus_per_node(slurm, 4, on_cpu=on_cpu) == cpus


@pytest.mark.parametrize("text", ["two words", "it's", 'say "hi"', "a#b", "back\\slash", "$HOME `x`", "é"])
def test_bash_hands_the_directory_on_as_it_is(text: str, tmp_path: Path) -> None:
    """The last command, run by a real bash with another program in the launcher's place."""
    echo = tmp_path / "a b" / "launcher"
    echo.parent.mkdir()
    echo.write_text('#!/bin/sh\nprintf %s "$2" > "$SAID"\n')
    echo.chmod(0o755)
    each = replace(job(text, setup=["cd /tmp &&\n true"]), command=supervise_command(str(echo), f"/x/{text}"))
    said = tmp_path / "said"
    environment = {"SLURM_CPUS_PER_TASK": "1", "SAID": str(said), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-c", render_job(each, TEMPLATE)], check=True, env=environment)
    assert said.read_text(encoding="utf-8") == f"/x/{text}"


def test_a_percent_sign_in_a_name_is_none_of_sbatchs() -> None:
    assert "#SBATCH --output=runs/50%%j/logs/job-%j.log" in lines(job("50%j", "runs/50%j"))


@pytest.mark.parametrize(
    ("value", "expected"), [("a,b=c", "a,b=c"), ('a "b" \\', '"a \\"b\\" \\\\"'), ("", '""')]
)
def test_options_are_quoted_as_sbatch_reads_them(value: str, expected: str) -> None:
    assert quoted(value) == expected


def test_an_element_of_an_array_finds_its_own_run() -> None:
    each = replace(job(), command=sweep_command("echo", ["/runs/a 'b' $c", "/runs/c"]), array="0-1")
    script = render_job(each, TEMPLATE)
    assert "#SBATCH --array=0-1\n" in script
    assert "job-%A_%a.log" in script
    said = [
        subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"SLURM_ARRAY_TASK_ID": index, "SLURM_CPUS_PER_TASK": "1", "PATH": "/usr/bin:/bin"},
        ).stdout
        for index in "01"
    ]
    assert said == ["supervise /runs/a 'b' $c\n", "supervise /runs/c\n"]


def test_parts_of_the_text_are_prepared_by_an_array() -> None:
    command = prepare_command("/a b/launcher", "/runs/c d", 4)
    each = replace(job(), command=command, array="1-4", gpus_per_node=None, lead=None, file="prepare.sbatch")
    script = render_job(each, TEMPLATE)
    assert "#SBATCH --output=runs/run/logs/prepare-%A_%a.log\n" in script
    assert "signal" not in script
    said = subprocess.run(
        ["bash", "-c", script.replace("'/a b/launcher'", "printf '%s|'")],
        capture_output=True,
        text=True,
        check=True,
        env={"SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "1", "PATH": "/usr/bin:/bin"},
    ).stdout
    words = [
        "data",
        "prepare",
        "/runs/c d/config.yaml",
        "--cluster",
        "/runs/c d/cluster.yaml",
        "--units",
        "3/4",
    ]
    assert said == "|".join([*words, ""])


def test_a_template_of_ones_own() -> None:
    assert render_job(job("x y"), "{{ name | shell }} {{ lead }}\n") == f"{shlex.quote('x y')} 120\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ nams }}", "'nams' is undefined"), ("a\n{% if %}", "line 2"), ("{{ x(", "line 1")],
)
def test_a_template_that_cannot_be_filled_in(template: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        render_job(job(), template)
    assert said in caught.value.message
    assert caught.value.key == "slurm.template"


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        job_template(str(tmp_path / "none.j2"))
