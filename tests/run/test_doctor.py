from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from launcher.config.schema import ClusterConfig
from launcher.run.checks import Check
from launcher.run.doctor import LARGE, examine
from launcher.run.machine import FoundGPU, Machine, find_machine

H200 = FoundGPU(0, "GPU-aa", "NVIDIA H200", 143_771 * 2**20, "h200-sxm-141gb")
BARE = Machine("node", 8, 2**34, (), None)


def found(machine: Machine, **cluster: object) -> dict[str, Check]:
    return {check.name: check for check in examine(machine, ClusterConfig.model_validate(cluster))}


def test_this_machine_can_run_these_tests_and_says_so() -> None:
    checks = found(find_machine(), gpu="cpu", gpus_per_node=2)
    assert checks["torch"] == Check("torch", "ok", metadata.version("torch"))
    assert checks["cluster"].found == "this-machine: 1 x 2 x cpu"
    missing = [name for name, check in checks.items() if check.state == "missing" and name != "gpu"]
    assert missing == []
    assert checks["cpu"].found.startswith(f"{len(os.sched_getaffinity(0))} cores")


def test_packages_that_every_process_would_compile_anew(tmp_path: Path) -> None:
    """In a process that has packages of these names and no others, with and without their bytecode."""
    for name in LARGE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    program = "from launcher.run.doctor import _bytecode; print(_bytecode())"

    def said(**environment: str) -> str:
        path = f"{tmp_path}:{Path(__file__).parents[2]}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert said(PYTHONDONTWRITEBYTECODE="") == "[]\n", "the first start would write it"
    kept_out = said(PYTHONDONTWRITEBYTECODE="1")
    assert "warning" in kept_out
    assert "none for torch, transformers, accelerate" in kept_out
    command = kept_out.partition("remedy='python -m ")[2].partition("'")[0].split()
    subprocess.run([sys.executable, "-m", *command], check=True)
    assert "ok" in said(PYTHONDONTWRITEBYTECODE="1")


def test_without_a_gpu_there_is_a_warning_and_a_cpu_run_is_fine() -> None:
    checks = found(BARE)
    assert checks["gpu"].state == "warning"
    assert checks["cluster"] == Check("cluster", "ok", "this-machine: 1 x 1 x cpu")
    assert "shared memory" not in checks


def test_a_cluster_that_this_machine_is_not() -> None:
    check = found(BARE, name="lab", gpu="h100-sxm-80gb", gpus_per_node=8)["cluster"]
    assert check.state == "missing"
    assert "8 x h100-sxm-80gb" in check.found
    assert check.remedy


@pytest.mark.skipif(not metadata.version("torch").endswith("+cpu"), reason="this torch has CUDA")
def test_a_torch_without_cuda_beside_gpus_is_found() -> None:
    check = found(Machine("node", 8, 2**34, (H200,), "580.1"))["gpu"]
    assert check.state == "missing"
    assert "built without CUDA" in check.found
    assert "CUDA build of torch" in (check.remedy or "")


def test_gpus_that_are_no_kind_it_knows_are_a_remedy_away() -> None:
    strange = FoundGPU(0, "GPU-bb", "NVIDIA Unheard Of", 2**33, None)
    check = found(Machine("node", 8, 2**34, (strange,), "580.1"))["cluster"]
    assert check.state == "missing"
    assert "NVIDIA Unheard Of" in check.found
    assert "shared memory" in found(Machine("node", 8, 2**34, (strange,), "580.1"))


def test_every_state_but_ok_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for machine in (BARE, Machine("node", 8, 2**34, (H200,), "580.1")):
        for check in found(machine, gpu="t4-16gb", gpus_per_node=4).values():
            assert check.found
            assert check.state == "ok" or check.remedy, check
