"""The plan as rows that a person reads: what was asked, what it becomes, what it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from launcher.config.schema import RunConfig
from launcher.plan.choose import Every, Plan
from launcher.plan.fast import Fast
from launcher.plan.search import FILL
from launcher.sizes import size_in_words

Rows = list[tuple[str, str]]

FAST: Mapping[str, str] = {
    "tanh_gelu": "tanh GELU",
    "causal_attention": "causal attention",
    "chunked_loss": "chunked loss",
    "padded_vocabulary": "padded vocabulary",
    "fused_adamw": "fused AdamW",
    "tf32": "TF32",
}
"""The keys of `train.fast` in words."""


def asked_rows(run: RunConfig) -> Rows:
    """What the user asked for."""
    train, data = run.train, run.data
    length = next(
        f"{value:,} {name}"
        for name, value in (("tokens", train.tokens), ("steps", train.steps), ("epochs", train.epochs))
        if value is not None
    )
    return [
        ("model", f"{run.model.name}, {run.model.init}"),
        ("batch", f"{train.batch_size:,} sequences of {data.block_size:,} tokens ({data.packing})"),
        ("length", length),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}"),
    ]


def becomes_rows(plan: Plan, packing: str) -> Rows:
    """What the plan makes of it, with `data.packing` as asked."""
    batch = plan.batch
    where = (
        f"{plan.nodes} x {plan.ranks_per_node} x {plan.gpu}"
        if plan.nodes > 1
        else f"{plan.ranks_per_node} x {plan.gpu}"
    )
    rows = [
        ("on", f"{plan.cluster}: {where}"),
        ("strategy", ", ".join(_strategy(plan))),
        (
            "batch",
            f"{batch.batch_size} = micro-batch {batch.micro_batch} x accumulation {batch.accumulation}"
            f" x {batch.world_size} rank{'s' if batch.world_size > 1 else ''}",
        ),
        ("gradient checkpointing", _checkpointing(plan.gradient_checkpointing)),
        ("fast paths", _fast(plan.fast)),
    ]
    if plan.host_memory:
        rows.append(("host memory", f"{size_in_words(plan.host_memory)} of each node, for what is offloaded"))
    if plan.parameters is not None:
        rows.append(("parameters", f"{plan.parameters:,}"))
    else:
        rows.append(("memory", "not estimated for this architecture: train.micro_batch is a guess"))
    if plan.steps is None:
        rows.append(("steps", "known once `launcher train` has prepared the text"))
    else:
        rows.append(("steps", f"{plan.steps:,}, the first {plan.warmup_steps:,} warming up"))
        tokens = f"{plan.tokens:,}" if packing == "concat" else f"at most {plan.tokens:,}, padding included"
        rows.append(("tokens", tokens + ("" if plan.epochs is None else f" ({plan.epochs:.2f} epochs)")))
    rows.append(("evaluate", _every(plan.eval_every)))
    rows.append(("checkpoint", _every(plan.checkpoint_every)))
    return rows


def fit_rows(plan: Plan) -> Rows:
    """What is to be said of a plan that is not estimated to fit; nothing of one that is.

    Only a micro-batch that the user fixed is planned without fitting: the estimate may be wrong.
    """
    if plan.memory is None or plan.memory_available is None:
        return []
    total, room = sum(plan.memory.values()), FILL * plan.memory_available
    if total <= room:
        return []
    over = f"it takes {size_in_words(total - room)} more than the {FILL:.0%} that is planned for"
    return [("does not fit", f"{over}; train.micro_batch: auto finds what does, or says what would")]


def speed_rows(plan: Plan) -> Rows:
    """What is predicted of its speed, or why nothing is."""
    found = plan.forecast
    if found is None:
        reason = (
            "on a CPU"
            if plan.device == "cpu"
            else "for this architecture, or without network_gbps or a figure of the GPU"
        )
        return [("speed", f"not predicted {reason}")]
    step = sum(found.seconds.values())
    parts = ", ".join(
        f"{part} {seconds / step:.0%}" for part, seconds in found.seconds.items() if seconds >= step / 200
    )
    ranks = plan.batch.world_size
    mfu = "" if found.mfu is None else f", MFU {found.mfu:.0%}"
    rows = [
        ("tokens/s", f"{found.tokens_per_second:,.0f} ({found.tokens_per_second / ranks:,.0f} a GPU{mfu})"),
        ("step", f"{step:.3g} s: {parts}"),
    ]
    if found.hours is not None:
        rows.append(("time", f"{found.hours:,.4g} hours, without evaluation and checkpoints"))
    if found.price is not None:
        rows.append(("price", f"{found.price:,.2f}"))
    for other in found.runners_up:
        how = f"micro-batch {other.micro_batch}"
        if other.gradient_checkpointing:
            some = other.gradient_checkpointing is not True
            how += ", gradient checkpointing"
            how += f" {_checkpointing(other.gradient_checkpointing)}" if some else ""
        rows.append((f"or {other.strategy}", f"{how}: {other.why}"))
    return rows


def _checkpointing(of: bool | int) -> str:
    if isinstance(of, bool):
        return "on" if of else "off"
    return "in the first layer" if of == 1 else f"in the first {of} layers"


def _strategy(plan: Plan) -> Iterator[str]:
    yield plan.strategy
    if plan.offload == "optimizer":
        yield "optimizer offloaded to the host"
    elif plan.offload == "parameters":
        yield "optimizer and parameters offloaded to the host"
    yield plan.precision
    if plan.compile:
        yield "compiled"


def _fast(fast: Fast) -> str:
    """Those taken, and after `not` those that are not, each with the reason."""
    taken = ", ".join(FAST[name] for name in fast.taken)
    left = ", ".join(f"{FAST[name]} ({why})" for name, why in fast.off.items())
    return "; ".join(part for part in (taken, f"not {left}" if left else "") if part)


def _every(every: Every) -> str:
    if every.steps is not None:
        return f"every {every.steps:,} step{'s' if every.steps > 1 else ''}"
    return "never" if every.seconds is None else f"every {every.seconds / 60:g} min"
