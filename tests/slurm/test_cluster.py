"""The cluster that the other tests rely on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.slurm_cluster import NODES, Cluster, cluster


def test_nodes_are_machines_of_their_own(slurm: Cluster) -> None:
    said = slurm.run(
        "srun", "--nodes=3", "--gpus-per-node=2", "sh", "-c", "hostname; echo $SLURM_GPUS_ON_NODE"
    )
    assert sorted(said.split()) == ["2"] * 3 + sorted(NODES)
    seen = slurm.on("n1", "ps", "-eo", "comm").stdout
    assert "slurmd" in seen
    assert "slurmctld" not in seen


def test_a_node_that_is_cut_off_reaches_nobody(slurm: Cluster) -> None:
    reach = ("python3", "-c", "import socket; socket.create_connection(('n2', 22), 1)")
    assert "refused" in slurm.on("n1", *reach).stderr
    slurm.cut_off("n2")
    try:
        assert "timed out" in slurm.on("n1", *reach).stderr or "No route" in slurm.on("n1", *reach).stderr
    finally:
        slurm.reconnect("n2")


@pytest.mark.usefixtures("slurm")
def test_nothing_is_left_of_a_cluster() -> None:
    with cluster() as made:
        folder, bridge = made.folder, made.bridge
        children = [node.pid for node in made.nodes.values()]
        assert folder.is_dir()
    assert not folder.exists()
    assert bridge not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert str(folder) not in Path("/proc/mounts").read_text()
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in running
