"""A SLURM cluster as it is against what its cluster file asks of it, looked at from a login node.

SLURM takes many jobs that can never start, and lets them wait: these checks say so beforehand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from launcher.config.schema import ClusterConfig
from launcher.config.slurm import memory_bytes, time_limit_seconds
from launcher.errors import LauncherError, MachineError, RequestError
from launcher.plan.choose import Place
from launcher.run import slurm
from launcher.run.checks import Check
from launcher.run.stopping import Need

OLDEST: Final = (22, 5)
"""The Slurm that this was tried with. Older ones hand --cpus-per-task to srun, and word things otherwise."""

SHARED: Final = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "lustre",
            "gpfs",
            "beegfs",
            "ceph",
            "glusterfs",
            "afs",
            "cifs",
            "smb3",
            "9p",
            "virtiofs",
        ),
        *(
            "fuse.glusterfs",
            "fuse.ceph",
            "fuse.juicefs",
            "wekafs",
            "panfs",
            "pvfs2",
            "orangefs",
            "fuse.sshfs",
        ),
    }
)
"""File systems that several machines may have; any other is on this one alone, as far as can be told."""


def examine_cluster(
    cluster: ClusterConfig, place: Place, folder: Path, need: Need | None = None
) -> Iterator[Check]:
    """Every check, in the order a job would meet them. `folder`: where runs go; `need`: what a stop takes."""
    try:
        settings = slurm.configuration()
        partitions = slurm.partitions()
        nodes = {node.name: node for node in slurm.nodes()}
    except LauncherError as error:
        yield Check("slurm", "missing", error.message, error.hint)
        return
    yield _version(settings)
    asked = cluster.slurm.partition
    wanted = asked.split(",") if asked else [each.name for each, default in partitions if default]
    known = {each.name: each for each, _ in partitions}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        names = ", ".join(known)
        said = f"there is no partition {unknown[0]}" if unknown else "no partition is the default"
        yield Check("partition", "missing", said, f"one of: {names}", "slurm.partition")
    else:
        yield _allowed(cluster)
        tried = [list(_partition(cluster, place, known[name], nodes, settings, need)) for name in wanted]
        # SLURM starts the job in any of them: one that would do is enough.
        yield from min(tried, key=lambda checks: any(check.state == "missing" for check in checks))
    yield _folder(folder)


def _partition(
    cluster: ClusterConfig,
    place: Place,
    partition: slurm.Partition,
    nodes: Mapping[str, slurm.Node],
    settings: Mapping[str, str],
    need: Need | None,
) -> Iterator[Check]:
    """Whether the job could run in this partition; `nodes` are those of the cluster, by name."""
    without = slurm.hosts(",".join(cluster.slurm.exclude))
    # A node may be named in a partition and not be there yet (State=FUTURE).
    within = [nodes[name] for name in partition.nodes if name in nodes and name not in without]
    yield Check("partition", "ok", f"{partition.name}: {len(within)} nodes")
    yield _time_limit(cluster, partition)
    yield from _nodes(cluster, place, partition.name, within)
    if need is not None:
        yield from stop_checks(settings, partition, need)


def _version(settings: Mapping[str, str]) -> Check:
    version = settings.get("SLURM_VERSION", "")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        return Check(
            "slurm",
            "warning",
            f"Slurm {version}",
            f"launcher was tried with {OLDEST[0]}.{OLDEST[1]:02d} and on",
        )
    return Check("slurm", "ok", f"Slurm {version}, cluster {settings.get('ClusterName', '')}")


def _time_limit(cluster: ClusterConfig, partition: slurm.Partition) -> Check:
    asked = cluster.slurm.time_limit
    limit = "no limit" if partition.limit is None else f"{as_time(partition.limit)} at most"
    if asked is not None and partition.limit is not None and time_limit_seconds(asked) > partition.limit:
        return Check(
            "time limit",
            "missing",
            f"{asked} is asked for, and partition {partition.name} gives {limit}: it would wait for ever",
            f"set slurm.time_limit: {as_time(partition.limit)}; a longer run goes on by itself",
            "slurm.time_limit",
        )
    return Check("time limit", "ok", f"{asked or 'the default of the partition'}, of {limit}")


def _allowed(cluster: ClusterConfig) -> Check:
    """Whether SLURM lets this user submit as the file says, by trying the smallest such job."""
    asked = [
        f"--{key}={value}"
        for key in ("partition", "account", "qos", "reservation")
        if (value := getattr(cluster.slurm, key)) is not None
    ]
    name, given = "account", cluster.slurm.account or "your default account"
    try:
        env = slurm.submission_environment(cluster.slurm)
        slurm.said("sbatch", "--test-only", *asked, "--output=/dev/null", "--wrap=true", env=env)
    except MachineError as error:
        return Check("sbatch", "missing", error.message, error.hint)
    except RequestError as error:
        # Whether there are nodes for it just now is looked at by itself.
        if error.key in ("slurm.account", "slurm.qos", "slurm.reservation"):
            return Check(error.key.removeprefix("slurm."), "missing", error.message, error.hint, error.key)
    return Check(name, "ok", f"SLURM takes jobs for {given}")


def as_time(seconds: int) -> str:
    """A time as SLURM writes it."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def _nodes(cluster: ClusterConfig, place: Place, partition: str, nodes: list[slurm.Node]) -> Iterator[Check]:
    if len(nodes) < place.nodes:
        yield Check(
            "nodes",
            "missing",
            f"{place.nodes} are asked for, and partition {partition} has {len(nodes)} without those excluded",
            f"set nodes: {len(nodes)}, or another slurm.partition",
            "nodes",
        )
        return
    able = list(nodes)
    for name, key, asked, has in _demands(cluster, place):
        able = [node for node in able if has(node) >= asked]
        if len(able) < place.nodes:
            best = max((has(node) for node in nodes), default=0)
            yield Check(
                name,
                "missing",
                f"{asked} are asked for on each node; {len(able)} nodes of partition {partition} have them, "
                f"and the most that one has is {best}",
                f"set {key} to what a node has, or slurm.partition to one whose nodes have it",
                key,
            )
            return
    up = [node for node in able if not node.is_out]
    out = ", ".join(f"{node.name} {node.state}" for node in able if node.is_out)
    if len(up) < place.nodes:
        found = f"{len(up)} of the {len(able)} nodes that would do are up ({out})"
        yield Check("nodes", "warning", found, "the job waits until more are: `sinfo --list-reasons`")
    else:
        yield Check("nodes", "ok", f"{len(up)} that would do are up" + (f"; out: {out}" if out else ""))


