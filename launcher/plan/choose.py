"""The plan: what a run becomes on given hardware. Pure; the same inputs give the same plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from launcher.config.schema import RunConfig
from launcher.config.values import seconds
from launcher.errors import MachineError, RequestError
from launcher.plan.batch import NOTHING_DONE, Batch, Done, count_steps, splits, warmup_steps
from launcher.plan.fast import Fast, fast_paths
from launcher.plan.hardware import CATALOGUE, GPU
from launcher.plan.search import (
    FILL,
    STRATEGIES,
    Candidate,
    Forecast,
    Job,
    RunnerUp,
    candidates,
    fastest,
    forecast,
    host_has_room,
    remedies,
    states_on_host,
)
from launcher.plan.shape import Shape, parameters
from launcher.plan.states import Sharding, checkpoint_bytes
from launcher.sizes import size_in_words

CPU_TOKENS = 8192
"""Tokens in a forward pass on a CPU beyond which a larger micro-batch only costs memory."""

GPU_TOKENS = 65536
"""The same on a GPU: kernels are full well below it."""


@dataclass(frozen=True, slots=True)
class Place:
    """The hardware a run is planned for, with nothing left to find out.

    `cores` and `memory` (bytes) are one node's, known only where this machine is the node or a job asks for
    them. `network` is in bytes/s for each GPU, between nodes, `price_per_gpu_hour` in the user's currency.
    """

    cluster: str
    nodes: int
    ranks_per_node: int
    gpu: GPU
    cores: int | None = None
    memory: int | None = None
    network: float | None = None
    price_per_gpu_hour: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def is_cpu(self) -> bool:
        return self.gpu.is_cpu


@dataclass(frozen=True, slots=True)
class Every:
    """How often: in optimizer steps or in seconds of wall time, the other None. Both None: never."""

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """How much prepared text there is, in blocks (rows, with `packing: pad`) and tokens."""

    train: int
    train_tokens: int
    validation: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen. Every number the run needs that is not in the configuration itself.

    `samples` are those in the whole run. They, `steps` and `warmup_steps` are None only where training is
    measured in epochs and the text is not prepared yet. `parameters` and `memory` (bytes per rank, by
    category) are None for a model whose architecture the memory model does not know. `forecast` is None
    there too, and on a CPU. `host_memory` is what offload takes of a node's own memory, in bytes.
    `peak_flops` is the GPU's in FLOP/s under `precision`, None where it is not known.
    `gradient_checkpointing`: of every layer, of none, or of so many, the first ones.
    """

    name: str
    cluster: str
    gpu: str
    device: str
    nodes: int
    ranks_per_node: int
    threads_per_rank: int | None
    strategy: str
    offload: str
    precision: str
    gradient_checkpointing: bool | int
    compile: bool
    batch: Batch
    block_size: int
    steps: int | None
    samples: int | None
    warmup_steps: int | None
    eval_every: Every
    checkpoint_every: Every
    blocks: Blocks | None
    parameters: int | None
    memory: dict[str, int] | None
    memory_available: int | None
    forecast: Forecast | None
    host_memory: int
    peak_flops: float | None
    fast: Fast

    @property
    def tokens(self) -> int | None:
        """Token positions in the whole run: `samples x block_size`."""
        return None if self.samples is None else self.samples * self.block_size

    @property
    def epochs(self) -> float | None:
        """Passes over the training blocks."""
        if self.samples is None or self.blocks is None or not self.blocks.train:
            return None
        return self.samples / self.blocks.train

    @property
    def checkpoint_bytes(self) -> int | None:
        """Bytes of one checkpoint on disk; None for a model whose size is not known."""
        if self.parameters is None:
            return None
        return checkpoint_bytes(self.parameters, self.strategy, self.precision)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """The plan that `as_dict` wrote. Raises TypeError or KeyError on anything else."""
        blocks, predicted = fields["blocks"], fields["forecast"]
        return cls(
            **{
                **fields,
                "batch": Batch(**fields["batch"]),
                "eval_every": Every(**fields["eval_every"]),
                "checkpoint_every": Every(**fields["checkpoint_every"]),
                "blocks": None if blocks is None else Blocks(**blocks),
                "forecast": None if predicted is None else _forecast_from(predicted),
                "fast": Fast(**fields["fast"]),
            }
        )


def _forecast_from(fields: Mapping[str, Any]) -> Forecast:
    return Forecast(**{**fields, "runners_up": [RunnerUp(**one) for one in fields["runners_up"]]})


