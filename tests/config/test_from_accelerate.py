"""accelerate files in launcher's words, against what accelerate reads in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config import old_files
from tests.config.old_files import SAMPLES, conflicts, of, said


def test_fsdp_on_four_nodes() -> None:
    assert said(of(accelerate=old_files.FSDP2_ON_FOUR_NODES)) == {
        "cluster.nodes": 4,
        "cluster.gpus_per_node": 8,
        "train.strategy": "fsdp",
        "train.offload": "parameters",
        "train.gradient_checkpointing": True,
        "train.precision": "bf16",
    }


def test_plain_ranks_and_torch_compile() -> None:
    assert said(of(accelerate=old_files.MULTI_GPU)) == {
        "cluster.nodes": 1,
        "cluster.gpus_per_node": 8,
        "train.strategy": "ddp",
        "train.compile": True,
        "train.precision": "fp16",
    }


@pytest.mark.parametrize(
    ("content", "key", "says"),
    [
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type", "MEGATRON_LM"),
        ({"mixed_precision": "bf16"}, "distributed_type", "not set"),
        ({"distributed_type": "NO", "mixed_precision": "fp8"}, "mixed_precision", "fp8"),
        ({"distributed_type": "NO", "num_processes": 2}, "distributed_type", "world would be"),
        (
            {"distributed_type": "MULTI_GPU", "num_machines": 3, "num_processes": 8},
            "num_processes",
            "2 on each",
        ),
        ({"distributed_type": "MULTI_GPU", "num_processes": "8"}, "num_processes", "whole number"),
        (
            {"distributed_type": "MULTI_GPU", "deepspeed_config": {"zero_stage": 3}},
            "deepspeed_config",
            "not use",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD"}},
            "fsdp_config.fsdp_sharding_strategy",
            "HYBRID_SHARD",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"reshard_after_forward": False}},
            "fsdp_config.reshard_after_forward",
            "false",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}},
            "deepspeed_config.zero_stage",
            "stage 0",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"offload_optimizer_device": "nvme"}},
            "deepspeed_config.offload_optimizer_device",
            "NVMe",
        ),
        ({"distributed_type": "NO", "dynamo_backend": "AOT_EAGER"}, "dynamo_backend", "AOT_EAGER"),
        (
            {"distributed_type": "NO", "parallelism_config": {"tp_size": 2}},
            "parallelism_config.tp_size",
            "tensor parallelism",
        ),
        (
            {"distributed_type": "NO", "compute_environment": "AMAZON_SAGEMAKER"},
            "compute_environment",
            "SageMaker",
        ),
        ({"distributed_type": "NO", "fsdp_config": "full"}, "fsdp_config", "expected a mapping of keys"),
        ({"distributed_type": "NO", "use_cpu": "perhaps"}, "use_cpu", "true or false"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_launcher_does_not_do_of_accelerate(content: dict[str, Any], key: str, says: str) -> None:
    found = conflicts(None, content)
    assert set(found) == {key}
    assert says in found[key]


def why_left(content: dict[str, Any]) -> dict[str, str]:
    return {left.key: left.why for left in of(accelerate=content).left}


def test_what_is_said_of_a_key_is_true_of_its_value() -> None:
    cpu = why_left({"distributed_type": "MULTI_CPU", "use_cpu": True, "compute_environment": "LOCAL_MACHINE"})
    assert "distributed_type" not in cpu, "the strategy is taken over from it, and nothing of it is lost"
    assert cpu["compute_environment"] == "it does not ask for what launcher does not have: SageMaker support"
    alone = why_left({"distributed_type": "NO", "use_cpu": False})
    assert "it is so without it" in alone["use_cpu"]
    assert "one rank" in alone["distributed_type"]


@pytest.mark.parametrize("name", ["fsdp", "multi_gpu", "deepspeed", "both"])
def test_accelerate_reads_the_same(name: str, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = tmp_path / "accelerate.yaml"
    file.write_text(SAMPLES[name][1] or "")
    read: Any = load_config_from_file(str(file))
    ours = said(of(*SAMPLES[name]))
    assert read.num_machines == ours["cluster.nodes"]
    assert read.num_processes == ours["cluster.nodes"] * ours["cluster.gpus_per_node"]  # type: ignore[operator]
    assert ours["train.precision"] == (read.mixed_precision or "bf16")
    engine = {"FSDP": "fsdp", "MULTI_GPU": "ddp"}.get(read.distributed_type.value)
    assert ours["train.strategy"] == engine or engine is None
    if read.deepspeed_config.get("zero_stage"):
        assert ours["train.strategy"] == f"zero{read.deepspeed_config['zero_stage']}"
    assert ours.get("train.gradient_checkpointing") == read.fsdp_config.get("fsdp_activation_checkpointing")
    assert ours.get("train.compile", False) == (read.dynamo_config.get("dynamo_backend") == "INDUCTOR")


def test_yaml_of_1_1_is_read_as_accelerate_reads_it() -> None:
    text = "distributed_type: NO\nmixed_precision: no\nuse_cpu: yes\nnum_processes: 1\n"
    assert yaml.safe_load(text) == {
        "distributed_type": False,
        "mixed_precision": False,
        "use_cpu": True,
        "num_processes": 1,
    }
    assert said(of(accelerate=text.replace(" no\n", " false\n"))) == said(of(accelerate=text))
    assert said(of(accelerate=text)) == {
        "train.precision": "fp32",
        "cluster.gpu": "cpu",
        "cluster.gpus_per_node": 1,
    }


def test_every_key_of_accelerate_is_known() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    content = dict.fromkeys(ClusterConfig.__dataclass_fields__) | {"distributed_type": "NO"}
    assert not [left for left in of(accelerate=content).left if "does not know" in left.why]
