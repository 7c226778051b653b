from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.config.presets import PRESETS
from launcher.config.schema import RunConfig
from launcher.plan.choose import Blocks, Every, Place, Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.shape import shape_of
from launcher.render.table import asked_rows, becomes_rows, fit_rows, speed_rows
from launcher.sizes import size_in_words


def asked(**length: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "gpt2-medium"},
            "data": {"train": ["text"], "block_size": 64, "packing": "concat"},
            "train": {"batch_size": 1024, "learning_rate": 3e-4, **length},
        }
    )


def planned(run: RunConfig, *, nodes: int = 1, blocks: Blocks | None = None) -> Plan:
    place = Place("lab", nodes, 2, find_gpu("a100-sxm-80gb"))
    return make_plan(run, place, shape=None, positions=None, blocks=blocks)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({"tokens": 10_000_000_000}, "10,000,000,000 tokens"),
        ({"steps": 2000}, "2,000 steps"),
        ({"epochs": 1.5}, "1.5 epochs"),
    ],
)
def test_what_was_asked_is_said_as_it_was_asked(length: dict[str, float], said: str) -> None:
    rows = dict(asked_rows(asked(**length)))
    assert rows == {
        "model": "gpt2-medium, scratch",
        "batch": "1,024 sequences of 64 tokens (concat)",
        "length": said,
        "learning rate": "0.0003, cosine",
    }


def test_what_it_becomes() -> None:
    plan = planned(asked(steps=2000), blocks=Blocks(4096, 4096 * 64, 10))
    assert dict(becomes_rows(plan, "concat")) == {
        "on": "lab: 2 x a100-sxm-80gb",
        "strategy": "ddp, bf16, compiled",
        "batch": "1024 = micro-batch 512 x accumulation 1 x 2 ranks",
        "gradient checkpointing": "off",
        "fast paths": "tanh GELU, causal attention, chunked loss, padded vocabulary, fused AdamW, TF32",
        "steps": "2,000, the first 40 warming up",
        "tokens": "131,072,000 (500.00 epochs)",
        "evaluate": "every 500 steps",
        "checkpoint": "every 15 min",
        "memory": "not estimated for this architecture: train.micro_batch is a guess",
    }


def test_rows_that_are_padded_have_at_most_so_many_tokens() -> None:
    plan = planned(asked(steps=2000), blocks=Blocks(4096, 90_000, 10))
    said = "at most 131,072,000, padding included (500.00 epochs)"
    assert dict(becomes_rows(plan, "pad"))["tokens"] == said


def test_what_is_not_known_yet_and_what_is_not_done() -> None:
    plan = replace(
        planned(asked(epochs=2), nodes=4), eval_every=Every(), checkpoint_every=Every(steps=1), compile=True
    )
    rows = dict(becomes_rows(replace(plan, parameters=124_439_808, gradient_checkpointing=True), "concat"))
    assert rows["on"] == "lab: 4 x 2 x a100-sxm-80gb"
    assert rows["strategy"] == "ddp, bf16, compiled"
    assert rows["gradient checkpointing"] == "on"
    for layers, said in ((1, "in the first layer"), (6, "in the first 6 layers")):
        some = dict(becomes_rows(replace(plan, gradient_checkpointing=layers), "concat"))
        assert some["gradient checkpointing"] == said
    assert rows["parameters"] == "124,439,808"
    assert "prepared the text" in rows["steps"]
    assert "tokens" not in rows
    assert rows["evaluate"] == "never"
    assert rows["checkpoint"] == "every 1 step"


def test_the_speed_is_said_with_what_it_is_made_of() -> None:
    place = Place("lab", 1, 8, find_gpu("a100-sxm-80gb"), price_per_gpu_hour=2.5)
    run = asked(steps=2000)
    plan = make_plan(run, place, shape=shape_of(PRESETS["gpt2-xl"].config()), positions=None, blocks=None)
    found = plan.forecast
    assert found is not None
    rows = dict(speed_rows(plan))
    assert found.hours is not None
    assert found.price == pytest.approx(found.hours * 8 * 2.5, rel=1e-3)
    assert rows["tokens/s"].startswith(f"{found.tokens_per_second:,.0f} (")
    assert "a GPU, MFU" in rows["tokens/s"]
    assert "matrices" in rows["step"]
    assert rows["time"].endswith("hours, without evaluation and checkpoints")
    assert rows["price"] == f"{found.price:,.2f}"
    others = [(name, said) for name, said in speed_rows(plan) if name.startswith("or ")]
    assert len(others) == len(found.runners_up) == 3
    for (name, said), other in zip(others, found.runners_up, strict=True):
        assert name == f"or {other.strategy}"
        assert said.startswith(f"micro-batch {other.micro_batch}")
        assert said.endswith(f": {other.why}")
    reasons = ("slower", "faster, but needs", "faster, and less simple")
    assert all(any(reason in other.why for reason in reasons) for other in found.runners_up)


def test_what_is_offloaded_is_said_with_what_it_takes_of_the_node() -> None:
    place = Place("desk", 1, 1, find_gpu("rtx-4090-24gb"))
    run = asked(steps=1, strategy="zero3", offload="parameters")
    plan = make_plan(run, place, shape=shape_of(PRESETS["gpt2-xl"].config()), positions=None, blocks=None)
    rows = dict(becomes_rows(plan, "concat"))
    assert rows["strategy"] == "zero3, optimizer and parameters offloaded to the host, bf16"
    assert rows["host memory"] == f"{size_in_words(plan.host_memory)} of each node, for what is offloaded"
    moved = becomes_rows(replace(plan, offload="optimizer"), "concat")
    assert dict(moved)["strategy"] == "zero3, optimizer offloaded to the host, bf16"
    assert "host memory" not in dict(becomes_rows(replace(plan, host_memory=0), "concat"))


def test_a_micro_batch_that_is_taken_as_given_and_does_not_fit_is_said_not_to() -> None:
    place, shape = Place("desk", 1, 1, find_gpu("rtx-4090-24gb")), shape_of(PRESETS["gpt2"].config())
    run = asked(steps=1, micro_batch=512, compile=False, fast={"chunked_loss": False})
    plan = make_plan(run, place, shape=shape, positions=None, blocks=None)
    ((name, said),) = fit_rows(plan)
    assert name == "does not fit"
    assert plan.memory is not None
    assert f"{size_in_words(sum(plan.memory.values()) - 0.9 * 24e9)} more" in said
    assert fit_rows(make_plan(asked(steps=1), place, shape=shape, positions=None, blocks=None)) == []


def test_what_is_not_predicted_is_said() -> None:
    assert dict(speed_rows(planned(asked(steps=1))))["speed"].startswith("not predicted for this arch")
    on_cpu = make_plan(
        asked(steps=1), Place("here", 1, 2, find_gpu("cpu")), shape=None, positions=None, blocks=None
    )
    assert speed_rows(on_cpu) == [("speed", "not predicted on a CPU")]
    a_gpu = Place("lab", 1, 1, find_gpu("a100-sxm-80gb"))
    before = make_plan(
        asked(epochs=1), a_gpu, shape=shape_of(PRESETS["gpt2"].config()), positions=None, blocks=None
    )
    assert {"time", "price"}.isdisjoint(dict(speed_rows(before))), "the length is not known yet"
