"""What a strategy shards, and in what pieces DeepSpeed sends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

ZERO_STAGES: Mapping[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3}


LOSS_SCALE_POWER: Final = 16
"""fp16's loss scale begins at 2 to this power, under DeepSpeed as under PyTorch, whose choice it is."""


def zero_stage(strategy: str) -> int | None:
    """DeepSpeed's ZeRO stage for a strategy; None for one that is not DeepSpeed's."""
    return ZERO_STAGES.get(strategy)


@dataclass(frozen=True, slots=True)
class Buckets:
    """DeepSpeed's pieces, in elements: of a reduction, of an all-gather, of what ZeRO-3 fetches ahead, of an
    optimizer step, of what it keeps gathered, and the size up to which a parameter stays whole."""

    reduce: int
    all_gather: int
    prefetch: int
    sub_group: int
    live: int
    persistence: int


def buckets(hidden: int) -> Buckets:
    """The pieces for a model of width `hidden`."""
    square = hidden * hidden
    return Buckets(
        reduce=square,
        all_gather=square,
        prefetch=int(0.9 * square),
        sub_group=10**9,
        live=10**9,
        persistence=10 * hidden,
    )
