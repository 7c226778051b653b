"""What this machine is: its cores, its memory and its GPUs, as found."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from launcher.errors import MachineError
from launcher.plan.hardware import GIGA, GPU, find_gpu, from_nvml
from launcher.sizes import size_in_words

VISIBLE = "CUDA_VISIBLE_DEVICES"
NVML = "libnvidia-ml.so.1"
"""The driver's own library: installed with it, and shown to containers that may use its GPUs."""


@dataclass(frozen=True, slots=True)
class FoundGPU:
    """A GPU as NVML describes it: `index` in PCI bus order, `memory` in bytes.

    `catalogue` is its name in the catalogue, None for a kind that is not there.
    """

    index: int
    uuid: str
    nvml_name: str
    memory: int
    catalogue: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine: `cores` that this process may run on, `memory` in bytes that it may fill, `gpus`
    visible to it."""

    hostname: str
    cores: int
    memory: int
    gpus: tuple[FoundGPU, ...]
    driver: str | None

    def gpu(self) -> GPU | None:
        """The one kind of GPU this machine has, with the memory found on the smallest; None without GPUs.

        Raises MachineError for a kind that the catalogue does not have, and for GPUs of several kinds.
        """
        if not self.gpus:
            return None
        names = sorted({gpu.nvml_name for gpu in self.gpus})
        if len(names) > 1:
            raise MachineError(
                f"this machine has GPUs of different kinds: {', '.join(names)}",
                hint=f"choose those of one kind with {VISIBLE}",
            )
        smallest = min(self.gpus, key=lambda gpu: gpu.memory)
        if smallest.catalogue is None:
            raise MachineError(
                f"the catalogue does not have {smallest.nvml_name} with {size_in_words(smallest.memory)}",
                hint="describe it in a cluster file: --cluster FILE with gpu: {name: ..., memory_gb: "
                f"{smallest.memory / GIGA:.0f}, bf16_tflops: ...}}",
            )
        return replace(find_gpu(smallest.catalogue), memory=smallest.memory)


def find_machine() -> Machine:
    """Look at this machine. Raises MachineError where its GPUs cannot be read or are wrongly selected."""
    gpus, driver = _find_gpus()
    return Machine(
        hostname=socket.gethostname(),
        cores=_cores(),
        memory=min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *memory_limits(Path("/"))),
        gpus=visible(gpus, os.environ.get(VISIBLE)),
        driver=driver,
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limits(root: Path) -> Iterator[int]:
    """Bytes of memory that a container or a scheduler's job is held to, from `root`/proc and `root`/sys.

    A control group is held to its own limit and to those of every group above it (cgroups(7); both
    versions). A container may see only its own group, as the root of the tree, under a name that does
    not stand there: then that root's limit counts.
    """
    for group, files in _memory_groups(root):
        yield from _limit(group / files.limit)


def memory_left(root: Path = Path("/")) -> int:
    """Bytes of memory that may still be filled: of this machine's, and of what a control group is held to.

    What files are read from memory instead of from disk (`inactive_file`) is given up when it is needed.
    """
    import psutil

    left = int(psutil.virtual_memory().available)
    for group, files in _memory_groups(root):
        for limit, used in zip(_limit(group / files.limit), _limit(group / files.used), strict=False):
            left = min(left, limit - used + sum(_cached(group / "memory.stat", files.cached)))
    return max(left, 0)


class _MemoryFiles(NamedTuple):
    limit: str
    used: str
    cached: str


def _memory_groups(root: Path) -> Iterator[tuple[Path, _MemoryFiles]]:
    """This process's control group for memory and each above it, and what its files are called."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        number, controllers, name = group.split(":", 2)
        if number == "0":
            tree = root / "sys/fs/cgroup"
            files = _MemoryFiles("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            tree = root / "sys/fs/cgroup/memory"
            files = _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for depth in range(len(Path(name).parts)):
            yield tree.joinpath(*Path(name).parts[1 : depth + 1]), files


def _cached(file: Path, name: str) -> Iterator[int]:
    """The number that `file` has under `name`, if there is such a file."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    yield from (int(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed here for their memory, ever: of this process's control group
    and those below it (`memory.events`), or of the whole machine (`/proc/vmstat`) where that is not told."""
    try:
        group = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1].split(":", 2)
        files = [root / "sys/fs/cgroup" / group[2].lstrip("/") / "memory.events", root / "proc/vmstat"]
    except (OSError, IndexError):
        files = [root / "proc/vmstat"]
    for file in files:
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        found = [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
        if found:
            return found[0]
    return 0


def _limit(file: Path) -> Iterator[int]:
    """The number in `file`, if there is such a file and it holds one: `max` is no limit."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return
    if text.isdecimal():
        yield int(text)


def _find_gpus() -> tuple[list[FoundGPU], str | None]:
    """Every GPU of this machine, and the driver's version; none where there is no NVIDIA driver."""
    try:
        # What pynvml itself would load first: a machine without it need not wait for pynvml.
        ctypes.CDLL(NVML)
    except OSError:
        return [], None
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return [], None
    except pynvml.NVMLError as error:
        raise MachineError(
            f"the NVIDIA driver does not answer: {error}",
            hint="see what nvidia-smi says; after an update of the driver the machine must be started again",
        ) from error
    try:
        gpus = [_describe(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return gpus, str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        raise MachineError(
            f"a GPU of this machine cannot be read: {error}", hint="see what nvidia-smi says"
        ) from error
    finally:
        pynvml.nvmlShutdown()


def _describe(index: int) -> FoundGPU:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = str(pynvml.nvmlDeviceGetName(handle))
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    known = from_nvml(name, memory)
    return FoundGPU(
        index=index,
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        nvml_name=name,
        memory=memory,
        catalogue=None if known is None else known.name,
    )


def visible(gpus: Sequence[FoundGPU], selection: str | None) -> tuple[FoundGPU, ...]:
    """Those of `gpus` that CUDA shows under CUDA_VISIBLE_DEVICES=`selection`, in its order; None: all.

    An entry is an index or the beginning of a UUID; -1, or nothing, selects none. Raises MachineError
    for any other entry, where CUDA would quietly hide it and all that follow.
    """
    if selection is None or not gpus:
        return tuple(gpus)
    chosen: list[FoundGPU] = []
    for entry in selection.split(",") if selection.strip() else []:
        wanted = entry.strip()
        if wanted == "-1":
            break
        matches = [gpu for gpu in gpus if wanted == str(gpu.index) or _begins(gpu.uuid, wanted)]
        if len(matches) != 1 or matches[0] in chosen:
            raise MachineError(
                f"{VISIBLE}={selection}: {_fault(wanted, matches)}",
                hint=f"this machine has GPUs 0 to {len(gpus) - 1}; nvidia-smi -L lists them",
            )
        chosen.append(matches[0])
    return tuple(chosen)


def _begins(uuid: str, wanted: str) -> bool:
    return wanted.startswith("GPU-") and uuid.startswith(wanted)


def _fault(wanted: str, matches: Sequence[FoundGPU]) -> str:
    if not matches:
        return f"{wanted!r} is none of this machine's GPUs"
    if len(matches) > 1:
        return f"{wanted!r} is the beginning of several UUIDs"
    return f"GPU {matches[0].index} is there twice"
