"""Which strategy and micro-batch, and whether to checkpoint: the fastest that fits, and why others lost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from launcher.plan.batch import Batch
from launcher.plan.collectives import Wires
from launcher.plan.fast import NOTHING_FAST, Fast, trained_shape
from launcher.plan.hardware import CATALOGUE, GPU
from launcher.plan.memory import Memory, estimate
from launcher.plan.shape import Shape
from launcher.plan.speed import Speed, own_pace, step_speed, utilisation
from launcher.plan.states import Sharding, states
from launcher.plan.traffic import stack_of
from launcher.sizes import size_in_words

FILL = 0.9
"""The share of a GPU's memory that is planned for; the rest is left to fragmentation and the unmeasured."""

RUNNERS_UP = 3
"""How many a plan names."""

TIE = 0.05
"""Strategies predicted this close are equally fast: about twice the speed model's median error."""

LEAVE_DDP = 0.25
"""What another strategy must be predicted to gain before ddp, where it fits, is left. DeepSpeed holds the
model in half precision throughout, where DDP keeps norms and the residual stream in fp32: how a run trains
should not hang on its machine for a gain that nobody has measured."""

SOME_LAYERS = 0.05
"""What checkpointing some of the layers must be predicted to gain over none and all of them: less is within
the speed model's error, and the fewest that fit leave the least memory to spare."""

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
"""What `auto` searches, the simpler first; fsdp only where asked (`docs/decisions/`)."""

SHORTEST_BLOCK = 128
"""Tokens; a shorter block is not worth proposing."""

