"""DeepSpeed files in launcher's words, against what DeepSpeed reads in them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError
from tests.config import old_files
from tests.config.old_files import conflicts, of, said


def test_zero2_with_offload() -> None:
    assert said(of(old_files.ZERO2_WITH_OFFLOAD)) == {
        "train.batch_size": 256,
        "train.micro_batch": 4,
        "train.steps": 5000,
        "train.learning_rate": 3e-4,
        "train.schedule": "linear",
        "train.warmup": 200,
        "train.weight_decay": 0.05,
        "train.betas": [0.9, 0.98],
        "train.extra.adam_epsilon": 1e-6,
        "train.max_grad_norm": 0.5,
        "train.precision": "bf16",
        "train.strategy": "zero2",
        "train.offload": "optimizer",
    }


def test_the_trainers_auto_is_left_to_launcher_or_to_the_person() -> None:
    conversion = of(old_files.TRAINER_ZERO3)
    assert said(conversion) == {
        "train.strategy": "zero3",
        "train.offload": "parameters",
        "train.schedule": "constant",
    }
    why = {left.key: left.why for left in conversion.left}
    assert why["train_micro_batch_size_per_gpu"] == "auto: launcher works it out"
    assert why["optimizer.params.lr"] == "auto: the training arguments said it: set train.learning_rate"
    assert "train.precision" in why["bf16.enabled"]
    assert "bucket sizes" in why["zero_optimization.reduce_bucket_size"]


@pytest.mark.parametrize(
    ("content", "key", "says"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled", "fp16, and bf16"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage", "stage 0"),
        ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.stage", "default"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "expected 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}},
            "zero_optimization.offload_param.device",
            "NVMe",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device",
            "as train.offload: train.strategy zero2 cannot keep the parameters",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            "zero_optimization.zero_hpz_partition_size",
            "ZeRO++",
        ),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type", "AdamW"),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "optimizer.params.adam_w_mode",
            "L2",
        ),
        ({"optimizer": {"params": {"lr": "fast"}}}, "optimizer.params.lr", "expected a number"),
        ({"optimizer": {"params": {"lr": 0}}}, "optimizer.params.lr", "as train.learning_rate: "),
        ({"optimizer": {"params": {"betas": [0.9, 1.0]}}}, "optimizer.params.betas", "as train.betas: "),
        (
            {"optimizer": {"params": {"bias_correction": False}}},
            "optimizer.params.bias_correction",
            "bias correction",
        ),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type", "OneCycle"),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1}}},
            "scheduler.params.cos_min_ratio",
            "above zero",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}},
            "scheduler.params.warmup_type",
            "logarithmic",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "total_num_steps": 8}}},
            "scheduler.params.warmup_num_steps",
            "as train.warmup: ",
        ),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale", "fixed loss scale"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size", "sequence parallelism"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size", "tensor parallelism"),
        ({"pipeline": {"stages": 4}}, "pipeline.stages", "pipeline parallelism"),
        ({"moe": {"enabled": True}, "bf16": {}}, "moe.enabled", "mixture-of-experts"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled", "curriculum"),
        ({"bf16": True}, "bf16", "expected a mapping of keys"),
        ({"zero_optimization": True}, "zero_optimization", "expected a mapping of keys"),
        ({"train_batch_size": 1.5}, "train_batch_size", "whole number from 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_launcher_does_not_do_of_deepspeed(content: dict[str, Any], key: str, says: str) -> None:
    found = conflicts(content)
    assert set(found) == {key}
    assert says in found[key]


def test_a_learning_rate_that_deepspeed_never_used() -> None:
    peak = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}}
    found = conflicts({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}, "scheduler": peak})
    assert set(found) == {"scheduler.type"}
    assert "would be 0.001, and 0.0003" in found["scheduler.type"]


def test_json_indented_with_tabs() -> None:
    text = json.dumps(json.loads(old_files.ZERO2_WITH_OFFLOAD), indent="\t")
    assert said(of(text)) == said(of(old_files.ZERO2_WITH_OFFLOAD))


_DEEPSPEED_READS = """
import json, sys
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig

