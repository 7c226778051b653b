"""DeepSpeed and accelerate files in launcher's words, against what those libraries read in them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.convert import Conversion, convert
from launcher.config.document import Document, Value, parse
from launcher.config.load import load_run
from launcher.errors import ConfigError, Fault
from tests.config import old_files

JSON, YAML = "ds.json", "accelerate.yaml"


def said(conversion: Conversion) -> dict[str, Value]:
    return {key: setting.value for key, setting in conversion.settings.items()}


def of(
    deepspeed: str | dict[str, Any] | None = None, accelerate: str | dict[str, Any] | None = None
) -> Conversion:
    return convert(documents(deepspeed, accelerate))


def documents(*contents: str | dict[str, Any] | None) -> list[Document]:
    texts = [
        each if isinstance(each, str) or each is None else json.dumps(each, indent=1) for each in contents
    ]
    return [
        parse(text, label=label) for text, label in zip(texts, (JSON, YAML), strict=False) if text is not None
    ]


def conflicts(
    deepspeed: str | dict[str, Any] | None = None, accelerate: str | dict[str, Any] | None = None
) -> dict[str, str]:
    """Dotted key to message of every conflict, each with its place."""
    with pytest.raises(ConfigError) as raised:
        of(deepspeed, accelerate).run("gpt2", "run")
    assert all(fault.place and fault.place.split(":")[0] in (JSON, YAML) for fault in raised.value.faults)
    assert all(fault.hint for fault in raised.value.faults)
    return {fault.path: f"{fault.message} ({fault.place})" for fault in raised.value.faults}


def without(text: str, **changed: str) -> str:
    """`text` with words changed, each of which is in it."""
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    return text


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


def test_both_files_together() -> None:
    conversion = of(old_files.ZERO2_WITH_OFFLOAD, old_files.DEEPSPEED_WITH_A_JSON)
    assert conversion.settings["train.strategy"].comment == f"{JSON}:20 zero_optimization.stage"
    assert said(conversion)["cluster.nodes"] == 2
    alone = conflicts(None, old_files.DEEPSPEED_WITH_A_JSON)
    assert "zero2.json, which was not given" in alone["deepspeed_config.deepspeed_config_file"]


SAMPLES: dict[str, tuple[str | None, str | None]] = {
    "trainer": (old_files.TRAINER_ZERO3, None),
    "zero2": (old_files.ZERO2_WITH_OFFLOAD, None),
    "fsdp": (None, old_files.FSDP2_ON_FOUR_NODES),
    "multi_gpu": (None, old_files.MULTI_GPU),
    "deepspeed": (None, old_files.DEEPSPEED_WITHOUT_A_JSON),
    "both": (old_files.ZERO2_WITH_OFFLOAD, old_files.DEEPSPEED_WITH_A_JSON),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_written_loads_and_says_what_was_said(name: str, tmp_path: Path) -> None:
    conversion = of(*SAMPLES[name])
    file = tmp_path / "run.yaml"
    file.write_text(conversion.run("gpt2", "run"))
    config = load_run(file).config.model_dump(mode="json")
    for key, setting in conversion.of("train").items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        assert value == setting.value, key
        assert setting.comment in file.read_text()


def leaves(value: Any, at: str = "") -> set[str]:
    if isinstance(value, dict) and (value or not at):
        return {leaf for name, each in value.items() for leaf in leaves(each, f"{at}.{name}" if at else name)}
    return {at}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_key_is_taken_over_or_listed(name: str) -> None:
    conversion = of(*SAMPLES[name])
    told = {origin.key for origin in conversion.origins.values()} | {left.key for left in conversion.left}
    written = set().union(*(leaves(yaml.safe_load(text)) for text in SAMPLES[name] if text))
    assert written == told
    assert not [left for left in conversion.left if "does not know" in left.why]


_VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 40), st.floats(-1, 2, allow_nan=False)),
    st.sampled_from(
        ["auto", "cpu", "none", "nvme", "no", "bf16", "FSDP", "NO", "DEEPSPEED", "WarmupLR", "Lion"]
    ),
    st.lists(st.floats(0, 1), max_size=3),
    st.just({}),
)
_KEYS = sorted(
    set().union(*(leaves(yaml.safe_load(text)) for pair in SAMPLES.values() for text in pair if text))
    - {"fsdp_config"}  # elsewhere a section
)


def faults_in(accelerate: dict[str, Any]) -> tuple[Fault, ...]:
    try:
        of(accelerate=accelerate)
    except ConfigError as error:
        return error.faults
    return ()


@given(
    st.dictionaries(st.sampled_from([*_KEYS, "unheard.of", "moe.enabled"]), _VALUES, min_size=1, max_size=12)
)
def test_no_file_passes_a_key_in_silence(flat: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"distributed_type": "NO"}
    for key, value in flat.items():
        *sections, last = key.split(".")
        here = nested
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    refused = faults_in(nested)
    assert all(fault.place and fault.hint for fault in refused)
    if refused:
        return
    conversion = of(accelerate=nested)
    sayings = {origin.key for origin in conversion.origins.values()} | {left.key for left in conversion.left}
    assert leaves(nested) == sayings


# Conflicts


def test_two_strategies() -> None:
    found = conflicts(old_files.TRAINER_ZERO3, old_files.FSDP2_ON_FOUR_NODES)
    assert found == {
        "distributed_type": f"train.strategy would be fsdp, and zero3 by {JSON}:16 zero_optimization.stage "
        f"({YAML}:13)"
    }


def test_a_batch_that_is_not_its_product() -> None:
    message = conflicts({"train_batch_size": 100, "train_micro_batch_size_per_gpu": 8})["train_batch_size"]
    assert message == f"100 is no multiple of 8 ({JSON}:3 train_micro_batch_size_per_gpu) ({JSON}:2)"
    found = conflicts(
        without(old_files.ZERO2_WITH_OFFLOAD, **{"256": "512"}), old_files.DEEPSPEED_WITH_A_JSON
    )
    assert "512 is not 4 (" in found["train_batch_size"]
    assert f"16 ({YAML}:20 num_processes)" in found["train_batch_size"]


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


def test_accelerates_precision_against_the_json() -> None:
    accelerate = without(old_files.DEEPSPEED_WITH_A_JSON, use_cpu="mixed_precision: fp16\nuse_cpu")
    assert "fp16, and bf16" in conflicts(old_files.ZERO2_WITH_OFFLOAD, accelerate)["mixed_precision"]
    off = conflicts({"fp16": {"enabled": False}, "zero_optimization": {"stage": 2}}, accelerate)
    assert set(off) == {"fp16.enabled"}


def test_a_learning_rate_that_deepspeed_never_used() -> None:
    peak = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}}
    found = conflicts({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}, "scheduler": peak})
    assert set(found) == {"scheduler.type"}
    assert "would be 0.001, and 0.0003" in found["scheduler.type"]


def test_everything_wrong_at_once() -> None:
    found = conflicts(
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}, "optimizer": {"type": "Lion"}},
        {"distributed_type": "FSDP", "num_machines": 2, "num_processes": 3, "mixed_precision": "fp8"},
    )
    assert set(found) == {"fp16.enabled", "optimizer.type", "num_processes", "mixed_precision"}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("name: mine\n",), "neither a DeepSpeed JSON nor an accelerate YAML"),
        ((old_files.TRAINER_ZERO3, old_files.ZERO2_WITH_OFFLOAD), "a second file of DeepSpeed's"),
    ],
)
def test_files_of_other_kinds(texts: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        of(*texts)


def test_without_the_ranks_a_micro_batch_alone_says_no_batch() -> None:
    conversion = of({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2})
    assert said(conversion) == {}
    assert {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} == {
        e.key for e in conversion.left
    }


def test_an_accumulation_that_is_auto_is_not_taken_for_one() -> None:
    steps = {"gradient_accumulation_steps": "auto"}
    micro = {"train_micro_batch_size_per_gpu": 4}
    ranks = {"distributed_type": "DEEPSPEED", "num_processes": 2}
    assert said(of(micro, ranks))["train.batch_size"] == 8
    assert "train.batch_size" not in said(of(micro | steps, ranks))
    assert "train.batch_size" not in said(of(micro, ranks | {"deepspeed_config": steps}))


def test_json_indented_with_tabs() -> None:
    text = json.dumps(json.loads(old_files.ZERO2_WITH_OFFLOAD), indent="\t")
    assert said(of(text)) == said(of(old_files.ZERO2_WITH_OFFLOAD))


# Against the libraries themselves

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
    (read,) = read_by_deepspeed([(content, 16)], tmp_path)
    ours = said(of(old_files.ZERO2_WITH_OFFLOAD))
    assert read["batch"] == [ours["train.batch_size"], ours["train.micro_batch"]]
    assert read["clip"] == ours["train.max_grad_norm"]
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


def test_every_key_of_deepspeeds_precision_and_zero_is_known() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    content = {
        "bf16": {name: each.default for name, each in DeepSpeedBF16Config.model_fields.items()},
        "fp16": {name: each.default for name, each in DeepSpeedFP16Config.model_fields.items()},
    }
    conversion = of(content)
    assert said(conversion) == {"train.precision": "fp32"}
    assert not [left for left in conversion.left if "does not know" in left.why]