def make_plan(
    run: RunConfig,
    place: Place,
    *,
    shape: Shape | None,
    positions: int | None,
    blocks: Blocks | None,
    attention: str | None = None,
    done: Done = NOTHING_DONE,
) -> Plan:
    """Work out everything `run` leaves open, for `place`.

    `shape` is the model's, with the tokenizer's vocabulary, or None for an architecture not known in
    advance; `positions` the longest sequence it can take; `attention` what its config asks for; `blocks` what
    the prepared text holds, or None before it is prepared; `done` how far a run has come that goes on.

    Raises RequestError for what the run asks in vain, MachineError for what `place` lacks.
    """
    data, train = run.data, run.train
    if positions is not None and data.block_size > positions:
        raise RequestError(
            f"data.block_size={data.block_size} is over the {positions} positions of model {run.model.name}",
            hint=f"set data.block_size to at most {positions}"
            + (", or raise the model's own limit in model.overrides" if run.model.init == "scratch" else ""),
            key="data.block_size",
        )

    def job_on(gpu: GPU) -> Job:
        return _job(run, replace(place, gpu=gpu), shape, attention, done)

    job = job_on(place.gpu)
    chosen, found = _fit(run, job, done, job_on)
    steps = count_steps(
        batch_size=train.batch_size,
        block_size=data.block_size,
        steps=train.steps,
        tokens=train.tokens,
        epochs=train.epochs,
        blocks=None if blocks is None else blocks.train,
        done=done,
    )
    evaluates = data.validation not in (0, []) and (blocks is None or blocks.validation > 0)
    if train.early_stopping is not None and not evaluates:
        raise RequestError(
            "train.early_stopping needs evaluations, and the validation text has not one block",
            hint="raise data.validation, or name validation files",
            key="train.early_stopping",
        )
    return Plan(
        name=run.name,
        cluster=place.cluster,
        gpu=place.gpu.name,
        device="cpu" if place.is_cpu else "cuda",
        nodes=place.nodes,
        ranks_per_node=place.ranks_per_node,
        threads_per_rank=_threads(place),
        strategy=chosen.sharding.strategy,
        offload=chosen.sharding.offload,
        precision=job.precision,
        gradient_checkpointing=chosen.gradient_checkpointing,
        compile=job.compiles(chosen.sharding.strategy),
        batch=chosen.batch,
        block_size=data.block_size,
        steps=steps,
        samples=None if steps is None else done.samples + (steps - done.steps) * train.batch_size,
        warmup_steps=_warmup(train.warmup, steps, done),
        eval_every=_every(train.eval_every) if evaluates else Every(),
        checkpoint_every=_every(run.checkpoint.every),
        blocks=blocks,
        parameters=None if shape is None else parameters(shape),
        memory=None if chosen.memory is None else dict(chosen.memory.items()),
        memory_available=job.available,
        host_memory=states_on_host(job, chosen.sharding),
        peak_flops=place.gpu.peak_flops(job.precision),
        fast=job.fast.under(chosen.sharding.strategy),
        forecast=forecast(job, chosen, found, steps=steps, price_per_gpu_hour=place.price_per_gpu_hour),
    )


def _warmup(warmup: float, steps: int | None, done: Done) -> int | None:
    """Steps of warmup: those the run began with, whatever its length has become since."""
    if done.warmup_steps is not None or steps is None:
        return done.warmup_steps
    return warmup_steps(warmup, steps)


def _precision(run: RunConfig, place: Place) -> str:
    asked = run.train.precision
    if asked == "auto":
        if place.is_cpu:
            return "fp32"
        return "bf16" if place.gpu.supports_bf16 else "fp16"
    if asked == "fp16" and place.is_cpu:
        raise MachineError(
            "train.precision=fp16 needs a GPU, and this run is planned on a CPU",
            hint="use train.precision=auto, bf16 or fp32",
            key="train.precision",
        )
    if asked == "bf16" and not place.gpu.supports_bf16:
        raise MachineError(
            f"train.precision=bf16 is not supported by {place.gpu.name}",
            hint="use train.precision=auto or fp16",
            key="train.precision",
        )
    return asked


def _job(run: RunConfig, place: Place, shape: Shape | None, attention: str | None, done: Done) -> Job:
    precision = _precision(run, place)
    return Job(
        shape=shape,
        gpu=place.gpu,
        precision=precision,
        block_size=run.data.block_size,
        compiled=_compiled(run, place),
        world_size=place.world_size,
        ranks_per_node=place.ranks_per_node,
        network=place.network,
        available=_memory_per_rank(place),
        fast=fast_paths(
            run,
            attention=attention,
            vocabulary=None if shape is None else shape.vocab,
            precision=precision,
            gpu=place.gpu,
            padded_before=done.padded_vocabulary,
        ),
        node_memory=place.memory,
    )


def _compiled(run: RunConfig, place: Place) -> bool | Literal["auto"]:
    """Rows of other lengths would be compiled anew; on a CPU it gains little and takes a minute."""
    asked = run.train.compile
    if asked != "auto":
        return asked
    alike = run.data.packing == "concat" and not run.data.isolate_documents
    return "auto" if alike and not place.is_cpu else False


