"""Which fast paths a plan takes, and what it says of the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.config.presets import PRESETS
from launcher.config.schema import RunConfig
from launcher.plan.batch import NOTHING_DONE, Done
from launcher.plan.choose import Place, Plan, make_plan
from launcher.plan.fast import NAMES, chunk_rows, padded
from launcher.plan.hardware import find_gpu
from launcher.plan.shape import shape_of


def planned(gpu: str = "h100-sxm-80gb", *, ranks: int = 1, done: Done = NOTHING_DONE, **keys: Any) -> Plan:
    about = {name: keys.pop(name, {}) for name in ("model", "data")}
    overrides = about["model"].get("overrides", {})
    run = RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "gpt2", **about["model"]},
            "data": {"train": ["text"], **about["data"]},
            "train": {"batch_size": 32 * ranks, "steps": 9, **keys},
        }
    )
    return make_plan(
        run,
        Place("here", 1, ranks, find_gpu(gpu), cores=8),
        shape=shape_of({**PRESETS["gpt2"].config(), **overrides}),
        positions=1024,
        blocks=None,
        attention=overrides.get("attn_implementation"),
        done=done,
    )


def test_on_a_gpu_every_path_is_taken() -> None:
    plan = planned()
    assert plan.fast.taken == list(NAMES)
    assert plan.fast.off == {}
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))).fast == plan.fast


@pytest.mark.parametrize("name", NAMES)
def test_each_can_be_switched_off_alone(name: str) -> None:
    fast = planned(fast={name: False}).fast
    assert fast.off == {name: "train.fast"}
    assert fast.taken == [each for each in NAMES if each != name]


@pytest.mark.parametrize(
    ("gpu", "keys", "off"),
    [
        ("cpu", {}, {"padded_vocabulary": "a CPU gains nothing", "tf32": "a CPU has none"}),
        ("h100-sxm-80gb", {"precision": "fp32"}, {"tf32": "train.precision is fp32"}),
        (
            "t4-16gb",
            {},
            {
                "chunked_loss": "fp16 gradients are scaled before they are made",
                "tf32": "t4-16gb has none",
            },
        ),
        (
            "h100-sxm-80gb",
            {"data": {"packing": "pad"}},
            {"causal_attention": "padded or isolated documents need a mask"},
        ),
        (
            "h100-sxm-80gb",
            {"data": {"isolate_documents": True}},
            {"causal_attention": "padded or isolated documents need a mask"},
        ),
        (
            "h100-sxm-80gb",
            {"model": {"overrides": {"attn_implementation": "flash_attention_2"}}},
            {"causal_attention": "the model's attention is flash_attention_2"},
        ),
        (
            "h100-sxm-80gb",
            {"model": {"overrides": {"vocab_size": 50304}}},
            {"padded_vocabulary": "50,304 is a multiple of 64"},
        ),
        ("h100-sxm-80gb", {"extra": {"optim": "adafactor"}}, {"fused_adamw": "train.extra.optim"}),
        (
            "h100-sxm-80gb",
            {"extra": {"label_smoothing_factor": 0.1}},
            {"chunked_loss": "train.extra.label_smoothing_factor"},
        ),
        ("h100-sxm-80gb", {"extra": {"label_smoothing_factor": 0.0}}, {}),
    ],
)
def test_what_rules_a_path_out_is_said(gpu: str, keys: dict[str, Any], off: dict[str, str]) -> None:
    assert planned(gpu, **keys).fast.off == off


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_a_head_in_shards_keeps_the_stock_loss(strategy: str) -> None:
    plan = planned(ranks=2, strategy=strategy)
    assert plan.fast.off == {"chunked_loss": "the head's weight is whole only in the head's own forward pass"}
    assert plan.fast.under("zero2").off == {}, "another strategy may take it again"


def test_a_run_goes_on_with_the_vocabulary_it_began_with() -> None:
    without = Done(10, 320, 0, "ddp", padded_vocabulary=False)
    assert planned(done=without).fast.off == {"padded_vocabulary": "the run began without"}
    with_it = Done(10, 320, 0, "ddp", padded_vocabulary=True)
    assert planned("cpu", done=with_it).fast.off == {"tf32": "a CPU has none"}


def test_memory_follows_the_loss_and_the_vocabulary() -> None:
    plans = {
        name: planned(micro_batch=16, fast={name: False}) for name in ("chunked_loss", "padded_vocabulary")
    }
    both = planned(micro_batch=16)
    assert both.memory is not None
    held = {name: plan.memory or {} for name, plan in plans.items()}
    # The stock loss, compiled, holds 8 bytes for each logit of all 16 x 1024 tokens.
    assert held["chunked_loss"]["logits and loss"] == 8 * 16 * 1024 * 50304
    assert both.memory["logits and loss"] < held["chunked_loss"]["logits and loss"] / 4
    rows = padded(50257) - 50257
    assert both.memory["parameters"] - held["padded_vocabulary"]["parameters"] == 4 * rows * 768


def test_a_chunk_is_a_power_of_two_within_its_bytes() -> None:
    assert chunk_rows(50304, on_cpu=False) == 4096
    assert chunk_rows(128256, on_cpu=False) == 2048
    assert chunk_rows(4096, on_cpu=True) == 4096
    assert chunk_rows(128256, on_cpu=True) == 256, "however large the vocabulary is"
