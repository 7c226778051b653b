"""The closed forms against what DeepSpeed's and PyTorch's own engines allocate, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config.presets import PRESETS
from launcher.plan.buckets import LARGEST, SMALLEST, buckets
from launcher.plan.memory import estimate
from launcher.plan.shape import Shape, parameters, shape_of, weights_per_layer
from launcher.plan.states import Sharding, checkpoint_bytes, partitions, states
from tests.plan.engines import FIELDS, WIDE
from tests.plan.shapes import shape

WORLDS = (1, 2, 8, 64, 512)
HELD = WORLDS if "LAUNCHER_LONG" in os.environ else (512,)
"""Worlds that are tried under bf16, 8 under fp32: the others differ in their padding alone."""

STRATEGIES = ("zero1", "zero2", "zero3", "fsdp")
FLAGS = 256
"""Bytes of what is not counted: a step counter for each tensor of the optimizer, and flags."""


def allocated(*wanted: str) -> dict[str, dict[str, int]]:
    """Bytes that the engines hold in each way, at each moment that `engines.py` marks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.engines", *wanted],
        cwd=Path(__file__).parents[2],
        # More threads would only wait for each other: the models are small.
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"of"')]
    found = {line.pop("of"): line for line in lines}
    assert list(found) == list(wanted)
    return found


@pytest.mark.parametrize(
    ("strategy", "precision", "each"),
    [
        ("ddp", "bf16", 12),
        ("fsdp", "bf16", 12),
        ("zero3", "bf16", 12),
        ("zero1", "bf16", 14),
        ("zero2", "fp32", 16),
    ],
)
def test_a_checkpoint_is_weights_two_moments_and_what_deepspeed_computes_with(
    strategy: str, precision: str, each: int
) -> None:
    assert checkpoint_bytes(1000, strategy, precision) == 1000 * each


def test_the_state_is_what_the_engines_hold() -> None:
    model = shape_of(FIELDS)
    assert model is not None
    ways = [f"{world}:{strategy}:bf16" for world in HELD for strategy in STRATEGIES]
    ways += [f"8:{strategy}:fp32" for strategy in STRATEGIES]
    for way, bytes_at in allocated(*ways).items():
        world, strategy, precision = way.split(":")
        # FSDP's device mesh has the ranks' numbers twice, on the host.
        flags = FLAGS + 16 * int(world)
        planned = states(model, Sharding(strategy, int(world)), precision)
        always = planned.parameters + planned.master_weights + planned.optimizer
        bucket = buckets(model).reduce_bucket_size * (2 if precision == "bf16" else 4)
        if strategy == "zero3":
            always += bucket
        gradients = planned.gradients
        assert 0 <= bytes_at["stepped"] - always - _kept(strategy, precision, gradients, model) < flags, way
        between = always + gradients + (2 * bucket if (strategy, precision) == ("zero1", "fp32") else 0)
        assert 0 <= bytes_at["accumulating"] - between < flags, way


def test_a_step_s_peak_is_near_what_the_engines_reach() -> None:
    model = shape_of(WIDE)
    assert model is not None
    for way, bytes_at in allocated(*(f"8:{strategy}:bf16:wide" for strategy in STRATEGIES)).items():
        _, strategy, precision, _ = way.split(":")
        planned = estimate(
            model,
            Sharding(strategy, 8),
            micro_batch=1,
            accumulation=2,
            block_size=WIDE["n_positions"],
            precision=precision,
            gradient_checkpointing=False,
            chunked_loss=False,
            compiled=False,
            on_cpu=True,
        )
        reached = bytes_at["peak"]
        sys.stdout.write(f"{way} {reached} {(planned.total - planned.framework) / reached - 1:+.1%}\n")
        assert planned.total - planned.framework == pytest.approx(reached, rel=0.15), way


def _kept(strategy: str, precision: str, gradients: int, model: Shape) -> int:
    """Bytes of gradients that stay when a step is over: ZeRO-3 keeps their partition, and ZeRO-1 under bf16
    those in fp32."""
    if strategy == "zero3":
        return gradients
    return gradients - 2 * parameters(model) if (strategy, precision) == ("zero1", "bf16") else 0


@pytest.mark.parametrize("preset", PRESETS)
def test_buckets_hold_a_layer_within_bounds(preset: str) -> None:
    model = shape(preset)
    sizes = buckets(model)
    assert SMALLEST <= sizes.reduce_bucket_size <= LARGEST
    assert sizes.reduce_bucket_size == min(max(weights_per_layer(model), SMALLEST), LARGEST)
    assert sizes.reduce_bucket_size % 2 == 0, "DeepSpeed refuses an odd one"
    # GPT-2's longest vector is the MLP's bias; its smallest matrix the attention's output.
    assert sizes.param_persistence_threshold == 4 * model.hidden < model.hidden**2


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_more_ranks_never_hold_more(strategy: str, precision: str) -> None:
    def lasting(world_size: int) -> int:
        found = states(shape(), Sharding(strategy, world_size), precision)
        return found.parameters + found.master_weights + found.gradients + found.optimizer

    held = [lasting(world_size) for world_size in WORLDS]
    assert held == sorted(held, reverse=True)


def test_a_partition_is_the_model_over_the_world() -> None:
    model = shape("gpt2-xl")
    assert partitions(model, 1) == parameters(model)
    assert partitions(model, 512) == pytest.approx(parameters(model) / 512, rel=1e-3)


@pytest.mark.parametrize(
    ("strategy", "offload", "precision"),
    [(one, "optimizer", p) for one in ("zero1", "zero2", "zero3") for p in ("bf16", "fp16", "fp32")]
    + [("zero3", "parameters", "bf16"), ("fsdp", "parameters", "bf16")],
)
def test_what_is_offloaded_is_on_the_host(strategy: str, offload: str, precision: str) -> None:
    def of(offload: str) -> Any:
        return states(shape(), Sharding(strategy, 8, offload), precision)

    kept, moved = of("none"), of(offload)
    assert kept.host == 0
    assert moved.optimizer == moved.master_weights == 0
    assert moved.parameters <= kept.parameters
    assert moved.host >= kept.optimizer + kept.master_weights


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="zero4"):
        states(shape(), Sharding("zero4", 8), "bf16")
