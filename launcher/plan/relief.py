"""What to change in a run that was out of memory: each alone, the most effective first, the batch kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.plan.batch import divisors
from launcher.plan.choose import Plan
from launcher.plan.fast import trained_shape
from launcher.plan.memory import estimate
from launcher.plan.search import STRATEGIES
from launcher.plan.shape import Shape
from launcher.plan.sharding import zero_stage
from launcher.plan.states import Sharding


@dataclass(frozen=True, slots=True)
class Relief:
    """Overrides, as they are written behind a run file, and the bytes of one rank that they are to spare."""

    overrides: str
    spared: int


def reliefs(plan: Plan, shape: Shape, *, begun: bool) -> list[Relief]:
    """Every change that is estimated to spare memory, the most effective first.

    `begun`: there are checkpoints, so the strategy stays what it is.
    """
    now = _total(plan, shape)
    changes = _changes(plan, shape, begun=begun)
    found = [Relief(overrides, now - total) for overrides, total in changes if total < now]
    return sorted(found, key=lambda each: -each.spared)


def _changes(plan: Plan, shape: Shape, *, begun: bool) -> Iterator[tuple[str, int]]:
    batch = plan.batch
    share = batch.batch_size // batch.world_size
    smaller = max((size for size in divisors(share) if size < batch.micro_batch), default=None)
    if smaller is not None:
        yield f"train.micro_batch={smaller}", _total(plan, shape, micro_batch=smaller)
    if plan.gradient_checkpointing is not True:
        yield "train.gradient_checkpointing=true", _total(plan, shape, gradient_checkpointing=True)
    if begun:
        return
    if plan.strategy in STRATEGIES and batch.world_size > 1 and plan.offload == "none":
        for strategy in STRATEGIES[STRATEGIES.index(plan.strategy) + 1 :]:
            yield f"train.strategy={strategy}", _total(plan, shape, strategy=strategy)
    if plan.device == "cpu":
        return  # there is no other memory to offload to
    if plan.offload == "none":
        strategy = plan.strategy if zero_stage(plan.strategy) else "zero2"
        overrides = f"train.strategy={strategy} train.offload=optimizer"
        yield overrides, _total(plan, shape, strategy=strategy, offload="optimizer")
    if plan.offload != "parameters":
        overrides = "train.strategy=zero3 train.offload=parameters"
        yield overrides, _total(plan, shape, strategy="zero3", offload="parameters")


def _total(
    plan: Plan,
    shape: Shape,
    *,
    micro_batch: int | None = None,
    gradient_checkpointing: bool | None = None,
    strategy: str | None = None,
    offload: str | None = None,
) -> int:
    """Bytes of one rank of the plan, with these changed."""
    fast = plan.fast.under(strategy or plan.strategy)
    micro = micro_batch or plan.batch.micro_batch
    return estimate(
        trained_shape(shape, fast),
        Sharding(strategy or plan.strategy, plan.batch.world_size, offload or plan.offload),
        micro_batch=micro,
        accumulation=plan.batch.batch_size // (micro * plan.batch.world_size),
        block_size=plan.block_size,
        precision=plan.precision,
        gradient_checkpointing=plan.gradient_checkpointing
        if gradient_checkpointing is None
        else gradient_checkpointing,
        chunked_loss=fast.chunked_loss,
        compiled=plan.compile and (strategy or plan.strategy) == plan.strategy,
        on_cpu=plan.device == "cpu",
    ).total
