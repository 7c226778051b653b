"""What loses, what is said of it, and what is proposed where nothing fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from launcher.config.presets import PRESETS
from launcher.config.schema import RunConfig
from launcher.errors import RequestError
from launcher.plan.batch import Batch
from launcher.plan.choose import Place, Plan, make_plan
from launcher.plan.hardware import CATALOGUE, find_gpu
from launcher.plan.search import (
    FILL,
    LEAVE_DDP,
    RUNNERS_UP,
    SOME_LAYERS,
    STRATEGIES,
    Candidate,
    Job,
    candidates,
    fastest,
    forecast,
    remedies,
)
from launcher.plan.shape import shape_of
from launcher.plan.states import Sharding

DDP = [Sharding("ddp", 1)]


def job(preset: str, gpu: str, *, world_size: int = 1, block_size: int = 1024) -> Job:
    kind = find_gpu(gpu)
    return Job(
        shape=shape_of(PRESETS[preset].config()),
        gpu=kind,
        precision="bf16",
        block_size=block_size,
        compiled=False,
        world_size=world_size,
        ranks_per_node=min(8, world_size),
        network=None,
        available=kind.memory,
    )


def remedies_of(asked: Job, found: Sequence[Candidate], *, begun: bool = False) -> list[str]:
    """What is proposed, where the job is the same on every GPU of the catalogue."""
    gpus = sorted((gpu for gpu in CATALOGUE.values() if gpu.memory), key=lambda gpu: gpu.memory or 0)
    there = [replace(asked, gpu=gpu, available=gpu.memory) for gpu in gpus]
    return list(remedies(asked, found, there, begun=begun))


def ways(asked: Job) -> list[Candidate]:
    sizes = (16, 8, 4, 2, 1)
    batches = [Batch(16 * asked.world_size, size, 16 // size, asked.world_size) for size in sizes]
    return candidates(asked, batches, None, [Sharding("ddp", asked.world_size)])


def test_the_others_are_told_with_why_they_lost() -> None:
    asked = replace(job("gpt2", "rtx-4090-24gb"), available=8 * 10**9)
    found = ways(asked)
    chosen = fastest(found)
    assert chosen is not None
    told = forecast(asked, chosen, found, steps=None, price_per_gpu_hour=None)
    assert told is not None
    assert len(told.runners_up) == RUNNERS_UP
    nearest, *slower = told.runners_up
    assert (chosen.batch.micro_batch, chosen.gradient_checkpointing) == (4, 1)
    assert (nearest.micro_batch, nearest.gradient_checkpointing) == (4, False)
    assert "faster, but needs" in nearest.why
    assert f"{FILL * 8e9 / 2**30:.1f} GiB is to be used" in nearest.why
    assert all(one.why.endswith("slower") for one in slower)
    said = [float(one.why.partition("%")[0]) for one in slower]
    assert said == sorted(said)


def test_what_was_asked_for_in_vain_did_not_win_for_its_memory() -> None:
    """A micro-batch is taken as given where it does not fit: a larger one that would not fit either lost to
    nothing."""
    asked = replace(job("gpt2", "rtx-4090-24gb"), available=2 * 10**9)
    found = ways(asked)
    assert not any(one.fits for one in found)
    told = forecast(asked, found[1], found, steps=None, price_per_gpu_hour=None)
    assert told is not None
    assert told.runners_up == []


def test_as_few_layers_are_checkpointed_as_it_takes() -> None:
    """Whatever there is room for, one layer fewer would not fit; and more room never takes more layers."""
    asked = job("gpt2-medium", "rtx-4090-24gb")
    one_batch = [Batch(16, 8, 2, 1)]
    none, every = (candidates(asked, one_batch, on, DDP)[0].memory for on in (False, True))
    assert none is not None
    assert every is not None
    before = 24
    for share in range(20):
        room = int((every.total + (none.total - every.total) * share / 20) / FILL) + 1
        tight = replace(asked, available=room)
        layers = [one.gradient_checkpointing for one in candidates(tight, one_batch, None, DDP) if one.fits]
        assert layers in ([True], [layers[0], True])
        count = 24 if layers[0] is True else int(layers[0])
        (fewer,) = candidates(tight, one_batch, count - 1, DDP)
        assert not fewer.fits
        assert 1 <= count <= before
        before = count
    assert before == 2, "with a twentieth missing"
    kept = fastest(candidates(replace(asked, available=2 * none.total), one_batch, None, DDP))
    assert kept is not None
    assert kept.gradient_checkpointing is False


def test_some_layers_are_checkpointed_only_where_that_gains_more_than_a_prediction_may_be_wrong() -> None:
    """Against all of them of the same micro-batch, and against none of a smaller one."""
    asked = job("gpt2", "rtx-4090-24gb")
    chosen = set()
    for room in (6, 8, 9, 10, 11, 12, 15):
        found = [one for one in ways(replace(asked, available=room * 10**9)) if one.fits]
        best = fastest(found)
        assert best is not None
        some = [one.seconds for one in found if not isinstance(one.gradient_checkpointing, bool)]
        simple = min(one.seconds for one in found if isinstance(one.gradient_checkpointing, bool))
        gains = bool(some) and simple > (1 + SOME_LAYERS) * min(some)
        assert best.seconds == (min(some) if gains else simple)
        chosen.add((gains, any(each < simple for each in some)))
    assert chosen == {(True, True), (False, True), (False, False)}, "each case is among them"


def test_the_first_wins_where_speeds_are_not_known() -> None:
    asked = replace(job("gpt2", "cpu"), precision="fp32", available=10**12)
    found = ways(asked)
    assert fastest(found) is found[0]
    assert forecast(asked, found[0], found, steps=10, price_per_gpu_hour=1.0) is None
    (none,), (every,) = (candidates(asked, [Batch(16, 16, 1, 1)], on, DDP) for on in (False, True))
    assert none.memory is not None
    assert every.memory is not None
    tight = replace(asked, available=int((none.memory.total + every.memory.total) / 2 / FILL))
    chosen = fastest(candidates(tight, [Batch(16, 16, 1, 1)], None, DDP))
    assert chosen is not None
    assert chosen.gradient_checkpointing is True, "nothing is predicted to be gained by some layers"


def test_a_forecast_is_of_the_whole_world_and_the_whole_run() -> None:
    asked = job("gpt2", "a100-sxm-80gb", world_size=8)
    found = ways(asked)
    chosen = fastest(found)
    assert chosen is not None
    told = forecast(asked, chosen, found, steps=7200, price_per_gpu_hour=3.0)
    assert told is not None
    assert told.hours == pytest.approx(2 * chosen.seconds, rel=1e-3)
    assert told.price == pytest.approx(2 * chosen.seconds * 8 * 3, rel=1e-3)
    assert told.tokens_per_second == pytest.approx(16 * 8 * 1024 / chosen.seconds, rel=1e-3)
    assert sum(told.seconds.values()) == pytest.approx(chosen.seconds, rel=1e-3)


def test_the_cheapest_change_comes_first() -> None:
    asked = job("gpt2-xl", "rtx-4090-24gb")
    found = candidates(asked, [Batch(16, 1, 16, 1)], False, DDP)
    host = "(slow, and 32.1 GiB of a node's own memory)"
    offload = f"set train.strategy: zero2 and train.offload: optimizer {host}"
    assert remedies_of(asked, found) == [
        offload,
        "use a GPU with more memory, such as a100-sxm-40gb",
    ]
    with_room = replace(asked, available=35 * 10**9)
    assert remedies_of(with_room, candidates(with_room, [Batch(16, 1, 16, 1)], False, DDP)) == [
        "set train.gradient_checkpointing: auto",
        offload,
        "set data.block_size to 512",
        "use a GPU with more memory, such as a100-sxm-40gb",
    ]


LARGE = {"n_layer": 60, "n_embd": 4096, "n_head": 32}
TOO_SMALL: Sequence[tuple[str, Mapping[str, Any], Place, Mapping[str, Any]]] = [
    (name, overrides, place, {"gradient_checkpointing": checkpointing, **train})
    for name, overrides, place in [
        ("gpt2-large", {}, Place("here", 1, 1, find_gpu("t4-16gb"))),
        ("gpt2-xl", {}, Place("here", 1, 1, find_gpu("rtx-4090-24gb"))),
        ("gpt2-xl", {}, Place("here", 1, 8, find_gpu("a100-sxm-40gb"))),
        ("gpt2-large", {}, Place("here", 1, 2, find_gpu("cpu"), memory=16 << 30)),
        ("gpt2-xl", {}, Place("here", 1, 2, find_gpu("cpu"), memory=16 << 30)),
        ("gpt2-large", {}, Place("here", 2, 2, find_gpu("cpu"), memory=28 << 30)),
        ("gpt2", {"vocab_size": 400_000}, Place("here", 1, 1, find_gpu("cpu"), memory=6 << 30)),
        ("gpt2-xl", LARGE, Place("here", 1, 8, find_gpu("a100-sxm-80gb"))),
    ]
    for checkpointing in ("auto", False, 10)
    for train in (
        {},
        {"strategy": "ddp"},
        {"strategy": "ddp", "precision": "fp32"},
        {"strategy": "zero2", "offload": "optimizer"},
        {"strategy": "fsdp"},
    )
]
"""A model, where it is too large for some of what is asked, and what is asked."""


def plan_of(model: str, overrides: Mapping[str, Any], place: Place, asked: Mapping[str, Any]) -> Plan:
    fields = {**PRESETS[model].config(), **overrides}
    train = {"batch_size": 64, "steps": 10, **{key: asked[key] for key in asked if key != "block_size"}}
    data = {"train": ["text"], "block_size": asked.get("block_size", 1024)}
    run = RunConfig.model_validate({"name": "run", "model": {"name": model}, "data": data, "train": train})
    return make_plan(run, place, shape=shape_of(fields), positions=1024, blocks=None)


def test_each_remedy_is_enough_by_itself() -> None:
    """Whatever a refusal proposes is done, and planned again."""
    followed, told = 0, []
    for model, overrides, place, train in TOO_SMALL:
        try:
            plan = plan_of(model, overrides, place, train)
        except RequestError as refused:
            *changes, with_no_change = (refused.hint or "").split(", or ")
            micro = int(with_no_change.split()[1].removeprefix("train.micro_batch="))
            least = plan_of(model, overrides, place, {**train, "micro_batch": micro})
            told.append((refused.message, least))
            for change in changes:
                if change.startswith("use a smaller model"):
                    continue
                settings = re.findall(r"(?:train|data)\.(\w+)(?:: | to )(\w+)", change)
                there = place
                if "such as " in change:
                    there = replace(place, gpu=find_gpu(change.rpartition("such as ")[2]))
                elif change.startswith("start one rank"):
                    there = replace(place, ranks_per_node=1)
                values = {key: int(value) if value.isdigit() else value for key, value in settings}
                assert values or there != place, change
                plan_of(model, overrides, there, {**train, **values})
                followed += 1
        else:
            assert plan.memory is not None
            assert plan.memory_available is not None
            assert sum(plan.memory.values()) <= FILL * plan.memory_available
    assert followed > 60
    for message, least in told:
        memory = sum((least.memory or {}).values()) / 2**30
        assert f"about {memory:.1f} GiB at micro-batch {least.batch.micro_batch}, " in message


def test_a_remedy_is_tried_with_every_micro_batch() -> None:
    """Long blocks take the least one by one; short ones all at once, when no gradients are kept."""
    asked = replace(job("gpt2-large", "rtx-4090-24gb"), available=int(13.5 * 2**30 / FILL))
    batches = [Batch(4, 4, 1, 1), Batch(4, 1, 4, 1)]
    many, one_by_one = (one.memory for one in candidates(asked, batches, False, DDP))
    assert many is not None
    assert one_by_one is not None
    assert one_by_one.total < many.total
    short = candidates(replace(asked, block_size=256), batches, False, DDP)
    assert [one.fits for one in short] == [True, False]
    assert "set data.block_size to 256" in remedies_of(asked, candidates(asked, batches, False, DDP))


def test_a_run_that_has_begun_keeps_its_strategy_its_blocks_and_its_model() -> None:
    asked = replace(job("gpt2-large", "rtx-4090-24gb", world_size=8, block_size=4096), available=20 * 10**9)
    found = candidates(asked, [Batch(8, 1, 1, 8)], True, [Sharding("ddp", 8)])
    larger = "use a GPU with more memory, such as a10-24gb"
    assert remedies_of(asked, found) == ["set train.strategy: zero1", "set data.block_size to 2048", larger]
    assert remedies_of(asked, found, begun=True) == [larger]
    assert list(remedies(asked, found, [], begun=True)) == []


def test_no_more_is_offloaded_than_a_node_holds() -> None:
    asked = replace(job("gpt2-xl", "a10-24gb"), node_memory=16 << 30)
    found = candidates(asked, [Batch(16, 1, 16, 1)], True, DDP)
    assert not any("train.offload" in change for change in remedies_of(asked, found))
    with_room = replace(asked, node_memory=33 << 30)
    assert "train.offload" in remedies_of(with_room, found)[0]


def test_a_block_is_proposed_that_fits() -> None:
    asked = replace(job("gpt2-large", "t4-16gb", block_size=1024), precision="fp16", available=None)
    (whole,) = candidates(asked, [Batch(1, 1, 1, 1)], True, DDP)
    (half,) = candidates(replace(asked, block_size=512), [Batch(1, 1, 1, 1)], True, DDP)
    assert whole.memory is not None
    assert half.memory is not None
    between = int((whole.memory.total + half.memory.total) / 2 / FILL)
    tight = replace(asked, available=between)
    offload, block, *_ = remedies_of(tight, candidates(tight, [Batch(1, 1, 1, 1)], None, DDP))
    assert offload.startswith("set train.strategy: zero2 and train.offload: optimizer")
    assert block == "set data.block_size to 512"


def test_where_no_gpu_is_large_enough_the_model_must_shrink() -> None:
    asked = job("gpt2-xl", "t4-16gb")
    assert asked.shape is not None
    # Without its layers' weights it would fit: one token's vector is 4 million numbers.
    asked = replace(asked, shape=replace(asked.shape, hidden=1 << 22, heads=1 << 16, layers=1))
    found = candidates(asked, [Batch(1, 1, 1, 1)], None, DDP)
    assert fastest(found) is None
    assert remedies_of(asked, found) == ["use a smaller model"]


def test_sharing_is_proposed_before_offload_and_offload_never_chosen() -> None:
    asked = job("gpt2-xl", "rtx-4090-24gb", world_size=8)
    found = ways(asked)
    assert fastest(found) is None, "under DDP alone"
    assert remedies_of(asked, found)[0] == "set train.strategy: zero1"
    shared = [Sharding("zero3", 8)]
    deep = replace(asked, available=6 * 10**9)
    tried = candidates(deep, [Batch(128, 1, 16, 8)], True, shared)
    assert fastest(tried) is None
    assert remedies_of(deep, tried)[0].startswith("set train.strategy: zero3 and train.offload: ")
    for strategy in STRATEGIES:
        tried = candidates(asked, [Batch(128, 1, 16, 8)], True, [Sharding(strategy, 8)])
        assert tried[0].fits == (strategy in ("zero1", "zero2", "zero3"))


def test_on_a_cpu_fewer_ranks_have_more_memory_each() -> None:
    asked = replace(job("gpt2-xl", "cpu", world_size=2), precision="fp32", available=20 * 2**30)
    found = ways(asked)
    assert fastest(found) is None
    assert remedies_of(asked, found)[0].startswith("start one rank (gpus_per_node: 1)")


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large"])
@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_where_the_host_is_waited_for_ddp_is_not_left_for_what_asks_more_of_it(
    preset: str, micro_batch: int
) -> None:
    asked = replace(job(preset, "h200-sxm-141gb", world_size=8), compiled=True)
    shardings = [Sharding(name, 8) for name in STRATEGIES]
    found = candidates(asked, [Batch(8 * micro_batch, micro_batch, 1, 8)], False, shardings)
    chosen = fastest(found)
    assert chosen is not None
    assert chosen.sharding.strategy == "ddp"
    times = {one.sharding.strategy: one.seconds for one in found}
    assert times["zero1"] < times["zero2"] < times["zero3"], "as measured: docs/benchmarks/gpu.md"


def test_the_simplest_of_equally_fast_strategies_is_taken() -> None:
    asked = job("gpt2", "h100-sxm-80gb", world_size=8)
    batches = [Batch(128, 16, 1, 8)]
    found = candidates(asked, batches, False, [Sharding(name, 8) for name in STRATEGIES])
    ddp, *zero = found
    for slowdown, expected in ((1 + 0.9 * LEAVE_DDP, ddp), (1 + 1.1 * LEAVE_DDP, zero[0])):
        assert zero[0].speed is not None
        slower = replace(zero[0].speed, host=0.0, optimizer=slowdown * zero[0].seconds)
        exact = replace(slower, matrices=0.0, attention=0.0, elementwise=0.0, communication=0.0)
        assert exact.total == pytest.approx(slowdown * zero[0].seconds)
        some = [replace(ddp, speed=exact), zero[0]]
        chosen = fastest(some)
        assert chosen is not None
        assert chosen.sharding == expected.sharding
    told = forecast(asked, zero[0], found, steps=None, price_per_gpu_hour=None)
    assert told is not None
    assert {one.strategy for one in told.runners_up} == {"ddp", "zero2", "zero3"}
