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


def planned(gpu: str, ranks: int, precision: str) -> Plan:
    run = RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "gpt2"},
            "data": {"train": ["text"]},
            "train": {"batch_size": 8, "steps": 100, "precision": precision},
        }
    )
    place = Place("here", 1, ranks, find_gpu(gpu))
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
    file.write_text(render_accelerate(planned(gpu, ranks, precision)), encoding="utf-8")
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
    text = render_accelerate(planned("h100-sxm-80gb", 8, "bf16"))
    assert "auto" not in text
    assert "default" not in text
    assert None not in yaml.safe_load(text).values()
