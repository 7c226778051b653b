"""A cluster against what is asked of it, where SLURM's commands answer as they did (Slurm 22.05).

Against a real one: tests/slurm/test_submit.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.schema import ClusterConfig, SlurmSection
from launcher.plan.choose import Place
from launcher.plan.hardware import CATALOGUE
from launcher.run import slurm
from launcher.run.checks import Check
from launcher.run.cluster_checks import examine_cluster

PARTITION = "PartitionName={} AllowGroups=ALL Default={} MaxTime={} GraceTime=0 Nodes={} State=UP"
NODE = "NodeName={} CPUTot=64 RealMemory=500000 State=IDLE Gres={}"
ANSWERS = {
    "show config": "SLURM_VERSION = 22.05.8\nClusterName = drill\nKillWait = 30 sec",
    "show node": "\n".join(
        (
            NODE.format("n1", "gpu:a100:8(S:0-1)"),
            NODE.format("n2", "gpu:a100:8(S:0-1)"),
            NODE.format("n3", "gpu:a100:2,gpu:v100:4"),
        )
    ),
    "show partition": PARTITION.format("short", "YES", "01:00:00", "n1,n2,n3"),
    "--all show partition": "\n".join(
        (
            PARTITION.format("short", "YES", "01:00:00", "n1,n2,n3"),
            PARTITION.format("hidden", "NO", "UNLIMITED", "n1,n2,n3"),
        )
    ),
}


@pytest.fixture(autouse=True)
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*command: str, **_: object) -> str:
        words = " ".join(command).replace("--oneliner ", "").removeprefix("scontrol ")
        if words.startswith("show hostnames"):
            return command[-1].replace(",", "\n")
        return ANSWERS.get(words, "")

    monkeypatch.setattr(slurm, "said", said)


def missing(nodes: int, gpus: int, **asked: str) -> list[Check]:
    """What a cluster file that asks for so much in vain is told."""
    cluster = ClusterConfig(launch="slurm", slurm=SlurmSection.model_validate(asked))
    place = Place("drill", nodes, gpus, CATALOGUE["a100-sxm-80gb"])
    return [check for check in examine_cluster(cluster, place, Path("/")) if check.state == "missing"]


@pytest.mark.parametrize("partition", ["hidden", "short,hidden", "hidden,short"])
def test_one_of_several_partitions_is_enough_and_it_may_be_hidden(partition: str) -> None:
    assert missing(2, 8, partition=partition, time_limit="2:00:00") == []


def test_every_partition_of_a_list_is_to_be_there() -> None:
    (check,) = missing(2, 8, partition="short,nope")
    assert (check.found, check.remedy) == ("there is no partition nope", "one of: short, hidden")


def test_gpus_are_counted_by_the_type_that_is_asked_for() -> None:
    assert missing(2, 8, gpu_type="a100") == []
    assert missing(1, 4, gpu_type="v100") == []
    (check,) = missing(1, 6, gpu_type="v100")
    assert (check.name, check.key) == ("v100 GPUs", "gpus_per_node")
    assert check.found.endswith("the most that one has is 4")


def test_where_no_partition_would_do_the_first_says_why() -> None:
    (check,) = missing(3, 8, partition="hidden,short")
    assert check.found.startswith("8 are asked for on each node; 2 nodes of partition hidden have them")
