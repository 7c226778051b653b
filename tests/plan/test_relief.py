"""What is proposed when memory runs out: planned anew, a run needs so much less and keeps its batch."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.presets import PRESETS
from launcher.config.schema import RunConfig
from launcher.plan.choose import Place, Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.relief import reliefs
from launcher.plan.shape import Shape, shape_of


def shape() -> Shape:
    found = shape_of(PRESETS["gpt2-medium"].config())
    assert found is not None
    return found


def planned(gpu: str, ranks: int, **train: Any) -> Plan:
    run = RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "gpt2-medium"},
            "data": {"train": ["text"]},
            "train": {"batch_size": 96, "steps": 9, "gradient_checkpointing": False, **train},
        }
    )
    place = Place("here", 1, ranks, find_gpu(gpu), memory=64 << 30)
    return make_plan(run, place, shape=shape(), positions=1024, blocks=None)


def taken(overrides: str) -> dict[str, Any]:
    """The keys of `train` that overrides set."""
    values: dict[str, Any] = {}
    for each in overrides.split():
        key, _, value = each.partition("=")
        values[key.removeprefix("train.")] = {"true": True}.get(
            value, int(value) if value.isdecimal() else value
        )
    return values


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("gpu", "ranks", "train"),
    [
        ("a100-sxm-80gb", 8, {"micro_batch": 12, "strategy": "ddp"}),
        ("a100-sxm-80gb", 8, {"micro_batch": 12, "strategy": "zero2"}),
        ("a100-sxm-80gb", 1, {"micro_batch": 32, "strategy": "ddp"}),
        ("a100-sxm-80gb", 8, {"micro_batch": 4, "strategy": "fsdp"}),
        ("a100-sxm-80gb", 8, {"micro_batch": 4, "strategy": "zero2", "offload": "optimizer"}),
        ("cpu", 2, {"micro_batch": 8, "strategy": "ddp"}),
    ],
)
def test_each_spares_what_it_says_and_keeps_the_batch(
    gpu: str, ranks: int, train: dict[str, Any], begun: bool
) -> None:
    before = planned(gpu, ranks, **train)
    assert before.memory is not None
    found = reliefs(before, shape(), begun=begun)
    assert [each.spared for each in found] == sorted((each.spared for each in found), reverse=True)
    assert found
    for each in found:
        after = planned(gpu, ranks, **{**train, **taken(each.overrides)})
        assert after.memory is not None
        assert sum(before.memory.values()) - sum(after.memory.values()) == each.spared > 0
        assert after.batch.batch_size == 96
    said = " ".join(each.overrides for each in found)
    assert "train.micro_batch=" in said
    assert "train.gradient_checkpointing=true" in said
    assert ("train.strategy=" in said) == (not begun and (gpu != "cpu" or ranks > 1))
    to_the_host = not begun and gpu != "cpu"
    # It gives up the chunked loss, which may take more than all of the state.
    least = (
        planned(gpu, ranks, **{**train, "strategy": "zero3", "offload": "parameters"})
        if to_the_host
        else before
    )
    spares = sum((least.memory or {}).values()) < sum(before.memory.values())
    assert ("train.strategy=zero3 train.offload=parameters" in said) == spares
    assert ("train.offload=optimizer" in said) == (to_the_host and "offload" not in train)


def test_the_smallest_micro_batch_is_one() -> None:
    said = [
        each.overrides for each in reliefs(planned("a100-sxm-80gb", 1, micro_batch=2), shape(), begun=True)
    ]
    assert "train.micro_batch=1" in said


def test_nothing_is_left_to_change() -> None:
    last = planned("a100-sxm-80gb", 1, micro_batch=1, gradient_checkpointing=True)
    assert reliefs(last, shape(), begun=True) == []
