"""`accelerate.yaml` as accelerate itself reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from launcher.config.schema import RunConfig
from launcher.plan.choose import Place, Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.render.accelerate import render_accelerate


def planned(gpu: str, ranks: int, precision: str, *, nodes: int = 1, **train: str | bool) -> Plan:
    run = RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "gpt2"},
            "data": {"train": ["text"]},
            "train": {"batch_size": 64, "steps": 100, "precision": precision, **train},
        }
    )
    place = Place("here", nodes, ranks, find_gpu(gpu))
    return make_plan(run, place, shape=None, positions=None, blocks=None)


@pytest.mark.parametrize(
    ("gpu", "ranks", "precision", "mixed"),
    [
        ("cpu", 1, "fp32", "no"),
        ("cpu", 1, "bf16", "bf16"),
        ("cpu", 2, "fp32", "no"),
        ("cpu", 2, "bf16", "bf16"),
        ("h100-sxm-80gb", 1, "bf16", "bf16"),
        ("h100-sxm-80gb", 8, "bf16", "bf16"),
        ("h100-sxm-80gb", 8, "fp32", "no"),
        ("v100-sxm-32gb", 8, "fp16", "fp16"),
    ],
)
def test_accelerate_reads_what_the_plan_says(
    tmp_path: Path, gpu: str, ranks: int, precision: str, mixed: str
) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(render_accelerate(planned(gpu, ranks, precision), "unused"), encoding="utf-8")
    read = vars(load_config_from_file(str(file)))
    said = {
        "compute_environment": "LOCAL_MACHINE",
        # accelerate starts several processes on one machine only under MULTI_GPU: docs/decisions/0002.
        "distributed_type": "NO" if ranks == 1 else "MULTI_GPU",
        "use_cpu": gpu == "cpu",
        "num_machines": 1,
        "num_processes": ranks,
        "machine_rank": 0,
        "main_process_port": 0,
        "mixed_precision": mixed,
        "rdzv_backend": "static",
        "main_training_function": "main",
        "debug": False,
    }
    assert {name: read[name] for name in said} == said
    rest = {name: value for name, value in read.items() if name not in said and value}
    assert rest == {}, "accelerate would add something of its own"
    assert yaml.safe_load(file.read_text()).keys() == said.keys()


def test_nothing_is_left_for_accelerate_to_guess() -> None:
    text = render_accelerate(planned("h100-sxm-80gb", 8, "bf16"), "unused")
    assert "auto" not in text
    assert "default" not in text
    assert None not in yaml.safe_load(text).values()


DEEPSPEED = '/runs/it\'s a "run"\n/deepspeed.json'


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(("gpu", "nodes"), [("cpu", 1), ("h100-sxm-80gb", 1), ("h100-sxm-80gb", 4)])
def test_deepspeed_is_told_everything_in_its_own_file(
    tmp_path: Path, strategy: str, gpu: str, nodes: int
) -> None:
    file = tmp_path / "accelerate.yaml"
    plan = planned(gpu, 2, "bf16", nodes=nodes, strategy=strategy)
    file.write_text(render_accelerate(plan, DEEPSPEED), encoding="utf-8")
    read = vars(load_config_from_file(str(file)))
    assert read["distributed_type"] == "DEEPSPEED"
    assert read["deepspeed_config"] == {
        "deepspeed_config_file": DEEPSPEED,
        "deepspeed_multinode_launcher": "standard",
        "zero3_init_flag": False,
    }
    # What accelerate would take from here and DeepSpeed from its own file is said once.
    assert "mixed_precision" not in yaml.safe_load(file.read_text())
    assert read["use_cpu"] is False, "with true, accelerate starts ranks without DeepSpeed"
    assert (read["num_machines"], read["num_processes"]) == (nodes, 2 * nodes)


@pytest.mark.parametrize("offload", ["none", "parameters"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_fsdp_is_the_second_and_shards_everything(tmp_path: Path, offload: str, recomputes: bool) -> None:
    file = tmp_path / "accelerate.yaml"
    plan = planned(
        "h100-sxm-80gb", 8, "bf16", strategy="fsdp", offload=offload, gradient_checkpointing=recomputes
    )
    file.write_text(render_accelerate(plan, "unused"), encoding="utf-8")
    read = vars(load_config_from_file(str(file)))
    assert (read["distributed_type"], read["mixed_precision"]) == ("FSDP", "bf16")
    assert read["fsdp_config"] == {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": offload == "parameters",
        "fsdp_activation_checkpointing": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
    }


def test_under_fsdp_a_layer_is_compiled_by_itself_and_elsewhere_the_trainer_sees_to_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "accelerate.yaml"
    for strategy in ("fsdp", "ddp", "zero2"):
        plan = planned("h100-sxm-80gb", 8, "bf16", strategy=strategy, compile=True)
        file.write_text(render_accelerate(plan, "unused"), encoding="utf-8")
        read = vars(load_config_from_file(str(file)))["dynamo_config"]
        layers = {"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}
        assert read == (layers if strategy == "fsdp" else {})


def test_several_nodes_are_told_where_they_meet_when_they_start(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(render_accelerate(planned("h100-sxm-80gb", 8, "bf16", nodes=4), "unused"))
    read = vars(load_config_from_file(str(file)))
    assert (read["num_machines"], read["num_processes"], read["main_process_ip"]) == (4, 32, None)
    assert read["main_process_port"] is None, "no port is fixed"
