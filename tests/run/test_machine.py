"""This machine against what the operating system says, and the selection of GPUs against CUDA's rules."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import MachineError
from launcher.run.machine import FoundGPU, Machine, find_machine, memory_limits, visible

MIB = 2**20
GPUS = tuple(
    FoundGPU(index, f"GPU-{prefix}-0000-0000", "NVIDIA H200", 143771 * MIB, "h200-sxm-141gb")
    for index, prefix in enumerate(("aa11", "aa22", "bb33", "cc44"))
)


def machine(*gpus: FoundGPU) -> Machine:
    return Machine("node", 8, 2**34, gpus, "580.0" if gpus else None)


def indices(selection: str | None) -> list[int]:
    return [gpu.index for gpu in visible(GPUS, selection)]


def test_the_machine_is_what_the_system_says() -> None:
    found = find_machine()
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    assert found.hostname == socket.gethostname()
    assert found.memory == min(int(total.split()[1]) * 1024, *memory_limits(Path("/")))
    assert found.cores == len(os.sched_getaffinity(0))


def limits(root: Path, groups: str, **files: str) -> list[int]:
    """`memory_limits` on a tree of control groups: `groups` is /proc's word, `files` hold the limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return sorted(memory_limits(root))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # A job of a scheduler, held to what its step, its job and the whole slice may use.
        (
            "0::/slurm/job_7/step_0\n",
            {
                "slurm/job_7/step_0/memory.max": "max",
                "slurm/job_7/memory.max": "4294967296",
                "slurm/memory.max": "8589934592",
                "slurm/job_8/memory.max": "1",
            },
            [2**32, 2**33],
        ),
        # The same under version 1, where other controllers have groups of their own.
        (
            "9:cpuset:/other\n4:memory:/slurm/job_7\n1:name=systemd:/other\n0::/\n",
            {
                "memory/slurm/job_7/memory.limit_in_bytes": "4294967296",
                "memory/slurm/memory.limit_in_bytes": "9223372036854771712",
                "cpuset/other/memory.limit_in_bytes": "1",
            },
            [2**32, 9223372036854771712],
        ),
        # A container of version 2: its own group is the root it sees.
        ("0::/\n", {"memory.max": "1073741824"}, [2**30]),
        # A container of version 1 is told its name outside, where it sees only its own group.
        ("4:memory:/docker/1f6c\n", {"memory/memory.limit_in_bytes": "1073741824"}, [2**30]),
        ("4:cpu,memory:/a:b\n", {"memory/a:b/memory.limit_in_bytes": "1073741824"}, [2**30]),
        ("0::/user.slice\n", {"user.slice/memory.max": "max"}, []),
    ],
)
def test_memory_is_what_the_control_groups_allow(
    tmp_path: Path, groups: str, files: dict[str, str], expected: list[int]
) -> None:
    assert limits(tmp_path, groups, **files) == expected


def test_without_control_groups_memory_is_the_machines(tmp_path: Path) -> None:
    assert list(memory_limits(tmp_path)) == []


def test_cores_are_those_the_process_may_use() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from launcher.run.machine import find_machine\n"
        "print(find_machine().cores)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_gpus_are_those_nvidia_smi_lists() -> None:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        expected = 0
    else:
        expected = sum(line.startswith("GPU ") for line in listed.splitlines())
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        pytest.skip("CUDA_VISIBLE_DEVICES hides some of them")
    found = find_machine()
    assert len(found.gpus) == expected
    assert (found.driver is None) == (expected == 0)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("3,0", [3, 0]),
        (" 1 , 2 ", [1, 2]),
        ("1,-1,2", [1]),
        ("GPU-bb33", [2]),
        ("GPU-cc44-0000-0000,0", [3, 0]),
    ],
)
def test_the_selection_is_cudas(selection: str | None, expected: list[int]) -> None:
    assert indices(selection) == expected


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        ("4", "none of this machine"),
        ("0,,1", "none of this machine"),
        ("all", "none of this machine"),
        ("MIG-aa11", "none of this machine"),
        ("0,0", "GPU 0 is there twice"),
        ("0,GPU-aa11", "GPU 0 is there twice"),
        ("GPU-aa", "several UUIDs"),
    ],
)
def test_a_selection_that_cuda_would_quietly_cut_is_refused(selection: str, reason: str) -> None:
    with pytest.raises(MachineError, match=reason) as refused:
        indices(selection)
    assert selection in refused.value.message


@given(st.permutations(range(4)), st.integers(0, 4))
def test_any_order_of_indices_is_kept(order: list[int], count: int) -> None:
    chosen = order[:count]
    assert indices(",".join(map(str, chosen))) == chosen


def test_a_selection_means_nothing_without_gpus() -> None:
    assert visible((), "0,1") == ()


def test_no_gpu_has_no_name() -> None:
    assert machine().gpu() is None


def test_the_kind_has_the_memory_that_was_found() -> None:
    smaller = FoundGPU(1, "GPU-dd", "NVIDIA H200", 143000 * MIB, "h200-sxm-141gb")
    kind = machine(GPUS[0], smaller).gpu()
    assert kind is not None
    assert (kind.name, kind.memory) == ("h200-sxm-141gb", 143000 * MIB)


def test_an_unknown_kind_is_refused_only_when_it_is_asked_for() -> None:
    unknown = machine(FoundGPU(0, "GPU-ee", "NVIDIA A10G", 23028 * MIB, None))
    assert len(unknown.gpus) == 1
    with pytest.raises(MachineError, match=r"A10G with 22\.5 GiB") as refused:
        unknown.gpu()
    assert refused.value.hint is not None
    assert "gpu: {name: ..., memory_gb: 24, bf16_tflops: ...}" in refused.value.hint


def test_gpus_of_two_kinds_are_refused() -> None:
    other = FoundGPU(4, "GPU-ff", "NVIDIA L4", 23034 * MIB, "l4-24gb")
    with pytest.raises(MachineError, match="NVIDIA H200, NVIDIA L4") as refused:
        machine(*GPUS, other).gpu()
    assert refused.value.hint is not None
    assert "CUDA_VISIBLE_DEVICES" in refused.value.hint
