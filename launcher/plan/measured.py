"""How far predictions were from what was measured, for runs like those that were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from launcher.plan.choose import Plan
from launcher.plan.search import Forecast
from launcher.plan.shape import Shape


@dataclass(frozen=True, slots=True)
class Errors:
    """The largest error found, as a part of what was measured: of a rank's memory, and of tokens a second.

    None where nothing was.
    """

    memory: float | None
    speed: float | None


MEASURED: Final[Mapping[str, Errors]] = {"h200-sxm-141gb": Errors(memory=0.05, speed=0.10)}
"""By the GPU's name in the catalogue, rounded up. The rows, GPT-2s on one GPU, are in
`docs/benchmarks/memory.md` and `gpu.md`."""

NONE: Final = Errors(memory=None, speed=None)

WAITING: Final = 0.4
"""The part of a step for which the row that waits longest for the host does so, by its prediction."""


def errors_of_its_like(plan: Plan, shape: Shape | None) -> Errors:
    """The errors on `MEASURED` rows that `plan` is like.

    Memory was measured for GPT-2 in half precision under every strategy, without offload, on one GPU. Speed
    was, in steps enough to say so, where it is compiled, in bf16 under ddp, without gradient checkpointing
    or a mask, and does not wait for the host for most of a step.
    """
    alone = plan.batch.world_size == 1 and plan.offload == "none"
    known = MEASURED.get(plan.gpu, NONE)
    if not alone or plan.precision == "fp32" or shape is None or shape.model_type != "gpt2":
        return NONE
    fast = plan.compile and plan.strategy == "ddp" and plan.precision == "bf16"
    fast = fast and not plan.gradient_checkpointing and plan.fast.causal_attention
    if not fast or plan.forecast is None or _waits(plan.forecast) > WAITING:
        return Errors(known.memory, None)
    return known


def _waits(forecast: Forecast) -> float:
    return forecast.seconds["host"] / sum(forecast.seconds.values())
