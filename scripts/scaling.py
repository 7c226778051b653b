"""Write docs/concepts/scaling.md: what plans become from 1 to 4,096 GPUs, by the speed model.

.venv/bin/python -m scripts.scaling
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.config.presets import PRESETS
from launcher.config.schema import RunConfig
from launcher.errors import LauncherError
from launcher.plan.choose import Place, Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.shape import shape_of

PAGE = Path(__file__).resolve().parent.parent / "docs/concepts/scaling.md"
GPUS_PER_NODE = 8
NETWORK_GBPS = 400
WORLDS = (1, 8, 16, 64, 256, 1024, 4096)
SEQUENCES = 16
"""A GPU and step, where the batch grows with the world."""
BATCH = 4096
"""Where it does not: 4 million tokens."""


def planned(model: str, world: int, batch: int, strategy: str = "auto", gbps: float = NETWORK_GBPS) -> Plan:
    """The plan for `world` H100s, in nodes of eight from eight on. Raises LauncherError if there is none."""
    run = RunConfig.model_validate(
        {
            "name": "scaling",
            "model": {"name": model},
            "data": {"train": ["text"]},
            "train": {"batch_size": batch, "steps": 1, "strategy": strategy},
        }
    )
    nodes, each = (1, world) if world < GPUS_PER_NODE else (world // GPUS_PER_NODE, GPUS_PER_NODE)
    place = Place("scaling", nodes, each, find_gpu("h100-sxm-80gb"), network=gbps / 8 * 1e9)
    return make_plan(run, place, shape=shape_of(PRESETS[model].config()), positions=1024, blocks=None)


def row(model: str, world: int, batch: int, alone: float | None, **how: str | float) -> tuple[str, float]:
    """A line of a table, and tokens per second of each GPU."""
    plan = planned(model, world, batch, **how)  # type: ignore[arg-type]
    forecast = plan.forecast
    assert forecast is not None
    assert forecast.mfu is not None
    seconds = sum(forecast.seconds.values())
    each = forecast.tokens_per_second / world
    split = f"{plan.batch.micro_batch} x {plan.batch.accumulation}"
    shares = f"{forecast.seconds['communication'] / seconds:.1%}"
    kept = "" if alone is None else f"{each / alone:.0%}"
    return (
        f"| {world:,} | {plan.strategy} | {split} | {forecast.tokens_per_second:,.0f} | {each:,.0f} |"
        f" {forecast.mfu:.0%} | {shares} | {kept} |",
        each,
    )


HEAD = (
    "| GPUs | strategy | micro-batch x accumulation | tokens/s | a GPU | MFU | waiting for others |"
    " of one GPU |",
    "|---|---|---|---|---|---|---|---|",
)


def table(model: str, batch: int | None, **how: str | float) -> Iterator[str]:
    yield from HEAD
    alone: float | None = None
    for world in WORLDS:
        try:
            line, each = row(model, world, batch or SEQUENCES * world, alone, **how)
        except LauncherError as error:
            yield f"| {world:,} | {str(error).splitlines()[0]} | | | | | | |"
            continue
        alone = alone or each
        yield line


def page() -> Iterator[str]:
    yield from (
        "# Scaling, on paper",
        "",
        "What `launcher plan` works out for 1 to 4,096 H100s in nodes of eight, 400 Gbit/s a GPU between",
        "nodes, blocks of 1,024 tokens. `scripts/scaling.py` writes this page from the speed model, which is",
        "held against published runs on up to 128 GPUs ([speed](../benchmarks/speed.md)) and against one",
        "H200 ([gpu](../benchmarks/gpu.md)). **Nothing here was measured on several GPUs.** Stragglers, a",
        "crowded network and failures are left out; they cost more the more GPUs there are.",
        "",
        f"## The batch grows with the world: {SEQUENCES} sequences a GPU and step",
        "",
    )
    for model in ("gpt2", "gpt2-xl"):
        yield from (f"### {model}", "", *table(model, None), "")
    yield from (
        f"## The batch stays: {BATCH:,} sequences",
        "",
        "Each GPU has less to compute in a step, and as much to send.",
        "",
        "### gpt2-xl",
        "",
        *table("gpt2-xl", BATCH),
        "",
        "### gpt2-xl, 100 Gbit/s a GPU between nodes",
        "",
        *table("gpt2-xl", BATCH, gbps=100),
        "",
        "## Where communication begins to cost, and what launcher changes there",
        "",
        "- **Gradients are sent while backward goes on.** What does not fit behind it is waited for: the",
        "  column above. It begins between nodes, where a GPU has a ninth of what it has within one.",
        "- **Accumulation buys it back.** Gradients go out once a step, so a plan prefers few micro-batches",
        "  of the largest size that fits, and a larger batch hides more.",
        "- **Sharding costs more messages.** ZeRO-1 and 2 send as much as DDP; ZeRO-3 gathers weights in",
        "  forward and backward too. `auto` leaves DDP only for what does not fit or gains a quarter.",
        "- **One sequence a GPU ends it.** There is no accumulation left and nothing to hide behind, and the",
        "  host starts kernels more slowly than the GPU ends them: from there on more GPUs need a larger",
        "  batch, which a plan says by its MFU.",
        "- **Start-up does not grow with the data.** Where a rank begins in the text is worked out at once.",
    )


def main() -> None:
    PAGE.write_text("\n".join([*page(), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
