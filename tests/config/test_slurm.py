from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from launcher.config.load import load_cluster
from launcher.config.schema import SlurmSection
from launcher.config.slurm import SLURM_KEYS, memory_bytes, time_limit_seconds
from launcher.errors import ConfigError, Fault

WHERE = "launch: slurm\ngpus_per_node: 8\ngpu: h100-sxm-80gb\n"


def faults(tmp_path: Path, text: str) -> tuple[Fault, ...]:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_cluster(tmp_path / "c.yaml")
    return caught.value.faults


def test_the_keys_are_those_of_the_schema() -> None:
    assert {key.removeprefix("slurm.") for key in SLURM_KEYS} == set(SlurmSection.model_fields)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:02:03", 3723),
        ("1-2", 93600),
        ("1-2:3", 93780),
        ("2-03:04:05", 183845),
        ("UNLIMITED", math.inf),
    ],
)
def test_a_time_limit_as_the_manual_of_sbatch_has_it(value: str, seconds: float) -> None:
    assert time_limit_seconds(value) == seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("0", None), ("64", 64 << 20), ("2G", 2 << 30), ("3000K", 3000 << 10)],
)
def test_memory_in_bytes(value: str | None, expected: int | None) -> None:
    assert memory_bytes(value) == expected


@pytest.mark.parametrize("value", ["", "0", "0:00:00", "1h", "1:2:3:4", "-5", "1-", "24 h"])
def test_what_is_no_time_limit(value: str, tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{WHERE}slurm: {{time_limit: '{value}'}}\n")
    assert fault.path == "slurm.time_limit"
    assert "time limit" in fault.message


def test_a_cluster_that_goes_through_slurm_loads(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"{WHERE}slurm: {{time_limit: 24:00:00, container: {{runtime: pyxis, image: x}}, setup: ['a\\nb']}}\n"
    )
    slurm = load_cluster(tmp_path / "c.yaml").config.slurm
    assert slurm.time_limit == "24:00:00"
    assert slurm.container is not None
    assert slurm.container.mounts == []


def test_other_resources_than_gpus_may_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{WHERE}slurm: {{extra: ['--gres=lscratch:100'], exclusive: user}}\n")
    slurm = load_cluster(tmp_path / "c.yaml").config.slurm
    assert (slurm.extra, slurm.exclusive) == (["--gres=lscratch:100"], "user")


def test_the_login_node_is_not_looked_at(tmp_path: Path) -> None:
    found = faults(tmp_path, "launch: slurm\n")
    assert [fault.path for fault in found] == ["gpus_per_node", "gpu"]
    assert all("the nodes are others" in fault.message for fault in found)


def test_slurms_keys_need_slurm(tmp_path: Path) -> None:
    found = faults(
        tmp_path, "slurm: {partition: gpu, exclusive: true, exclude: [], setup: [module load x]}\n"
    )
    assert [fault.path for fault in found] == ["slurm.partition", "slurm.exclusive", "slurm.setup"]
    assert all(fault.hint == "set launch: slurm, or take it out" for fault in found)


@pytest.mark.parametrize(
    ("slurm", "path", "said"),
    [
        ('{partition: "a\\nb"}', "slurm.partition", "one line"),
        ('{exclude: [n1, ""]}', "slurm.exclude.1", "one line"),
        ("{memory: 200 GB}", "slurm.memory", "memory such as 200G"),
        ("{extra: [mail]}", "slurm.extra.0", "no option of sbatch"),
        ("{extra: ['--mail-type=END', '--requeue']}", "slurm.extra.1", "launcher writes --requeue itself"),
        ("{extra: ['-N 3']}", "slurm.extra.0", "launcher writes --N itself"),
        ("{extra: ['#SBATCH --gres=gpu:8']}", "slurm.extra.0", "launcher writes --gres itself"),
        ("{extra: ['--gres=lscratch:100,gpu:a100:8']}", "slurm.extra.0", "launcher writes --gres itself"),
        ("{exclusive: topo}", "slurm.exclusive", "mcs"),
        ("{container: {runtime: docker, image: x}}", "slurm.container.runtime", "pyxis"),
        ("{partiton: gpu}", "slurm.partiton", "unknown"),
    ],
)
def test_what_slurm_would_not_take(tmp_path: Path, slurm: str, path: str, said: str) -> None:
    (fault,) = faults(tmp_path, f"{WHERE}slurm: {slurm}\n")
    assert fault.path == path
    assert re.search(said, fault.message)