def _fit(
    run: RunConfig, job: Job, done: Done, job_on: Callable[[GPU], Job]
) -> tuple[Candidate, list[Candidate]]:
    """Strategy, gradient checkpointing and the batch's split, chosen, and everything it was chosen from.

    What the user fixed is taken as given, and not refused for memory: the estimate may be wrong.
    """
    train = run.train
    fixed = None if train.micro_batch == "auto" else train.micro_batch
    largest = max(1, (CPU_TOKENS if job.gpu.is_cpu else GPU_TOKENS) // job.block_size)
    checkpointing = _checkpointing(train.gradient_checkpointing, job.shape)
    batches = splits(train.batch_size, job.world_size, fixed, largest)
    shardings = _with_room_on_the_host(_shardings(run, job, done), job)
    found = candidates(job, batches, checkpointing, shardings)
    chosen = fastest(found)
    if chosen is None and fixed is not None:
        chosen = min(found, key=_total)
    if chosen is not None:
        return chosen, found
    least = min(found, key=_total)
    micro, memory = least.batch.micro_batch, f"about {size_in_words(_total(least))}"
    larger = [job_on(gpu) for gpu in _larger_gpus(run, job.gpu)]
    ways = remedies(job, found, larger, begun=done.strategy is not None)
    raise RequestError(
        f"{run.model.name} does not fit on {job.gpu.name}: {memory} at micro-batch {micro}, "
        f"and of {size_in_words(job.available or 0)} {FILL:.0%} is to be used",
        hint=", or ".join([*ways, f"set train.micro_batch={micro} to try all the same"]),
    )


def _total(one: Candidate) -> int:
    return one.memory.total if one.memory else 0


def _larger_gpus(run: RunConfig, gpu: GPU) -> list[GPU]:
    """The catalogue's GPUs with more memory that can compute as the run asks, the smallest first."""
    able = (one for one in CATALOGUE.values() if one.supports_bf16 or run.train.precision != "bf16")
    larger = (one for one in able if (one.memory or 0) > (gpu.memory or 0))
    return sorted(larger, key=lambda one: one.memory or 0)


def _checkpointing(asked: Literal["auto"] | bool | int, shape: Shape | None) -> bool | int | None:
    """What is asked for, None for `auto`. Raises RequestError for more layers than there are."""
    if asked == "auto" or shape is None or isinstance(asked, bool):
        return None if asked == "auto" else asked
    if asked > shape.layers:
        raise RequestError(
            f"train.gradient_checkpointing={asked} is over the model's {shape.layers} layers",
            hint="set train.gradient_checkpointing: true for all of them",
            key="train.gradient_checkpointing",
        )
    return asked if asked < shape.layers else True


def _shardings(run: RunConfig, job: Job, done: Done) -> list[Sharding]:
    """The strategies to choose from, the simpler first; one that is asked for is taken as given.

    With one rank there is nothing to share, and on a CPU nothing to gain. Without a closed form for the
    model nobody knows what would fit. Raises MachineError for what a CPU cannot do.
    """
    strategy, offload = run.train.strategy, run.train.offload
    if strategy == "fsdp" and offload == "parameters" and job.gpu.is_cpu:
        raise MachineError(
            "with train.strategy=fsdp parameters are offloaded from a GPU, and this run is planned on a CPU",
            hint="set train.offload: none, or train.strategy: zero3",
            key="train.offload",
        )
    if strategy != "auto" or done.strategy is not None:
        # One engine does not read another's checkpoint, wherever the run goes on.
        names: tuple[str, ...] = (done.strategy or strategy,)
    elif offload != "none":
        names = ("zero3",) if offload == "parameters" else ("zero1", "zero2", "zero3")
    elif job.world_size == 1 or job.gpu.is_cpu or job.shape is None:
        names = ("ddp",)
    else:
        names = STRATEGIES
    return [Sharding(name, job.world_size, offload) for name in names]


def _with_room_on_the_host(shardings: list[Sharding], job: Job) -> list[Sharding]:
    """Those whose offload a node has the memory for. Raises MachineError where it has it for none."""
    found = [sharding for sharding in shardings if host_has_room(job, sharding)]
    if not found:
        least = min(states_on_host(job, sharding) for sharding in shardings)
        needed, there = (size_in_words(size) for size in (least, job.node_memory or 0))
        raise MachineError(
            f"train.offload={shardings[0].offload} takes about {needed} of a node's own memory, "
            f"which is {there}",
            hint="use nodes with more memory, or train.offload: none and a train.strategy that shares more",
            key="train.offload",
        )
    return found


def _memory_per_rank(place: Place) -> int | None:
    """Bytes one rank may use: its GPU's, or its share of the node's on a CPU."""
    if not place.is_cpu:
        return place.gpu.memory
    return None if place.memory is None else place.memory // place.ranks_per_node


def _threads(place: Place) -> int | None:
    """CPU threads for each rank, so that ranks on one node do not fight over its cores."""
    if place.cores is None or not place.is_cpu:
        return None
    return max(1, place.cores // place.ranks_per_node)


def _every(value: int | str) -> Every:
    return Every(seconds=seconds(value)) if isinstance(value, str) else Every(steps=value)
