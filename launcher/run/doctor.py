"""Is this machine ready: what a run needs, what is here, and what to do about the difference."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from launcher.config.schema import ClusterConfig
from launcher.errors import LauncherError
from launcher.run.assemble import find_place
from launcher.run.checks import Check
from launcher.run.cluster_checks import examine_cluster
from launcher.run.environment import versions
from launcher.run.machine import Machine
from launcher.run.preflight import check_gpus
from launcher.sizes import size_in_words

ROOM = 20 << 30
"""Bytes of free disk under which a run of the smaller presets may not end."""

SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm that NCCL and data loader processes are content with."""


LARGE: Sequence[str] = ("torch", "transformers", "accelerate")
"""Packages of thousands of modules, which every rank loads."""


def examine(machine: Machine, cluster: ClusterConfig) -> list[Check]:
    """Every check, in the order a run would meet them. With SLURM this is a login node: it trains nothing."""
    if cluster.launch == "slurm":
        place = find_place(cluster, machine)
        return [_python(), *_packages(), *_bytecode(), *examine_cluster(cluster, place, Path.cwd()), _disk()]
    return [
        _python(),
        *_packages(),
        *_bytecode(),
        _accelerator(machine),
        _cluster(machine, cluster),
        Check("cpu", "ok", f"{machine.cores} cores, {size_in_words(machine.memory)} of memory"),
        _disk(),
        *_shared_memory(machine),
    ]


def _python() -> Check:
    return Check("python", "ok", f"{sys.version.split()[0]} in {sys.prefix}")


def _packages() -> list[Check]:
    return [
        Check(name, "ok", version)
        if version
        else Check(
            name, "missing", "not installed", "reinstall launcher: pip install --force-reinstall launcher"
        )
        for name, version in versions().items()
    ]


def _bytecode() -> list[Check]:
    """Whether every process would compile the modules of large packages anew: a rank loads in 12 s, not 5.

    So it is in an image made with PYTHONDONTWRITEBYTECODE or `pip --no-compile`. Where Python may keep what
    it compiles, the first start does so.
    """
    origins = [spec.origin for name in LARGE if (spec := find_spec(name)) is not None and spec.origin]
    without = [Path(origin).parent for origin in origins if not Path(cache_from_source(origin)).exists()]
    if not without:
        return [Check("bytecode", "ok", f"{', '.join(LARGE)} are compiled")]
    lasting = [folder for folder in without if sys.dont_write_bytecode or not os.access(folder, os.W_OK)]
    if not lasting:
        return []
    names = ", ".join(folder.name for folder in lasting)
    remedy = shlex.join(["python", "-m", "compileall", "-q", *map(str, lasting)])
    return [Check("bytecode", "warning", f"none for {names}: each process compiles them anew", remedy)]


def _accelerator(machine: Machine) -> Check:
    if not machine.gpus:
        return Check(
            "gpu", "warning", "none found", "training runs on the CPU, which suits small models only"
        )
    names = ", ".join(gpu.nvml_name for gpu in machine.gpus)
    if (versions()["torch"] or "").endswith("+cpu"):
        return Check(
            "gpu", "missing", f"{names}, and a torch built without CUDA", "install a CUDA build of torch"
        )
    return Check("gpu", "ok", f"{names}, driver {machine.driver}")


def _cluster(machine: Machine, cluster: ClusterConfig) -> Check:
    try:
        place = find_place(cluster, machine)
        check_gpus(place, machine)
    except LauncherError as error:
        return Check("cluster", "missing", error.message, error.hint)
    return Check(
        "cluster", "ok", f"{place.cluster}: {place.nodes} x {place.ranks_per_node} x {place.gpu.name}"
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{size_in_words(free)} free here"
    if free < ROOM:
        return Check(
            "disk", "warning", found, "checkpoints and token stores go to output_dir: set it to a larger disk"
        )
    return Check("disk", "ok", found)


def _shared_memory(machine: Machine) -> list[Check]:
    folder = Path("/dev/shm")
    if not machine.gpus or not folder.is_dir():
        return []
    size = shutil.disk_usage(folder).total
    found = f"{size_in_words(size)} in /dev/shm"
    if size < SHARED_MEMORY:
        return [
            Check("shared memory", "warning", found, "start the container with --shm-size=8g or --ipc=host")
        ]
    return [Check("shared memory", "ok", found)]
