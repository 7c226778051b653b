"""The plan: what a run becomes on given hardware. Pure; the same inputs give the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.config.schema import RunConfig, seconds
from launcher.errors import MachineError, RequestError
from launcher.plan.batch import NOTHING_DONE, Batch, Done, count_steps, splits, warmup_steps
from launcher.plan.hardware import GPU
from launcher.plan.memory import Memory, estimate
from launcher.plan.shape import Shape, parameters

CPU_TOKENS = 8192
"""Tokens in a forward pass on a CPU beyond which a larger micro-batch only costs memory."""

GPU_TOKENS = 65536
"""The same on a GPU: kernels are full well below it."""

FILL = 0.9
"""The share of a GPU's memory that is planned for; the rest is left to fragmentation and the unmeasured."""


@dataclass(frozen=True, slots=True)
class Place:
    """The hardware a run is planned for, with nothing left to find out.

    `cores` and `memory` (bytes) are one node's, known only where this machine is the node.
    """

    cluster: str
    nodes: int
    ranks_per_node: int
    gpu: GPU
    cores: int | None = None
    memory: int | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def is_cpu(self) -> bool:
        return self.gpu.name == "cpu"


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
    category) are None for a model whose architecture the memory model does not know.
    """

    name: str
    cluster: str
    gpu: str
    device: str
    nodes: int
    ranks_per_node: int
    threads_per_rank: int | None
    strategy: str
    precision: str
    gradient_checkpointing: bool
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """The plan that `as_dict` wrote. Raises TypeError or KeyError on anything else."""
        blocks = fields["blocks"]
        return cls(
            **{
                **fields,
                "batch": Batch(**fields["batch"]),
                "eval_every": Every(**fields["eval_every"]),
                "checkpoint_every": Every(**fields["checkpoint_every"]),
                "blocks": None if blocks is None else Blocks(**blocks),
            }
        )


def make_plan(
    run: RunConfig,
    place: Place,
    *,
    shape: Shape | None,
    positions: int | None,
    blocks: Blocks | None,
    done: Done = NOTHING_DONE,
) -> Plan:
    """Work out everything `run` leaves open, for `place`.

    `shape` is the model's, with the tokenizer's vocabulary, or None for an architecture not known in
    advance; `positions` the longest sequence it can take; `blocks` what the prepared text holds, or
    None before it is prepared; `done` how far a run has come that goes on.

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
    precision = _precision(run, place)
    checkpointing, batch, memory = _fit(run, place, shape, precision)
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
        strategy="ddp",
        precision=precision,
        gradient_checkpointing=checkpointing,
        compile=train.compile is True,
        batch=batch,
        block_size=data.block_size,
        steps=steps,
        samples=None if steps is None else done.samples + (steps - done.steps) * train.batch_size,
        warmup_steps=_warmup(train.warmup, steps, done),
        eval_every=_every(train.eval_every) if evaluates else Every(),
        checkpoint_every=_every(run.checkpoint.every),
        blocks=blocks,
        parameters=None if shape is None else parameters(shape),
        memory=None if memory is None else dict(memory.items()),
        memory_available=_memory_per_rank(place),
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


def _fit(
    run: RunConfig, place: Place, shape: Shape | None, precision: str
) -> tuple[bool, Batch, Memory | None]:
    """Gradient checkpointing, the batch's split, and the memory they are estimated to take.

    What the user fixed is taken as given, and not refused for memory: the estimate may be wrong.
    """
    train, block_size = run.train, run.data.block_size
    fixed = None if train.micro_batch == "auto" else train.micro_batch
    largest = max(1, (CPU_TOKENS if place.is_cpu else GPU_TOKENS) // block_size)
    available = _memory_per_rank(place)
    asked = train.gradient_checkpointing
    tried: list[tuple[bool, Batch, Memory | None]] = []
    for checkpointing in (False, True) if asked == "auto" else (asked,):
        for batch in splits(train.batch_size, place.world_size, fixed, largest):
            memory = None
            if shape is not None:
                memory = estimate(
                    shape,
                    micro_batch=batch.micro_batch,
                    block_size=block_size,
                    precision=precision,
                    gradient_checkpointing=checkpointing,
                    world_size=place.world_size,
                    on_cpu=place.is_cpu,
                )
            tried.append((checkpointing, batch, memory))
            if memory is None or available is None or memory.total <= FILL * available:
                return tried[-1]
    if fixed is not None:
        return tried[-1]
    least = min(memory.total for _, _, memory in tried if memory is not None)
    raise RequestError(
        f"{run.model.name} does not fit on {place.gpu.name}: about {least / 2**30:.1f} GiB at micro-batch 1, "
        f"and there are {(available or 0) / 2**30:.1f} GiB",
        hint="use a GPU with more memory, a smaller data.block_size or a smaller model; "
        "or set train.micro_batch=1 to try all the same",
    )


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
