"""Batch arithmetic: `batch_size = micro_batch x accumulation x world_size`, exactly, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from launcher.errors import RequestError


@dataclass(frozen=True, slots=True)
class Batch:
    """How one optimizer step's sequences are spread; all four count sequences, passes or ranks."""

    batch_size: int
    micro_batch: int
    accumulation: int
    world_size: int

    def __post_init__(self) -> None:
        if self.micro_batch * self.accumulation * self.world_size != self.batch_size:
            raise ValueError(f"{self} does not multiply out")


@dataclass(frozen=True, slots=True)
class Done:
    """How far a run has come that goes on: steps, and the samples in them, whatever their sizes were.

    `warmup_steps` is the warmup that its learning rate began with, `strategy` the one that its checkpoint is
    of, `padded_vocabulary` whether that holds a padded table; None where nothing is done yet.
    """

    steps: int = 0
    samples: int = 0
    warmup_steps: int | None = None
    strategy: str | None = None
    padded_vocabulary: bool | None = None


NOTHING_DONE = Done()


def splits(batch_size: int, world_size: int, micro_batch: int | None, largest: int) -> list[Batch]:
    """Every way to spread `batch_size` sequences over `world_size` ranks, the largest micro-batch first.

    `micro_batch` is the user's, and then the only one; None for every divisor of a rank's share that is at
    most `largest`. Raises what `check_divides` does.
    """
    check_divides(batch_size, world_size, micro_batch)
    share = batch_size // world_size
    sizes = [micro_batch] if micro_batch else [size for size in divisors(share) if size <= max(1, largest)]
    return [Batch(batch_size, size, share // size, world_size) for size in reversed(sizes)]


def check_divides(batch_size: int, world_size: int, micro_batch: int | None) -> None:
    """Raise RequestError, naming the nearest sizes that work, where each rank's share is no whole number of
    sequences, or of the user's `micro_batch`."""
    if batch_size % (world_size * (micro_batch or 1)):
        raise _refusal(batch_size, world_size, micro_batch)


def _refusal(batch_size: int, world_size: int, micro_batch: int | None) -> RequestError:
    micro = micro_batch or 1
    ways = _nearest_batches(batch_size, world_size * micro)
    if batch_size % micro == 0:
        ways += f"; or {_nearest_worlds(batch_size // micro, world_size)}"
    share, left = divmod(batch_size, world_size)
    if not left:
        smaller = max(size for size in divisors(share) if size <= micro)
        whole = f"train.batch_size={batch_size}"
        of_a_rank = f"{share}, the share of {whole} that each of {world_size} ranks has"
        return RequestError(
            f"train.micro_batch={micro} does not divide {whole if world_size == 1 else of_a_rank}",
            hint=f"set train.micro_batch to {smaller}; or {ways}",
            key="train.micro_batch",
        )
    with_micro = f" with train.micro_batch={micro}" if micro_batch else ""
    return RequestError(
        f"train.batch_size={batch_size} does not divide over {world_size} ranks{with_micro}",
        hint=ways,
        key="train.batch_size",
    )


def _nearest_batches(batch_size: int, unit: int) -> str:
    below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
    sizes = " or ".join(str(size) for size in (below, above) if size)
    return f"set train.batch_size to {sizes}"


def _nearest_worlds(micro_batches: int, world_size: int) -> str:
    worlds = list(divisors(micro_batches))
    below = [str(world) for world in worlds if world < world_size][-1:]
    above = [str(world) for world in worlds if world > world_size][:1]
    return f"use {' or '.join(below + above)} rank{'' if below + above == ['1'] else 's'}"


def divisors(number: int) -> Iterator[int]:
    """The divisors of `number`, in ascending order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    yield from small
    yield from (number // divisor for divisor in reversed(small) if divisor * divisor != number)


def count_steps(
    *,
    batch_size: int,
    block_size: int,
    steps: int | None,
    tokens: int | None,
    epochs: float | None,
    blocks: int | None,
    done: Done = NOTHING_DONE,
) -> int | None:
    """Optimizer steps in a run, rounded up so that at least what was asked for is trained on.

    Exactly one of `steps`, `tokens` and `epochs` is given. `blocks` is the number of training blocks
    in one epoch; None where the text is not prepared yet, and then epochs give None. What a run has
    `done` counts towards tokens and epochs with the batch sizes it was done in.
    """
    if steps is not None:
        return steps
    if tokens is not None:
        left = tokens - done.samples * block_size
        return done.steps + max(0, -(-left // (batch_size * block_size)))
    if epochs is None:
        raise ValueError("one of steps, tokens and epochs must be given")
    if blocks is None:
        return None
    # As it is written in decimals: 1.1 x 100 is 110, in floats a hair more, and that hair a step.
    samples = Fraction(str(epochs)) * blocks - done.samples
    return max(1, done.steps + max(0, math.ceil(samples / batch_size)))


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of linear warmup: `warmup` below 1 is a fraction of `steps`, from 1 on a number of steps.

    Raises RequestError where there are not as many.
    """
    if warmup < 1:
        return round(warmup * steps)
    if warmup > steps:
        raise RequestError(
            f"train.warmup: {int(warmup)} steps of warmup do not fit in {steps} steps of training",
            hint=f"write at most {steps}, or a fraction below 1 such as 0.02",
            key="train.warmup",
        )
    return int(warmup)