def _demands(
    cluster: ClusterConfig, place: Place
) -> Iterator[tuple[str, str, int, Callable[[slurm.Node], int]]]:
    """What each node must have: (what it is, key, how much, how much a node has)."""
    if not place.is_cpu:
        kind = cluster.slurm.gpu_type
        name = f"{kind} GPUs" if kind else "GPUs"
        yield name, "gpus_per_node", place.ranks_per_node, lambda node: slurm.gpus_in(node.gres, kind)
    if place.cores is not None:
        yield "CPUs", "slurm.cpus_per_node", place.cores, lambda node: node.cpus
    if (memory := memory_bytes(cluster.slurm.memory)) is not None:
        yield "MiB of memory", "slurm.memory", memory >> 20, lambda node: node.memory


def stop_checks(settings: Mapping[str, str], partition: slurm.Partition, need: Need) -> Iterator[Check]:
    """Whether a safe stop fits into what the cluster gives before it kills."""
    kill_wait = slurm.seconds_in(settings.get("KillWait")) or 0
    given = partition.grace or kill_wait
    name = f"GraceTime of partition {partition.name}" if partition.grace else "KillWait"
    takes = f"a safe stop takes {'' if need.measured else 'by estimate '}{need.seconds:.0f} s"
    if need.seconds > given:
        yield Check(
            "preemption",
            "warning",
            f"{takes}, and {name} gives {given} s: a preemption costs what came after the last checkpoint",
            "lower checkpoint.every, or take a partition with a longer GraceTime",
        )
    else:
        yield Check("preemption", "ok", f"{takes}, and {name} gives {given} s")


def _folder(folder: Path) -> Check:
    """Whether other machines may see it, as far as can be told from here; the job itself proves it."""
    mount, kind = file_system(folder)
    if kind in SHARED:
        return Check("run directory", "ok", f"{folder} is on {kind}")
    return Check(
        "run directory",
        "warning",
        f"{folder} is on {kind} ({mount}), which other machines may not see",
        "set output_dir to a folder that all nodes have; the job stops at once where they do not",
    )


def file_system(folder: Path) -> tuple[str, str]:
    """Where the file system of `folder` is mounted, and its kind, by /proc/self/mounts."""
    path = os.path.realpath(folder)
    found = ("/", "unknown")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind, *_ = line.split()
        mount = mount.encode().decode("unicode_escape")
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(found[0]):
            found = (mount, kind)
    return found
