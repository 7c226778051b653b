"""The plan against what the configuration asks, and its choices against every other there was."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.presets import PRESETS
from launcher.config.schema import RunConfig
from launcher.errors import MachineError, RequestError
from launcher.plan.batch import NOTHING_DONE, Batch, Done
from launcher.plan.choose import CPU_TOKENS, GPU_TOKENS, Blocks, Every, Place, Plan, make_plan
from launcher.plan.collectives import Wires
from launcher.plan.hardware import CATALOGUE, find_gpu
from launcher.plan.memory import estimate
from launcher.plan.search import FILL, LEAVE_DDP, SOME_LAYERS, STRATEGIES, TIE
from launcher.plan.shape import Shape
from launcher.plan.speed import step_speed
from launcher.plan.states import Sharding
from launcher.plan.traffic import stack_of
from tests.plan.shapes import shape

SMALL = st.integers(1, 12)
GPUS = tuple(name for name in CATALOGUE if name != "cpu")
BLOCKS = Blocks(train=1000, train_tokens=64_000, validation=10)


def asked(**keys: Any) -> RunConfig:
    """A run with the keys of `train` given here; `data`, `model` and `checkpoint` as sections."""
    sections = {name: keys.pop(name, {}) for name in ("data", "model", "checkpoint")}
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "gpt2", **sections["model"]},
            "data": {"train": ["text"], **sections["data"]},
            "train": {
                "batch_size": 8,
                **({} if {"tokens", "epochs"} & keys.keys() else {"steps": 100}),
                **keys,
            },
            "checkpoint": sections["checkpoint"],
        }
    )


def on(gpu: str = "cpu", ranks: int = 1, *, nodes: int = 1, memory: int | None = None) -> Place:
    return Place("here", nodes, ranks, find_gpu(gpu), cores=8, memory=memory)


def planned(
    run: RunConfig,
    place: Place,
    *,
    shape: Shape | None = None,
    positions: int | None = None,
    blocks: Blocks | None = None,
    done: Done = NOTHING_DONE,
) -> Plan:
    return make_plan(run, place, shape=shape, positions=positions, blocks=blocks, done=done)


@given(
    micro=SMALL,
    accumulation=SMALL,
    ranks=SMALL,
    nodes=st.integers(1, 4),
    gpu=st.sampled_from(sorted(CATALOGUE)),
    fixed=st.booleans(),
)
def test_every_plan_multiplies_out(
    micro: int, accumulation: int, ranks: int, nodes: int, gpu: str, fixed: bool
) -> None:
    size = micro * accumulation * ranks * nodes
    run = asked(batch_size=size, micro_batch=micro if fixed else "auto", data={"block_size": 128})
    plan = planned(run, on(gpu, ranks, nodes=nodes), shape=shape())
    batch = plan.batch
    assert batch.micro_batch * batch.accumulation * batch.world_size == batch.batch_size == size
    assert batch.world_size == plan.nodes * plan.ranks_per_node == ranks * nodes
    assert not fixed or batch.micro_batch == micro


@pytest.mark.parametrize("gpu", GPUS)
def test_auto_precision_is_what_the_generation_has(gpu: str) -> None:
    before_ampere = gpu.startswith(("t4", "v100"))
    assert planned(asked(), on(gpu)).precision == ("fp16" if before_ampere else "bf16")
    assert planned(asked(precision="fp32"), on(gpu)).precision == "fp32"
    if before_ampere:
        with pytest.raises(MachineError, match=f"bf16 is not supported by {gpu}"):
            planned(asked(precision="bf16"), on(gpu))


def test_precision_on_a_cpu() -> None:
    assert planned(asked(), on()).precision == "fp32"
    assert planned(asked(precision="bf16"), on()).precision == "bf16"
    with pytest.raises(MachineError, match="fp16 needs a GPU"):
        planned(asked(precision="fp16"), on())


@given(
    share=st.sampled_from((1, 6, 16, 48, 64)),
    gpu=st.sampled_from(("t4-16gb", "v100-sxm-32gb", "rtx-4090-24gb", "a100-sxm-40gb", "h100-sxm-80gb")),
    preset=st.sampled_from(sorted(PRESETS)),
    block_size=st.sampled_from((128, 1000, 1024)),
    checkpointing=st.sampled_from(("auto", True, False)),
    ranks=st.sampled_from((1, 8)),
)
def test_nothing_better_would_have_fitted(
    share: int, gpu: str, preset: str, block_size: int, checkpointing: Literal["auto"] | bool, ranks: int
) -> None:
    place = on(gpu, ranks)
    run = asked(
        batch_size=share * ranks, gradient_checkpointing=checkpointing, data={"block_size": block_size}
    )

    precision = "fp16" if gpu[0] in "tv" else "bf16"
    chunks = precision == "bf16"
    model = replace(shape(preset), vocab=50304)

    def fits(strategy: str, micro: int, checkpointing: bool | int) -> bool:
        needed = estimate(
            model,
            Sharding(strategy, ranks),
            micro_batch=micro,
            accumulation=share // micro,
            block_size=block_size,
            precision=precision,
            gradient_checkpointing=checkpointing,
            chunked_loss=chunks and strategy != "zero3",
            compiled=strategy == "ddp",
            on_cpu=False,
        )
        return needed.total <= FILL * (place.gpu.memory or 0)

    def seconds(strategy: str, micro: int, checkpointing: bool | int) -> float:
        assert place.gpu.link is not None
        sharding = Sharding(strategy, ranks)
        speed = step_speed(
            model,
            place.gpu,
            Batch(share * ranks, micro, share // micro, ranks),
            Wires(ranks, place.gpu.link, None),
            stack_of(
                model,
                sharding.numbers(precision),
                compiled=strategy == "ddp",
                chunked_loss=chunks and strategy != "zero3",
            ),
            sharding,
            block_size=block_size,
            precision=precision,
            gradient_checkpointing=checkpointing,
            pace=0.75 if gpu.startswith("h") else 1.0,
        )
        assert speed is not None
        return speed.total

    def ways(strategy: str, micro: int) -> list[bool | int]:
        """Which layers may be checkpointed; of those that fit the fewest is fastest, all are simple."""
        if checkpointing != "auto":
            return [checkpointing] if fits(strategy, micro, checkpointing) else []
        counts: list[bool | int] = [False, *range(1, model.layers), True]
        fit = [count for count in counts if fits(strategy, micro, count)]
        return [*fit[:1], *(count for count in fit[1:] if count is True)]

    def best_of(strategy: str) -> float:
        """Seconds of the fastest way; of some layers only where that gains enough."""
        ways = [one for one in fitting if one[0] == strategy]
        least = min(seconds(*one) for one in ways)
        simple = min((seconds(*one) for one in ways if isinstance(one[2], bool)), default=math.inf)
        return simple if simple <= (1 + SOME_LAYERS) * least else least

    sizes = [n for n in range(1, share + 1) if share % n == 0 and n * block_size <= GPU_TOKENS]
    fitting = [
        (strategy, micro, on)
        for strategy in (STRATEGIES if ranks > 1 else ("ddp",))
        for micro in sizes
        for on in ways(strategy, micro)
    ]
    try:
        plan = planned(run, place, shape=shape(preset))
    except RequestError:
        assert not fitting
        return
    chosen = (plan.strategy, plan.batch.micro_batch, plan.gradient_checkpointing)
    assert chosen in fitting
    best = {strategy: best_of(strategy) for strategy in STRATEGIES if strategy in {one[0] for one in fitting}}
    least = min(best.values())
    assert seconds(*chosen) == best[plan.strategy]

    def is_near(strategy: str) -> bool:
        return best[strategy] <= (1 + (LEAVE_DDP if strategy == "ddp" else TIE)) * least

    assert is_near(plan.strategy)
    simpler = STRATEGIES[: STRATEGIES.index(plan.strategy)]
    assert not any(is_near(strategy) for strategy in simpler if strategy in best)
    assert plan.offload == "none", "which is slow, and is for the user to choose"
    assert plan.memory is not None
    assert plan.memory_available == place.gpu.memory
    assert sum(plan.memory.values()) <= FILL * (place.gpu.memory or 0)


def test_a_model_that_does_not_fit_is_refused_with_what_to_do() -> None:
    large = replace(shape("gpt2-xl"), layers=400)
    with pytest.raises(RequestError, match=r"does not fit on t4-16gb: about .* GiB") as refused:
        planned(asked(), on("t4-16gb"), shape=large)
    assert refused.value.hint is not None
    assert "at micro-batch 8," in refused.value.message, "whose gradients are not kept"
    for way in ("smaller model", "train.micro_batch=8"):
        assert way in refused.value.hint
    tried = planned(asked(micro_batch=1), on("t4-16gb"), shape=large)
    assert tried.batch.micro_batch == 1, "what is fixed is not refused for memory"


@given(micro=st.sampled_from((1, 2, 8)), checkpointing=st.sampled_from(("auto", True, False)))
def test_a_fixed_micro_batch_is_never_refused_for_memory(micro: int, checkpointing: bool | str) -> None:
    tiny = Place("here", 1, 1, replace(find_gpu("t4-16gb"), memory=1 << 20))
    run = asked(micro_batch=micro, gradient_checkpointing=checkpointing)
    plan = planned(run, tiny, shape=shape())
    assert plan.batch.micro_batch == micro
    assert plan.gradient_checkpointing == (checkpointing in ("auto", True)), "auto: what memory asks for"


def test_so_many_layers_are_checkpointed_as_are_asked_for() -> None:
    plan = planned(asked(gradient_checkpointing=6), on("t4-16gb"), shape=shape())
    assert plan.gradient_checkpointing == 6
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    assert planned(asked(gradient_checkpointing=6), on("t4-16gb")).gradient_checkpointing == 6
    one = planned(asked(gradient_checkpointing=1), on("t4-16gb"), shape=shape())
    assert one.gradient_checkpointing is not True, "one layer is not all of them"
    every = planned(asked(gradient_checkpointing=12), on("t4-16gb"), shape=shape())
    assert every == planned(asked(gradient_checkpointing=True), on("t4-16gb"), shape=shape())
    with pytest.raises(RequestError, match="gradient_checkpointing=13 is over the model's 12 layers"):
        planned(asked(gradient_checkpointing=13), on("t4-16gb"), shape=shape())


def test_an_unknown_architecture_is_planned_without_an_estimate() -> None:
    plan = planned(asked(batch_size=512), on("t4-16gb"))
    assert plan.memory is None
    assert plan.forecast is None
    assert plan.parameters is None
    assert plan.gradient_checkpointing is False
    assert plan.batch.micro_batch == GPU_TOKENS // 1024


def test_on_a_cpu_ranks_share_cores_and_memory() -> None:
    plan = planned(asked(batch_size=512), on(ranks=2, memory=1 << 40), shape=shape())
    assert plan.threads_per_rank == 4
    assert plan.memory_available == 1 << 39
    assert plan.device == "cpu"
    assert plan.forecast is None, "a CPU's speed is not in the catalogue"
    assert plan.batch.micro_batch == CPU_TOKENS // 1024
    crowded = planned(asked(batch_size=12, micro_batch=1), on(ranks=12, memory=1 << 40), shape=shape())
    assert crowded.threads_per_rank == 1
    assert planned(asked(), on("t4-16gb"), shape=shape()).threads_per_rank is None


def test_a_block_over_the_model_s_positions_is_refused() -> None:
    run = asked(data={"block_size": 1025})
    with pytest.raises(RequestError, match=r"data\.block_size=1025 is over the 1024 positions") as scratch:
        planned(run, on(), shape=shape(), positions=1024)
    assert "model.overrides" in (scratch.value.hint or "")
    with pytest.raises(RequestError) as pretrained:
        planned(asked(data={"block_size": 1025}, model={"init": "pretrained"}), on(), positions=1024)
    assert "model.overrides" not in (pretrained.value.hint or "")
    assert planned(asked(), on(), shape=shape(), positions=1024).block_size == 1024
    assert planned(run, on(), positions=None).block_size == 1025


@given(
    batch_size=st.integers(1, 64),
    block_size=st.integers(2, 2048),
    tokens=st.integers(1, 10**9),
    epochs=st.floats(0.01, 20),
    blocks=st.integers(1, 10**5),
    warmup=st.floats(0, 0.999),
)
def test_the_length_is_the_least_that_covers_what_was_asked(
    batch_size: int, block_size: int, tokens: int, epochs: float, blocks: int, warmup: float
) -> None:
    data = {"block_size": block_size}
    by_tokens = planned(asked(batch_size=batch_size, tokens=tokens, warmup=warmup, data=data), on())
    assert by_tokens.steps is not None
    assert by_tokens.tokens is not None
    assert by_tokens.tokens >= tokens > by_tokens.tokens - batch_size * block_size
    assert by_tokens.warmup_steps is not None
    assert abs(by_tokens.warmup_steps - warmup * by_tokens.steps) <= 0.5

    text = Blocks(blocks, blocks * block_size, 0)
    by_epochs = planned(asked(batch_size=batch_size, epochs=epochs, data=data), on(), blocks=text)
    assert by_epochs.steps is not None
    assert by_epochs.epochs is not None
    assert by_epochs.epochs >= epochs * (1 - 1e-12)
    assert by_epochs.steps == 1 or (by_epochs.steps - 1) * batch_size < epochs * blocks


def test_steps_are_open_until_the_text_is_prepared() -> None:
    before = planned(asked(epochs=2.5), on())
    assert (before.steps, before.warmup_steps, before.tokens, before.epochs) == (None, None, None, None)
    after = planned(asked(epochs=2.5), on(), blocks=BLOCKS)
    assert after.steps == math.ceil(2.5 * 1000 / 8) == 313
    assert after.epochs == pytest.approx(313 * 8 / 1000)


def test_evaluation_is_never_without_validation_text() -> None:
    held: dict[str, Any] = {"validation": 0}
    assert planned(asked(data=held), on()).eval_every == Every()
    assert planned(asked(), on(), blocks=replace(BLOCKS, validation=0)).eval_every == Every()
    assert planned(asked(), on(), blocks=BLOCKS).eval_every == Every(steps=500)
    assert planned(asked(data={"validation": ["held.txt"]}), on()).eval_every == Every(steps=500)


def test_how_often_is_in_steps_or_in_seconds() -> None:
    plan = planned(asked(eval_every="30min", checkpoint={"every": 7}), on())
    assert plan.eval_every == Every(seconds=1800.0)
    assert plan.checkpoint_every == Every(steps=7)


@given(
    gpu=st.sampled_from(("cpu", "t4-16gb", "h100-sxm-80gb")),
    length=st.sampled_from(("steps", "tokens", "epochs")),
    known=st.booleans(),
    blocks=st.none() | st.just(BLOCKS),
    every=st.sampled_from((10, "5min")),
)
def test_a_plan_survives_the_journey_through_json(
    gpu: str, length: str, known: bool, blocks: Blocks | None, every: int | str
) -> None:
    run = asked(**{length: 5}, eval_every=every)
    plan = planned(run, on(gpu), shape=shape() if known else None, blocks=blocks)
    assert Plan.from_dict(plan.as_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_what_is_not_a_plan_is_not_taken_for_one() -> None:
    fields = planned(asked(), on()).as_dict()
    with pytest.raises(TypeError):
        Plan.from_dict({**fields, "unheard_of": 1})
    for missing in ("batch", "forecast", "fast"):
        with pytest.raises(KeyError):
            Plan.from_dict({name: value for name, value in fields.items() if name != missing})


GB200 = 50e9
"""400 Gbit/s a GPU between nodes, in bytes/s."""


def at(gpu: str, ranks: int, nodes: int = 1) -> Place:
    return Place("there", nodes, ranks, find_gpu(gpu), memory=64 << 30, network=GB200)


@pytest.mark.parametrize(
    ("place", "strategy"),
    [
        (at("a100-sxm-40gb", 8), {"zero2", "zero3"}),
        (at("h100-sxm-80gb", 8), {"ddp"}),
        (at("h100-sxm-80gb", 8, nodes=4), {"ddp"}),
        (at("h200-sxm-141gb", 1), {"ddp"}),
    ],
    ids=["8x-a100", "8x-h100", "4x8x-h100", "h200"],
)
def test_gpt2_xl_is_planned_on_each_cluster(place: Place, strategy: set[str]) -> None:
    plan = planned(asked(batch_size=1024), place, shape=shape("gpt2-xl"))
    assert plan.strategy in strategy
    assert plan.forecast is not None
    assert plan.forecast.mfu is not None
    assert 0.2 < plan.forecast.mfu < 0.6
    assert plan.host_memory == 0


def test_gpt2_xl_needs_offload_on_a_desktop_gpu_and_one_rank_on_a_cpu() -> None:
    with pytest.raises(RequestError) as refused:
        planned(asked(batch_size=1024), on("rtx-4090-24gb"), shape=shape("gpt2-xl"))
    assert (refused.value.hint or "").startswith("set train.strategy: zero2 and train.offload: optimizer")
    taken = planned(
        asked(batch_size=1024, strategy="zero2", offload="optimizer"),
        on("rtx-4090-24gb"),
        shape=shape("gpt2-xl"),
    )
    assert (taken.strategy, taken.offload) == ("zero2", "optimizer")
    assert taken.host_memory > 12 * 1_557_611_200, "the master weights and two moments, at least"
    with pytest.raises(RequestError) as crowded:
        planned(asked(), on(ranks=2, memory=64 << 30), shape=shape("gpt2-xl"))
    assert (crowded.value.hint or "").startswith("start one rank")


def test_the_strategy_asked_for_is_taken_as_given() -> None:
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp"):
        plan = planned(asked(strategy=strategy), on("a100-sxm-80gb", 8), shape=shape())
        assert plan.strategy == strategy
    assert planned(asked(strategy="zero3"), on(ranks=2), shape=shape()).strategy == "zero3"
    assert planned(asked(), on(ranks=2), shape=shape()).strategy == "ddp", "a CPU has nothing to gain"
    assert planned(asked(), on("a100-sxm-80gb", 8)).strategy == "ddp", "nobody knows what would fit"


def test_a_run_goes_on_with_the_strategy_of_its_checkpoint() -> None:
    fresh = planned(asked(), on("a100-sxm-80gb", 8), shape=shape())
    assert fresh.strategy != "zero1"
    begun = planned(asked(), on("a100-sxm-80gb", 8), shape=shape(), done=Done(10, 5120, 2, "zero1"))
    assert begun.strategy == "zero1"
    alone = planned(asked(), on("a100-sxm-80gb", 1), shape=shape(), done=Done(10, 5120, 2, "zero1"))
    assert alone.strategy == "zero1"


def test_a_longer_run_keeps_the_warmup_it_began_with() -> None:
    assert planned(asked(steps=1000, warmup=0.05), on()).warmup_steps == 50
    begun = Done(steps=20, samples=160, warmup_steps=1)
    assert planned(asked(steps=1000, warmup=0.05), on(), done=begun).warmup_steps == 1


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(MachineError, match="offloaded from a GPU"):
        planned(asked(strategy="fsdp", offload="parameters"), on(ranks=2), shape=shape())
    assert planned(asked(strategy="fsdp"), on(ranks=2), shape=shape()).strategy == "fsdp"


def test_offload_alone_leaves_the_strategy_open() -> None:
    for offload, strategies in (("optimizer", {"zero1", "zero2", "zero3"}), ("parameters", {"zero3"})):
        plan = planned(asked(offload=offload), on("rtx-4090-24gb", 8), shape=shape())
        assert plan.strategy in strategies
        assert plan.offload == offload
        assert plan.host_memory > 0


def test_more_than_a_node_holds_is_not_offloaded() -> None:
    run, place = asked(offload="optimizer", batch_size=64), on("a10-24gb", memory=16 << 30)
    with pytest.raises(
        MachineError, match=r"takes about 29\.0 GiB of a node's own memory, which is 16\.0"
    ) as no:
        planned(run, place, shape=shape("gpt2-xl"))
    assert no.value.key == "train.offload"
    with pytest.raises(MachineError, match="of a node's own memory"):
        planned(asked(strategy="zero2", offload="optimizer", micro_batch=1), place, shape=shape("gpt2-xl"))
    assert planned(run, replace(place, memory=33 << 30), shape=shape("gpt2-xl")).host_memory < 33 << 30
    assert planned(run, replace(place, memory=None), shape=shape("gpt2-xl")).offload == "optimizer"


def test_on_a_cpu_what_is_offloaded_is_in_the_same_memory() -> None:
    plan = planned(asked(strategy="zero3", offload="parameters"), on(ranks=2), shape=shape())
    assert plan.parameters is not None
    assert plan.memory is not None
    assert sum(plan.memory.values()) > 16 * plan.parameters / 2, "AdamW in fp32, in halves"
    assert plan.host_memory == 0, "it is not counted twice"


def test_4096_gpus_are_planned_in_half_a_second() -> None:
    program = """
from launcher.config.presets import PRESETS
from launcher.config.schema import RunConfig
from launcher.plan.choose import Place, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.shape import shape_of

run = RunConfig.model_validate({
    "name": "run", "model": {"name": "gpt2-xl"}, "data": {"train": ["text"]},
    "train": {"batch_size": 4096 * 16, "steps": 100},
})
place = Place("there", 512, 8, find_gpu("h100-sxm-80gb"), network=50e9)
plan = make_plan(run, place, shape=shape_of(PRESETS["gpt2-xl"].config()), positions=1024, blocks=None)
assert plan.batch.world_size == 4096
"""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5, "seconds of processor time, which a busy machine does not lengthen much"
