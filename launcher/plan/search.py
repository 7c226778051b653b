"""Which micro-batch, and whether to checkpoint: the fastest that fits, and why the others lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.plan.batch import Batch
from launcher.plan.hardware import CATALOGUE, GPU
from launcher.plan.memory import Memory, estimate
from launcher.plan.shape import Shape
from launcher.plan.speed import Speed, Wires, step_speed, utilisation
from launcher.plan.states import Sharding
from launcher.plan.traffic import stack_of

FILL = 0.9
"""The share of a GPU's memory that is planned for; the rest is left to fragmentation and the unmeasured."""

RUNNERS_UP = 3
"""How many a plan names."""

SHORTEST_BLOCK = 128
"""Tokens; a shorter block is not worth proposing."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that memory and speed depend on, but for the batch's split and checkpointing.

    `shape` is None for an architecture without a closed form, `available` (bytes for each rank) and
    `network` (bytes/s for each GPU, between nodes) where they are not known.
    """

    shape: Shape | None
    gpu: GPU
    precision: str
    block_size: int
    compiled: bool
    world_size: int
    ranks_per_node: int
    network: float | None
    available: int | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to do a job: the memory it is estimated to take, and how long a step is predicted to be."""

    gradient_checkpointing: bool
    batch: Batch
    memory: Memory | None
    speed: Speed | None
    fits: bool

    @property
    def seconds(self) -> float:
        """Of one optimizer step; 0 where speeds are not predicted, so that no one is the faster."""
        return 0.0 if self.speed is None else self.speed.total


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """Another way to do the job, and why it lost."""

    micro_batch: int
    gradient_checkpointing: bool
    why: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """How fast a plan is predicted to be. Nothing was measured on its GPU.

    `seconds` are one optimizer step's, by what they are spent on; `tokens_per_second` the whole world's;
    `mfu` is the PaLM count over the datasheet's peak. `hours` is None while the length of the run is not
    known, `price` without that or the price of an hour. Four digits: more would promise too much.
    """

    seconds: dict[str, float]
    tokens_per_second: float
    mfu: float | None
    hours: float | None
    price: float | None
    runners_up: list[RunnerUp]


def candidates(job: Job, batches: Sequence[Batch], checkpointing: Sequence[bool]) -> list[Candidate]:
    """Every way to do `job`, in the order preferred between equals: by `checkpointing`, then by `batches`."""
    return [_candidate(job, batch, on) for on in checkpointing for batch in batches]


def _candidate(job: Job, batch: Batch, checkpointing: bool) -> Candidate:
    if job.shape is None:
        return Candidate(checkpointing, batch, None, None, fits=True)
    memory = estimate(
        job.shape,
        Sharding("ddp", job.world_size),
        micro_batch=batch.micro_batch,
        block_size=job.block_size,
        precision=job.precision,
        gradient_checkpointing=checkpointing,
        on_cpu=job.gpu.name == "cpu",
    )
    fits = job.available is None or memory.total <= FILL * job.available
    return Candidate(checkpointing, batch, memory, _speed(job, job.shape, batch, checkpointing), fits)


def _speed(job: Job, shape: Shape, batch: Batch, checkpointing: bool) -> Speed | None:
    if job.gpu.link is None:
        return None
    return step_speed(
        shape,
        job.gpu,
        batch,
        Wires(job.ranks_per_node, job.gpu.link, job.network),
        stack_of(shape, job.precision, compiled=job.compiled),
        block_size=job.block_size,
        precision=job.precision,
        gradient_checkpointing=checkpointing,
    )


def fastest(found: Sequence[Candidate]) -> Candidate | None:
    """The fastest that fits, the first of equals; None where none fits."""
    return min((one for one in found if one.fits), key=lambda one: one.seconds, default=None)


def forecast(
    job: Job,
    chosen: Candidate,
    found: Sequence[Candidate],
    *,
    steps: int | None,
    price_per_gpu_hour: float | None,
) -> Forecast | None:
    """What is predicted for `chosen` among `found`; None where its speed is not."""
    if job.shape is None or chosen.speed is None:
        return None
    rate = chosen.batch.batch_size * job.block_size / chosen.seconds
    mfu = utilisation(job.shape, job.gpu, job.block_size, job.precision, rate / job.world_size)
    hours = None if steps is None else steps * chosen.seconds / 3600
    price = (
        None if hours is None or price_per_gpu_hour is None else hours * job.world_size * price_per_gpu_hour
    )
    return Forecast(
        seconds={part: _four_digits(seconds) for part, seconds in chosen.speed.items()},
        tokens_per_second=_four_digits(rate),
        mfu=None if mfu is None else _four_digits(mfu),
        hours=None if hours is None else _four_digits(hours),
        price=None if price is None else _four_digits(price),
        runners_up=list(_runners_up(job, chosen, found)),
    )


def _four_digits(number: float) -> float:
    return float(f"{number:.4g}")


def _runners_up(job: Job, chosen: Candidate, found: Sequence[Candidate]) -> Iterator[RunnerUp]:
    """Of the faster ones that do not fit the one that nearly does, and then the next that fit."""
    faster = [one for one in found if not one.fits and one.seconds < chosen.seconds]
    fitting = [one for one in found if one.fits and one is not chosen]
    nearest = sorted(faster, key=lambda one: one.memory.total if one.memory else 0)[:1]
    for one in [*nearest, *sorted(fitting, key=lambda one: one.seconds)][:RUNNERS_UP]:
        change = abs(one.seconds / chosen.seconds - 1)
        if one.fits:
            why = f"{change:.1%} slower"
        else:
            assert one.memory is not None
            room = FILL * (job.available or 0)
            why = f"{change:.1%} faster, but needs {_gib(one.memory.total)} and {_gib(room)} is to be used"
        yield RunnerUp(one.batch.micro_batch, one.gradient_checkpointing, why)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def remedies(job: Job, found: Sequence[Candidate]) -> Iterator[str]:
    """What would make a job fit that does not, each alone, the cheapest change first."""
    smallest = min(found, key=lambda one: one.memory.total if one.memory else 0).batch
    if not any(one.gradient_checkpointing for one in found) and _candidate(job, smallest, True).fits:
        yield "set train.gradient_checkpointing: auto"
    block = job.block_size // 2
    while block >= SHORTEST_BLOCK and not _candidate(replace(job, block_size=block), smallest, True).fits:
        block //= 2
    if block >= SHORTEST_BLOCK:
        yield f"set data.block_size to {block}"
    for gpu in sorted(CATALOGUE.values(), key=lambda gpu: gpu.memory or 0):
        if gpu.memory and _candidate(replace(job, gpu=gpu, available=gpu.memory), smallest, True).fits:
            yield f"use a GPU with more memory, such as {gpu.name}"
            return
    yield "use a smaller model"
