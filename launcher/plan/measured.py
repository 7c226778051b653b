"""How far predictions were from what was measured, on the GPUs where something was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Errors:
    """The largest error found, as a part of what was measured: of a rank's memory, and of tokens a second.

    Speed was measured under ddp alone.
    """

    memory: float
    speed: float


MEASURED: Final[Mapping[str, Errors]] = {"h200-sxm-141gb": Errors(memory=0.05, speed=0.10)}
"""By the GPU's name in the catalogue, rounded up. The rows, GPT-2s on one GPU, are in
`docs/benchmarks/memory.md` and `gpu.md`."""