# In place of a process group: DeepSpeed counts one rank where it finds none.
deepspeed.comm.get_rank = lambda: 0

class Ranks:
    def __init__(self, ranks): self.ranks = ranks
    def get_data_parallel_world_size(self): return self.ranks

read = []
for content, ranks in json.load(sys.stdin):
    try:
        config = DeepSpeedConfig(content, mpu=Ranks(ranks))
    except AssertionError:
        read.append(None)
        continue
    zero = config.zero_config
    read.append({
        "batch": [config.train_batch_size, config.train_micro_batch_size_per_gpu],
        "clip": config.gradient_clipping, "stage": int(zero.stage),
        "offload": zero.offload_optimizer and json.loads(zero.offload_optimizer.model_dump_json())["device"],
        "bf16": config.bfloat16_config.enabled, "fp16": config.float16_config.enabled,
        "optimizer": config.optimizer_params, "scheduler": config.scheduler_params,
    })
json.dump(read, open(sys.argv[1], "w"))
"""


def read_by_deepspeed(asked: list[tuple[dict[str, Any], int]], folder: Path) -> list[Any]:
    """What DeepSpeed reads in each content at so many ranks; None where it refuses the batch."""
    done = subprocess.run(
        [sys.executable, "-c", _DEEPSPEED_READS, str(folder / "read.json")],
        input=json.dumps(asked),
        text=True,
        capture_output=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads((folder / "read.json").read_text()))


def test_deepspeed_reads_the_same(tmp_path: Path) -> None:
    content = json.loads(old_files.ZERO2_WITH_OFFLOAD)
    read, bare = read_by_deepspeed([(content, 16), ({"train_batch_size": 8}, 1)], tmp_path)
    ours = said(of(old_files.ZERO2_WITH_OFFLOAD))
    assert read["batch"] == [ours["train.batch_size"], ours["train.micro_batch"]]
    assert read["clip"] == ours["train.max_grad_norm"]
    assert bare["clip"] == said(of({"train_batch_size": 8}))["train.max_grad_norm"]
    assert f"zero{read['stage']}" == ours["train.strategy"]
    assert (read["offload"], ours["train.offload"]) == ("cpu", "optimizer")
    assert (read["bf16"], read["fp16"], ours["train.precision"]) == (True, False, "bf16")
    assert read["optimizer"]["lr"] == ours["train.learning_rate"]
    assert read["scheduler"]["warmup_num_steps"] == ours["train.warmup"]


def test_the_batch_is_deepspeeds_at_every_combination(tmp_path: Path) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    asked: list[tuple[dict[str, Any], int]] = [
        ({name: value for name, value in zip(names, values, strict=True) if value is not None}, ranks)
        for *values, ranks in itertools.product((None, 12, 16), (None, 2, 3), (None, 1, 2), (1, 2, 4))
        if values[:2] != [None, None]
    ]
    for (content, ranks), read in zip(asked, read_by_deepspeed(asked, tmp_path), strict=True):
        accelerate = {"distributed_type": "DEEPSPEED", "num_processes": ranks}
        try:
            ours = said(of(content, accelerate))
        except ConfigError:
            assert read is None, (content, ranks)
            continue
        assert read is not None, (content, ranks)
        micro = ours.get("train.micro_batch")
        assert [ours["train.batch_size"], micro or read["batch"][1]] == read["batch"], (content, ranks)
        assert micro is not None


def test_every_key_of_deepspeeds_precision_and_zero_is_known() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    content = {
        "bf16": {name: each.default for name, each in DeepSpeedBF16Config.model_fields.items()},
        "fp16": {name: each.default for name, each in DeepSpeedFP16Config.model_fields.items()},
    }
    conversion = of(content)
    assert said(conversion)["train.precision"] == "fp32"
    assert not [left for left in conversion.left if "does not know" in left.why]
