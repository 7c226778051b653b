"""The speed model against published training speeds: docs/benchmarks/published_speeds.csv replayed.

    ./scripts/replay_speeds       write docs/benchmarks/speed.md again

The shares in `launcher/plan/speed.py` and `traffic.py` were fitted on every second row of llm-foundry's
tables; a test fits them again.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from launcher.plan.activations import FP32, HALF, Numbers
from launcher.plan.batch import Batch
from launcher.plan.collectives import Wires
from launcher.plan.hardware import GIGA, GPU, find_gpu
from launcher.plan.shape import Shape, shape_of
from launcher.plan.speed import step_speed
from launcher.plan.states import Sharding
from launcher.plan.traffic import BANDWIDTH_SHARE, Layer, Stack, stack_of

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
SHAPES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
}
"""Layers, hidden width and heads."""

PURE_HALF = Stack(Layer(66, 0, 12, 0, 41), Layer(14, 0, 4, 0, 12), 8, 12, BANDWIDTH_SHARE)
"""llm-foundry: eager PyTorch on weights and a residual stream in bf16, without dropout, with a fused loss."""

BY_HAND = Stack(Layer(50, 0, 10, 0, 30), Layer(20, 0, 4, 0, 9), 6, 4, 0.85)
"""llm.c: kernels written for these shapes, counted by hand; their share of the bandwidth is assumed."""

SHARDED = ("llm-foundry", "torchtitan")
"""Sources whose runs are FSDP's; the others' are DDP's, or of one GPU."""

NETWORK = {"a100": 200 * GIGA / 8, "h100": 400 * GIGA / 8}
"""Bytes/s for each GPU between nodes: llm-foundry's heading says 1600 Gbit/s a node for A100, and nothing for
H100, where the usual 400 Gbit/s a GPU is assumed."""


LLAMAS = {
    "llama3-8b": (32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": (80, 8192, 64, 8, 28672, 128256),
    "llama2-13b": (40, 5120, 40, 40, 13824, 32000),
    "llama2-70b": (80, 8192, 64, 8, 28672, 32000),
}
"""Layers, hidden width, heads, key heads, intermediate width and vocabulary, in the order of FIELDS."""

FIELDS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "vocab_size"),
)


def llama(name: str) -> Shape:
    """The shape of one of LLAMAS; none of them ties its tables."""
    sizes = dict(zip(FIELDS, LLAMAS[name], strict=True))
    shape = shape_of({"model_type": "llama", "tie_word_embeddings": False, **sizes})
    assert shape is not None
    return shape


INTRODUCTION = """\
# The speed model against published speeds

Written by `./scripts/replay_speeds`. **Nothing here was measured by launcher, and none of these runs is
launcher's own**: a stock Hugging Face model under autocast moves about twice the bytes that llm-foundry's
does. What is shown is that one set of formulas, with five fitted shares, agrees with others' runs.

The rows, in `published_speeds.csv`:

- **llm-foundry**, `scripts/train/benchmarking/README.md`: MPT (GPT-2's layers) from 125 million to 7 billion
  parameters, blocks of 512 to 8192 tokens, 8 to 512 GPUs, bf16, without rows in fp8; FSDP, and
  replayed as fsdp. Three rows are far below their own neighbours in the published table (760m at 512 and
  1024 tokens on A100 80GB, 1b on 32 A100 40GB) and stand here as they are.
- **llm.c**: hand-written CUDA. The seconds of a step are those in its `scripts/run_gpt2_*.sh`, but for 124M.
- **torchtitan**, `docs/performance.md` of 2024: Llama 2 and 3 on 64 A100 with FSDP2, those rows without
  checkpointing or with all of it. The page names neither torch.compile nor the network: taken for eager
  PyTorch, in the plan's own count of bytes, and 200 Gbit/s a GPU.
- **nanoGPT**: torch.compile; the middle of the 107 to 138 thousand tokens/s that were reported.

Three ways to run, each with its own count of bytes: eager PyTorch, torch.compile, and kernels by hand. Fitted
on every second row of llm-foundry, by least squares of the logarithm: the share of the peak that matrix
products reach (A100 0.867, H100 0.702) and that attention reaches (0.312 and 0.174; FlashAttention 1), and
the share of the memory's bandwidth that PyTorch's other kernels reach (0.5). llm.c's share of it, 0.85,
is assumed.

A prediction for a GPU of another generation takes A100's shares, for which there is no row. The host's time
for a kernel is that of launcher's own runs on an H200: no published row is so small that it waits for it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published speed, in tokens/s of one GPU, and how it was run."""

    source: str
    model: str
    block_size: int
    gpu: GPU
    batch: Batch
    checkpointing: bool
    published: float

    @property
    def shape(self) -> Shape:
        if self.model in LLAMAS:
            return llama(self.model)
        layers, hidden, heads = SHAPES[self.model]
        return Shape(
            model_type="gpt2",
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_size=hidden // heads,
            intermediate=4 * hidden,
            vocab=50368 if self.source == "llm-foundry" else 50304,
            positions=self.block_size,
            tied=True,
            gated=False,
            dropout=False,
            attention_dropout=False,
        )

    @property
    def stack(self) -> Stack:
        if self.source == "llm-foundry":
            return PURE_HALF
        if self.source == "torchtitan":
            return stack_of(self.shape, Numbers(HALF, HALF), compiled=False)
        return BY_HAND if self.source == "llm.c" else stack_of(self.shape, Numbers(HALF, FP32), compiled=True)


