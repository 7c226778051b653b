"""Which strategies are DeepSpeed's, and what it is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ZERO_STAGES: Mapping[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3}


LOSS_SCALE_POWER: Final = 16
"""fp16's loss scale begins at 2 to this power, under DeepSpeed as under PyTorch, whose choice it is."""


def zero_stage(strategy: str) -> int | None:
    """DeepSpeed's ZeRO stage for a strategy; None for one that is not DeepSpeed's."""
    return ZERO_STAGES.get(strategy)
