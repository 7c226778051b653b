"""How far predictions were from what was measured, for runs like those that were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from launcher.plan.choose import Plan
from launcher.plan.fast import SETTING
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


LAYERS: Final = range(12, 48 + 1)
WIDTHS: Final = range(768, 1600 + 1)
BLOCK: Final = 1024
"""Of the GPT-2s that were measured, and the tokens of a row."""


def errors_of_its_like(plan: Plan, shape: Shape | None) -> Errors:
    """The errors on `MEASURED` rows that `plan` is like.

    Memory was measured for GPT-2 124M to XL in blocks of 1,024 tokens on one GPU: in bf16 under every
    strategy, without offload, and in fp16 under ddp. Speed was, in steps enough to say so, where it is
    compiled, in bf16 under ddp, without gradient checkpointing, and does not wait for the host for most of a
    step.
    """
    if not _is_like_a_row(plan, shape):
        return NONE
    known = MEASURED.get(plan.gpu, NONE)
    fast = plan.compile and plan.strategy == "ddp" and plan.precision == "bf16"
    fast = fast and not plan.gradient_checkpointing and plan.fast.causal_attention
    if not fast or plan.forecast is None or _waits(plan.forecast) > WAITING:
        return Errors(known.memory, None)
    return known


def _is_like_a_row(plan: Plan, shape: Shape | None) -> bool:
    if shape is None or shape.model_type != "gpt2" or plan.block_size != BLOCK:
        return False
    if shape.layers not in LAYERS or shape.hidden not in WIDTHS:
        return False
    if plan.batch.world_size > 1 or plan.offload != "none":
        return False
    off = plan.fast.off
    if off.get("causal_attention", SETTING) != SETTING or off.get("fused_adamw", SETTING) != SETTING:
        return False
    return plan.precision == "bf16" or (plan.precision, plan.strategy) == ("fp16", "ddp")


def _waits(forecast: Forecast) -> float:
    return forecast.seconds["host"] / sum(forecast.seconds.values())