LARGER_GPU = "use a GPU with more memory"


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that memory and speed depend on, but for the strategy, the batch's split and checkpointing.

    `shape` is None for an architecture without a closed form, `available` (bytes for each rank) and
    `network` (bytes/s for each GPU, between nodes) where they are not known.
    """

    shape: Shape | None
    gpu: GPU
    precision: str
    block_size: int
    compiled: bool | Literal["auto"]
    world_size: int
    ranks_per_node: int
    network: float | None
    available: int | None
    fast: Fast = NOTHING_FAST

    def compiles(self, strategy: str) -> bool:
        """Whether the model is compiled under `strategy`: `auto` is what was measured to pay, plain DDP."""
        return self.compiled is True or (self.compiled == "auto" and strategy == "ddp")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to do a job: the memory it is estimated to take, and how long a step is predicted to be.

    `gradient_checkpointing`: of all layers, of none, or of so many, the first ones.
    """

    sharding: Sharding
    gradient_checkpointing: bool | int
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
    gradient_checkpointing: bool | int
    why: str
    strategy: str
    offload: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """How fast a plan is predicted to be: `plan.measured` has what such predictions were held against.

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


def candidates(
    job: Job, batches: Sequence[Batch], checkpointing: bool | int | None, shardings: Sequence[Sharding]
) -> list[Candidate]:
    """Every way to do `job`, the preferred first: by `shardings`, by `checkpointing`, then by `batches`.

    `checkpointing` None: of no layer, of as many as it takes to fit, or of all.
    """
    if checkpointing is not None:
        return [_candidate(job, batch, checkpointing, by) for by in shardings for batch in batches]
    found: list[Candidate] = []
    for by in shardings:
        none, every = ([_candidate(job, batch, on, by) for batch in batches] for on in (False, True))
        some = (_just_enough(job, *ends) for ends in zip(none, every, strict=True))
        found += [*none, *(one for one in some if one is not None), *every]
    return found


def _just_enough(job: Job, none: Candidate, every: Candidate) -> Candidate | None:
    """The fewest checkpointed layers that fit, where none do not and all do; None if that is all of them.

    One moment's memory grows with their number where the others' shrinks, but not over what all of them or
    none have inside a layer: where so many fit, more do.
    """
    if job.shape is None or none.fits or not every.fits:
        return None
    layers = range(1, job.shape.layers)
    enough = bisect_left(layers, True, key=lambda count: _fits(job, none.batch, count, none.sharding))
    if enough == len(layers):
        return None
    return _candidate(job, none.batch, layers[enough], none.sharding)


def _candidate(job: Job, batch: Batch, checkpointing: bool | int, sharding: Sharding) -> Candidate:
    if job.shape is None:
        return Candidate(sharding, checkpointing, batch, None, None, fits=True)
    memory = _memory(job, job.shape, batch, checkpointing, sharding)
    shape = trained_shape(job.shape, job.fast.under(sharding.strategy))
    speed = _speed(job, shape, batch, checkpointing, sharding)
    return Candidate(sharding, checkpointing, batch, memory, speed, _has_room(job, memory))


def _fits(job: Job, batch: Batch, checkpointing: bool | int, sharding: Sharding) -> bool:
    return job.shape is None or _has_room(job, _memory(job, job.shape, batch, checkpointing, sharding))


def _has_room(job: Job, memory: Memory) -> bool:
    return job.available is None or memory.total <= FILL * job.available


def _memory(job: Job, model: Shape, batch: Batch, checkpointing: bool | int, sharding: Sharding) -> Memory:
    fast = job.fast.under(sharding.strategy)
    return estimate(
        trained_shape(model, fast),
        sharding,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        block_size=job.block_size,
        precision=job.precision,
        gradient_checkpointing=checkpointing,
        chunked_loss=fast.chunked_loss,
        compiled=job.compiles(sharding.strategy),
        on_cpu=job.gpu.is_cpu,
    )


def _speed(
    job: Job, shape: Shape, batch: Batch, checkpointing: bool | int, sharding: Sharding
) -> Speed | None:
    if job.gpu.link is None:
        if job.ranks_per_node > 1:
            return None
        # Nothing goes over a link within the node.
        unlinked = replace(job, gpu=replace(job.gpu, link=0.0))
        return _speed(unlinked, shape, batch, checkpointing, sharding)
    return step_speed(
        shape,
        job.gpu,
        batch,
        Wires(job.ranks_per_node, job.gpu.link, job.network),
        stack_of(
            shape,
            sharding.numbers(job.precision),
            compiled=job.compiles(sharding.strategy),
            by_layer=sharding.compiled_by_layer,
            chunked_loss=job.fast.under(sharding.strategy).chunked_loss,
        ),
        sharding,
        block_size=job.block_size,
        precision=job.precision,
        gradient_checkpointing=checkpointing,
        pace=own_pace(job.gpu),
    )


def fastest(found: Sequence[Candidate]) -> Candidate | None:
    """The fastest that fits, of strategies that are as good as equally fast the simplest; None if none fits.

    `found` has the simpler strategies first, and the preferred of equals.
    """
    best = _best_of_each([one for one in found if one.fits])
    least = min((one.seconds for one in best), default=0.0)

    def is_near(one: Candidate) -> bool:
        margin = LEAVE_DDP if one.sharding.strategy == "ddp" else TIE
        return one.seconds <= (1 + margin) * least

    return next((one for one in best if is_near(one)), None)


def _best_of_each(found: Iterable[Candidate]) -> list[Candidate]:
    """The best candidate of each strategy, in the order of `found`."""
    of_each: dict[Sharding, list[Candidate]] = {}
    for one in found:
        of_each.setdefault(one.sharding, []).append(one)
    return [_best(rivals) for rivals in of_each.values()]


def _best(found: Sequence[Candidate]) -> Candidate:
    """The fastest, the first of equals; one that checkpoints some layers only where it gains SOME_LAYERS."""
    best = min(found, key=lambda one: one.seconds)
    simple = [one for one in found if isinstance(one.gradient_checkpointing, bool)]
    simplest = min(simple, key=lambda one: one.seconds, default=best)
    return simplest if simplest.seconds <= (1 + SOME_LAYERS) * best.seconds else best


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
    """Of the faster ones that do not fit the one that nearly does, then the best of each other strategy, and
    then the next that fit. What was chosen without fitting lost to nothing that would not fit either."""
    faster = [one for one in found if chosen.fits and not one.fits and one.seconds < chosen.seconds]
    fitting = [one for one in found if one.fits and one is not chosen]
    nearest = sorted(faster, key=lambda one: one.memory.total if one.memory else 0)[:1]
    rivals = _best_of_each(one for one in fitting if one.sharding != chosen.sharding)
    slowest_last = [sorted(some, key=lambda one: one.seconds) for some in (rivals, fitting)]
    for one in list(dict.fromkeys([*nearest, *slowest_last[0], *slowest_last[1]]))[:RUNNERS_UP]:
        yield RunnerUp(
            one.batch.micro_batch,
            one.gradient_checkpointing,
            _why(job, chosen, one),
            one.sharding.strategy,
            one.sharding.offload,
        )


def _why(job: Job, chosen: Candidate, one: Candidate) -> str:
    change = one.seconds / chosen.seconds - 1
    if not one.fits:
        assert one.memory is not None
        needs, room = (size_in_words(size) for size in (one.memory.total, FILL * (job.available or 0)))
        return f"{-change:.1%} faster, but needs {needs} and {room} is to be used"
    if change < 0:
        return f"only {-change:.1%} faster, and less simple"
    return f"{change:.1%} slower"


def remedies(job: Job, found: Sequence[Candidate]) -> Iterator[str]:
    """What would make a job fit that does not, each alone, the cheapest change first.

    Where the user rules checkpointing all layers out and nothing else is enough, each comes with it.
    """
    least = min(found, key=lambda one: one.memory.total if one.memory else 0)
    if any(one.gradient_checkpointing is True for one in found):
        changes = _changes(job, least, checkpointing=True)
    else:
        changes = _changes(job, least, checkpointing=least.gradient_checkpointing)
        checkpointing = "set train.gradient_checkpointing: auto"
        if _fits(job, least.batch, True, least.sharding):
            changes = [checkpointing, *changes]
        elif not changes:
            changes = [f"{checkpointing} and {change}" for change in _changes(job, least, checkpointing=True)]
    yield from changes
    if not any(LARGER_GPU in change for change in changes):
        yield "use a smaller model"


def _changes(job: Job, least: Candidate, *, checkpointing: bool | int) -> list[str]:
    """Each change to the `least` of all candidates that makes it fit, with so much checkpointing."""

    def fits(asked: Job, sharding: Sharding = least.sharding) -> bool:
        return _fits(asked, least.batch, checkpointing, sharding)

    changes: list[str] = []
    if not job.gpu.is_cpu:
        changes += _more_sharing(job, least.sharding, fits)
    elif job.available and job.ranks_per_node > 1:
        alone = replace(job, world_size=1, available=job.available * job.ranks_per_node)
        if fits(alone, replace(least.sharding, world_size=1)):
            changes.append("start one rank (gpus_per_node: 1), as ranks on a CPU share its memory")
    block = job.block_size // 2
    while block >= SHORTEST_BLOCK and not fits(replace(job, block_size=block)):
        block //= 2
    if block >= SHORTEST_BLOCK:
        changes.append(f"set data.block_size to {block}")
    larger = (gpu for gpu in sorted(CATALOGUE.values(), key=lambda gpu: gpu.memory or 0) if gpu.memory)
    enough = next((gpu for gpu in larger if all(map(fits, _on(gpu, job)))), None)
    if enough is not None:
        changes.append(f"{LARGER_GPU}, such as {enough.name}")
    return changes


def _on(gpu: GPU, job: Job) -> Iterator[Job]:
    """The job on another GPU, in its own precision and in the one that `train.precision: auto` takes there.

    A GPU without bf16 is not asked to compute in it: it has nothing to fit in.
    """
    able = job.precision != "bf16" or gpu.supports_bf16
    for precision in dict.fromkeys([job.precision, "bf16" if gpu.supports_bf16 else "fp16"]):
        yield replace(job, gpu=gpu, precision=precision, available=gpu.memory if able else 0)


def _more_sharing(job: Job, used: Sharding, fits: Callable[[Job, Sharding], bool]) -> Iterator[str]:
    """The first strategy that shares enough, and the least offload that moves enough to the host."""
    world = job.world_size
    if used.offload == "none" and world > 1:
        for strategy in (
            STRATEGIES[STRATEGIES.index(used.strategy) + 1 :] if used.strategy in STRATEGIES else ()
        ):
            if fits(job, Sharding(strategy, world)):
                yield f"set train.strategy: {strategy}"
                return
    for strategy, offload in (("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "parameters")):
        sharding = Sharding(strategy, world, offload)
        if sharding != used and fits(job, sharding):
            host = states_on_host(job, sharding)
            yield (
                f"set train.strategy: {strategy} and train.offload: {offload} "
                f"(slow, and {size_in_words(host)} of a node's own memory)"
            )
            return


def states_on_host(job: Job, sharding: Sharding) -> int:
    """Bytes of one node's memory that offload takes, for all its ranks.

    0 on a CPU, where they are in the estimate of each rank already.
    """
    if job.shape is None or job.gpu.is_cpu:
        return 0
    shape = trained_shape(job.shape, job.fast)
    return job.ranks_per_node * states(shape, sharding, job.precision).host