def published() -> list[Row]:
    """The rows as they were published."""
    with (DOCS / "published_speeds.csv").open(encoding="utf-8") as file:
        return [_row(fields) for fields in csv.DictReader(file)]


def _row(fields: dict[str, str]) -> Row:
    gpus, micro, accumulation = (int(fields[name]) for name in ("gpus", "micro_batch", "accumulation"))
    return Row(
        source=fields["source"],
        model=fields["model"],
        block_size=int(fields["block_size"]),
        gpu=find_gpu(fields["gpu"]),
        batch=Batch(micro * accumulation * gpus, micro, accumulation, gpus),
        checkpointing=fields["checkpointing"] == "yes",
        published=float(fields["tokens_per_second_per_gpu"]),
    )


def predicted(row: Row, stack: Stack | None = None) -> float:
    """Tokens/s of one GPU by the model; `stack` in place of the one the row ran on."""
    assert row.gpu.link is not None
    speed = step_speed(
        row.shape,
        row.gpu,
        row.batch,
        Wires(min(8, row.batch.world_size), row.gpu.link, NETWORK[row.gpu.name[:4]]),
        stack or row.stack,
        Sharding("fsdp" if row.source in SHARDED else "ddp", row.batch.world_size),
        block_size=row.block_size,
        precision="bf16",
        gradient_checkpointing=row.checkpointing,
    )
    assert speed is not None
    return row.batch.batch_size // row.batch.world_size * row.block_size / speed.total


def error(row: Row) -> float:
    """Predicted over published, less one."""
    return predicted(row) / row.published - 1


def fitted_and_held_out(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that the shares were fitted on, and all others."""
    foundry = [row for row in rows if row.source == "llm-foundry"]
    others = [row for row in rows if row.source != "llm-foundry"]
    return foundry[::2], [*foundry[1::2], *others]


def summary(rows: Sequence[Row]) -> Iterator[str]:
    yield "| source | GPU | rows | median error | within 10 % | worst |"
    yield "|---|---|---|---|---|---|"
    for (source, gpu), found in groupby(
        sorted(rows, key=lambda row: (row.source, row.gpu.name)), key=lambda row: (row.source, row.gpu.name)
    ):
        errors = [error(row) for row in found]
        near = sum(abs(one) <= 0.1 for one in errors)
        median = statistics.median(abs(one) for one in errors)
        yield (f"| {source} | {gpu} | {len(errors)} | {median:.1%} | {near} | {max(errors, key=abs):+.1%} |")


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| source | model | block | GPU | GPUs | micro | checkpointing | published | predicted | error |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.source} | {row.model} | {row.block_size} | {row.gpu.name} | {row.batch.world_size}"
            f" | {row.batch.micro_batch} | {'on' if row.checkpointing else 'off'} | {row.published:,.0f}"
            f" | {predicted(row):,.0f} | {error(row):+.1%} |"
        )


def scaling() -> Iterator[str]:
    """torchtitan's Llama 3.1 8B from 8 to 128 GPUs, as its `benchmarks/` has it. Its H100 is not the
    catalogue's, so only the ratio counts."""
    shape, gpu = llama("llama3-8b"), find_gpu("h100-sxm-80gb")
    assert gpu.link is not None
    yield "| run | published, 128 over 8 GPUs | predicted |"
    yield "|---|---|---|"
    for name, compiled, eight, many in (("eager", False, 5762, 5605), ("compiled", True, 6667, 6514)):
        seconds = []
        for world_size in (8, 128):
            sharding = Sharding("fsdp", world_size)
            speed = step_speed(
                shape,
                gpu,
                Batch(2 * world_size, 2, 1, world_size),
                Wires(8, gpu.link, NETWORK["h100"]),
                stack_of(shape, sharding.numbers("bf16"), compiled=compiled),
                sharding,
                block_size=8192,
                precision="bf16",
                gradient_checkpointing=False,
            )
            assert speed is not None
            seconds.append(speed.total)
        yield f"| torchtitan, {name} | {many / eight:.3f} | {seconds[0] / seconds[1]:.3f} |"


def document() -> str:
    """The text of docs/benchmarks/speed.md."""
    fitted, held_out = fitted_and_held_out(published())
    parts = [
        INTRODUCTION,
        "## The rows that were not fitted on, in short",
        "\n".join(summary(held_out)),
        "## Each of them",
        "\n".join(table(held_out)),
        "## The rows that the shares were fitted on, in short",
        "\n".join(summary(fitted)),
        "## From one node to many",
        "\n".join(scaling()),
        "The model hides every byte behind the backward pass here; what the runs lose is stragglers and\n"
        "kernels that get in each other's way, which it leaves out.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    (DOCS / "speed.md").write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
