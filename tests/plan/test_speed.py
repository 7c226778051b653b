"""The speed model against published speeds, against its own limits, and its fit repeated."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.presets import PRESETS
from launcher.plan import speed
from launcher.plan.batch import Batch
from launcher.plan.collectives import Wires
from launcher.plan.hardware import CATALOGUE, GPU, find_gpu
from launcher.plan.shape import flops_per_token
from launcher.plan.speed import Speed, step_speed, utilisation
from launcher.plan.states import Sharding
from launcher.plan.traffic import stack_of
from scripts.replay_speeds import DOCS, document, error, fitted_and_held_out, predicted, published, table
from tests.plan.shapes import shape

FITTED, HELD_OUT = fitted_and_held_out(published())
GPUS = tuple(gpu for gpu in CATALOGUE.values() if gpu.name != "cpu")


def step(
    gpu: GPU,
    *,
    preset: str = "gpt2",
    micro_batch: int = 8,
    accumulation: int = 4,
    world_size: int = 8,
    network: float | None = 50e9,
    precision: str = "fp16",
    checkpointing: bool | int = False,
    compiled: bool = False,
    block_size: int = 1024,
    strategy: str = "ddp",
    offload: str = "none",
) -> Speed:
    model, sharding = shape(preset), Sharding(strategy, world_size, offload)
    assert gpu.link is not None
    found = step_speed(
        model,
        gpu,
        Batch(micro_batch * accumulation * world_size, micro_batch, accumulation, world_size),
        Wires(min(8, world_size), gpu.link, network),
        stack_of(model, sharding.numbers(precision), compiled=compiled),
        sharding,
        block_size=block_size,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )
    assert found is not None
    return found


def test_published_speeds_that_were_not_fitted_on_are_met() -> None:
    sys.stdout.write("\n".join(table(HELD_OUT)))
    errors = [abs(error(row)) for row in HELD_OUT]
    assert len(errors) > 60
    assert statistics.median(errors) < 0.03
    assert sum(one < 0.1 for one in errors) >= 0.95 * len(errors)
    assert max(errors) < 0.3
    assert all(abs(error(row)) < 0.15 for row in HELD_OUT if row.source != "llm-foundry")


def test_the_page_of_the_replay_is_not_stale() -> None:
    assert (DOCS / "speed.md").read_text(encoding="utf-8") == document(), "run ./scripts/replay_speeds"


def loss(bandwidth_share: float) -> float:
    """The sum that the fit made least."""
    stacks = {row: replace(row.stack, bandwidth_share=bandwidth_share) for row in FITTED}
    return sum(math.log(predicted(row, stack) / row.published) ** 2 for row, stack in stacks.items())


def test_the_shares_are_the_best_for_the_rows_they_were_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    share = FITTED[0].stack.bandwidth_share
    best = loss(share)
    assert best < loss(share * 0.93)
    assert best < loss(share * 1.07)
    for name in ("MATRIX_SHARE", "ATTENTION_SHARE"):
        shares: Mapping[int, float] = getattr(speed, name)
        for generation in shares:
            for change in (0.95, 1.05):
                moved = {**shares, generation: shares[generation] * change}
                with monkeypatch.context() as patched:
                    patched.setattr(speed, name, moved)
                    assert best < loss(share), f"{name}[{generation}] x {change}"


@given(
    gpu=st.sampled_from(GPUS),
    preset=st.sampled_from(sorted(PRESETS)),
    micro_batch=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    world_size=st.sampled_from((1, 8, 64, 4096)),
    precision=st.sampled_from(("fp16", "fp32")),
    checkpointing=st.booleans(),
    compiled=st.booleans(),
    block_size=st.sampled_from((64, 1024)),
)
def test_no_gpu_is_predicted_beyond_its_peak(
    gpu: GPU,
    preset: str,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    precision: str,
    checkpointing: bool,
    compiled: bool,
    block_size: int,
) -> None:
    found = step(
        gpu,
        preset=preset,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        precision=precision,
        checkpointing=checkpointing,
        compiled=compiled,
        block_size=block_size,
    )
    assert all(math.isfinite(seconds) and seconds >= 0 for _, seconds in found.items())
    rate = micro_batch * accumulation * block_size / found.total
    mfu = utilisation(shape(preset), gpu, block_size, precision, rate)
    assert mfu is not None
    assert 0 < mfu < 1


@given(gpu=st.sampled_from(GPUS), micro_batch=st.integers(1, 32), compiled=st.booleans(), on=st.booleans())
def test_a_larger_micro_batch_is_never_slower_and_checkpointing_never_faster(
    gpu: GPU, micro_batch: int, compiled: bool, on: bool
) -> None:
    split = step(gpu, micro_batch=micro_batch, accumulation=2, compiled=compiled, checkpointing=on)
    whole = step(gpu, micro_batch=2 * micro_batch, accumulation=1, compiled=compiled, checkpointing=on)
    assert whole.total - whole.communication <= split.total - split.communication
    kept = step(gpu, micro_batch=micro_batch, checkpointing=False, compiled=compiled)
    again = step(gpu, micro_batch=micro_batch, checkpointing=True, compiled=compiled)
    assert kept.total < again.total


def test_small_shapes_wait_for_the_host() -> None:
    small = step(find_gpu("h100-sxm-80gb"), micro_batch=1, block_size=64)
    large = step(find_gpu("h100-sxm-80gb"), micro_batch=32)
    assert small.host > small.matrices + small.attention + small.elementwise
    assert large.host == 0


def test_what_is_hidden_behind_backward_is_not_counted() -> None:
    gpu = find_gpu("a100-sxm-80gb")
    fast, slow = (step(gpu, world_size=64, accumulation=1, network=rate) for rate in (25e9, 0.05e9))
    assert fast.communication < 0.01 * fast.total
    assert slow.communication > 0.5 * slow.total
    assert fast.total - fast.communication == pytest.approx(slow.total - slow.communication)


def test_each_layer_that_is_computed_again_costs_the_same() -> None:
    gpu = find_gpu("h100-sxm-80gb")
    for how in ({"strategy": "zero3", "world_size": 64}, {"strategy": "ddp"}):
        none, half, every = (step(gpu, checkpointing=on, **how) for on in (False, 6, True))
        assert step(gpu, checkpointing=12, **how) == every
        for name in ("matrices", "attention", "elementwise"):
            before, between, after = (getattr(one, name) for one in (none, half, every))
            assert before < between == pytest.approx((before + after) / 2)
        assert none.communication <= half.communication <= every.communication


def test_where_a_rate_is_missing_nothing_is_predicted() -> None:
    t4 = find_gpu("t4-16gb")
    assert t4.link is not None
    model = shape()
    for precision, network, world_size in (("bf16", 50e9, 8), ("fp16", None, 16)):
        assert (
            step_speed(
                model,
                t4,
                Batch(world_size, 1, 1, world_size),
                Wires(8, t4.link, network),
                stack_of(model, Sharding("ddp", 1).numbers(precision), compiled=False),
                Sharding("ddp", world_size),
                block_size=64,
                precision=precision,
                gradient_checkpointing=False,
            )
            is None
        )
    assert utilisation(model, t4, 64, "bf16", 1.0) is None


def test_utilisation_is_the_palm_count_over_the_peak() -> None:
    gpu = find_gpu("a100-sxm-80gb")
    rate = 312e12 / flops_per_token(shape(), 1024)
    assert utilisation(shape(), gpu, 1024, "bf16", rate) == pytest.approx(1)
