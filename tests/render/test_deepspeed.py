"""`deepspeed.json` as DeepSpeed itself reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.config.presets import PRESETS
from launcher.config.rules import OFFLOADS
from launcher.config.schema import RunConfig
from launcher.plan.choose import Place, Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.shape import shape_of
from launcher.render.deepspeed import render_deepspeed
from scripts.deepspeed_reads import deepspeed_reads

ZERO = ("zero1", "zero2", "zero3")
CELLS = [
    (strategy, offload, precision)
    for strategy in ZERO
    for offload in OFFLOADS[strategy]
    for precision in ("fp32", "bf16", "fp16")
]


def planned(strategy: str, offload: str, precision: str, gpu: str = "h100-sxm-80gb", nodes: int = 2) -> Plan:
    train = {"batch_size": 64, "micro_batch": 2, "steps": 9}
    run = RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "gpt2"},
            "data": {"train": ["text"]},
            "train": {**train, "strategy": strategy, "offload": offload, "precision": precision},
        }
    )
    return make_plan(run, Place("here", nodes, 4, find_gpu(gpu)), shape=None, positions=None, blocks=None)


def rendered(strategy: str, offload: str, precision: str) -> str:
    return render_deepspeed(
        planned(strategy, offload, precision), max_grad_norm=0.7, shape=shape_of(PRESETS["gpt2"].config())
    )


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    else:
        yield value


@pytest.fixture(scope="module")
def read() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Every cell as DeepSpeed's own configuration has it."""
    return dict(zip(CELLS, deepspeed_reads([(rendered(*cell), 8) for cell in CELLS]), strict=True))


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_deepspeed_reads_what_the_plan_says(
    read: dict[tuple[str, str, str], dict[str, Any]], cell: tuple[str, str, str]
) -> None:
    strategy, offload, precision = cell
    said = read[cell]
    assert said["stage"] == int(strategy[-1])
    optimizer, parameters = (part is not None and part.endswith("cpu") for part in said["offload"])
    assert (optimizer, parameters) == (offload != "none", offload == "parameters")
    assert (said["batch"], said["micro"], said["accumulation"], said["clipping"]) == (64, 2, 4, 0.7)
    assert (said["bf16"], said["fp16"]) == (precision == "bf16", precision == "fp16")
    assert said["gradients"] == "fp32"
    if precision == "fp16":
        assert (said["scale"], said["power"]) == (0, 16), "the loss scale moves, from 65536"


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_every_value_is_itself(cell: tuple[str, str, str]) -> None:
    values = list(leaves(json.loads(rendered(*cell))))
    assert "auto" not in values
    assert None not in values


def test_the_optimizer_is_not_deepspeeds() -> None:
    """Given one here, transformers would hand it all parameters in one group, and all of them decay."""
    fields = json.loads(rendered("zero3", "parameters", "bf16"))
    assert "optimizer" not in fields
    assert "scheduler" not in fields
    assert fields["zero_force_ds_cpu_optimizer"] is False


def test_pieces_grow_with_the_model() -> None:
    plan = planned("zero3", "none", "bf16")
    small, large, unknown = (
        json.loads(render_deepspeed(plan, max_grad_norm=1.0, shape=shape))["zero_optimization"]
        for shape in (shape_of(PRESETS["gpt2"].config()), shape_of(PRESETS["gpt2-xl"].config()), None)
    )
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        assert small[key] < large[key]
    assert small.keys() == large.keys() == unknown.keys()


def test_another_strategy_is_not_deepspeeds() -> None:
    with pytest.raises(ValueError, match="ddp does not run on DeepSpeed"):
        render_deepspeed(planned("ddp", "none", "bf16"), max_grad_norm=1.0, shape=None)
