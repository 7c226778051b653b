"""Which strategy and micro-batch, and whether to checkpoint: the fastest that fits, and why others lost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from launcher.plan.batch import Batch
from launcher.plan.collectives import Wires
from launcher.plan.fast import NOTHING_FAST, Fast, trained_shape
from launcher.plan.hardware import GPU
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

    `shape` is None for an architecture without a closed form, `available` (bytes for each rank), `network`
    (bytes/s for each GPU, between nodes) and `node_memory` (bytes, one node's own) where they are not known.
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
    node_memory: int | None = None

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
    if job.shape is None:
        return True
    memory = _memory(job, job.shape, batch, checkpointing, sharding)
    return _has_room(job, memory) and host_has_room(job, sharding)


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


def remedies(job: Job, found: Sequence[Candidate], elsewhere: Sequence[Job], *, begun: bool) -> Iterator[str]:
    """What would make a job fit that does not, each alone, the cheapest change first.

    `elsewhere` is the job on other GPUs, the smallest first. `begun`: it has checkpoints, so its strategy,
    its blocks and its model stay. Where the user rules checkpointing all layers out and nothing else is
    enough, each comes with it.
    """
    ways = [(one.batch, one.gradient_checkpointing, one.sharding) for one in found]
    changes = _changes(job, ways, elsewhere, begun=begun)
    if not any(checkpointing is True for _, checkpointing, _ in ways):
        checkpointed = [(batch, True, sharding) for batch, _, sharding in ways]
        checkpointing = "set train.gradient_checkpointing: auto"
        if _one_fits(job, checkpointed):
            changes = [checkpointing, *changes]
        elif not changes:
            with_it = _changes(job, checkpointed, elsewhere, begun=begun)
            changes = [f"{checkpointing} and {change}" for change in with_it]
    yield from changes
    if not begun and not any(LARGER_GPU in change for change in changes):
        yield "use a smaller model"


Way: TypeAlias = tuple[Batch, bool | int, Sharding]
"""The batch's split, the checkpointing and the sharding of a candidate."""


def _one_fits(job: Job, ways: Iterable[Way]) -> bool:
    return any(_fits(job, *way) for way in ways)


def _changes(job: Job, ways: Sequence[Way], elsewhere: Iterable[Job], *, begun: bool) -> list[str]:
    """Each change to a job with which one of the `ways` to do it fits, as none does now."""
    changes: list[str] = []
    if job.gpu.is_cpu:
        changes += _one_rank(job, ways)
    elif not begun:
        changes += _more_sharing(job, ways)
    if not begun:
        changes += _shorter_block(job, ways)
    enough = next((other.gpu for other in elsewhere if _one_fits(other, ways)), None)
    if enough is not None:
        changes.append(f"{LARGER_GPU}, such as {enough.name}")
    return changes


def _one_rank(job: Job, ways: Sequence[Way]) -> Iterator[str]:
    """The ranks of a node made one, which then has all its memory."""
    ranks, nodes = job.ranks_per_node, job.world_size // job.ranks_per_node
    if not job.available or ranks == 1:
        return
    alone = replace(job, world_size=nodes, ranks_per_node=1, available=job.available * ranks)
    of_one: list[Way] = []
    for batch, checkpointing, sharding in ways:
        longer = replace(batch, accumulation=batch.accumulation * ranks, world_size=nodes)
        of_one.append((longer, checkpointing, replace(sharding, world_size=nodes)))
    if _one_fits(alone, of_one):
        where = " a node" if nodes > 1 else ""
        yield f"start one rank{where} (gpus_per_node: 1), as ranks on a CPU share its memory"


def _shorter_block(job: Job, ways: Sequence[Way]) -> Iterator[str]:
    block = job.block_size // 2
    while block >= SHORTEST_BLOCK and not _one_fits(replace(job, block_size=block), ways):
        block //= 2
    if block >= SHORTEST_BLOCK:
        yield f"set data.block_size to {block}"


def _more_sharing(job: Job, ways: Sequence[Way]) -> Iterator[str]:
    """The first strategy that shares enough, and the least offload that moves enough to the host."""
    world, used = job.world_size, ways[-1][2]

    def fits(sharding: Sharding) -> bool:
        tried = dict.fromkeys((batch, checkpointing, sharding) for batch, checkpointing, _ in ways)
        return _one_fits(job, tried)

    if used.offload == "none" and world > 1:
        for strategy in (
            STRATEGIES[STRATEGIES.index(used.strategy) + 1 :] if used.strategy in STRATEGIES else ()
        ):
            if fits(Sharding(strategy, world)):
                yield f"set train.strategy: {strategy}"
                return
    for strategy, offload in (("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "parameters")):
        sharding = Sharding(strategy, world, offload)
        if sharding != used and fits(sharding):
            host = states_on_host(job, sharding)
            yield (
                f"set train.strategy: {strategy} and train.offload: {offload} "
                f"(slow, and {size_in_words(host)} of a node's own memory)"
            )
            return


def host_has_room(job: Job, sharding: Sharding) -> bool:
    """Whether a node has the memory that offload takes, as far as it is known."""
    return job.node_memory is None or states_on_host(job, sharding) <= job.node_memory


def states_on_host(job: Job, sharding: Sharding) -> int:
    """Bytes of one node's memory that offload takes, for all its ranks.

    0 on a CPU, where they are in the estimate of each rank already.
    """
    if job.shape is None or job.gpu.is_cpu:
        return 0
    shape = trained_shape(job.shape, job.fast)
    return job.ranks_per_node * states(shape, sharding, job.precision).host
