"""Write docs/benchmarks/gpu.md and docs/benchmarks/memory.md from what `scripts/bench_gpu` measured.

    python scripts/gpu_pages.py

It reads docs/benchmarks/gpu.json. What is not there is called not measured; nothing stands in its place.
Predictions are those of the models as they are now, for the plan that each row ran.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench_gpu import BLOCK, FAST, SHAPES, Row, rows

from launcher.plan.batch import Batch
from launcher.plan.fast import Fast
from launcher.plan.hardware import find_gpu
from launcher.plan.measured import Errors
from launcher.plan.search import Candidate, Job, candidates
from launcher.plan.shape import Shape, flops_per_token, shape_of
from launcher.plan.states import Sharding

FOLDER = Path(__file__).resolve().parent.parent / "docs/benchmarks"
NOT = "not measured"
GIB = 2**30

Found = Mapping[str, Any]


class Measured:
    """What one run of the bench found, by the names of its rows."""

    def __init__(self, file: Path) -> None:
        self.about: Found = json.loads(file.read_text(encoding="utf-8"))
        self.rows: dict[str, Found] = {row["name"]: row for row in self.about["rows"]}

    def rate(self, name: str) -> float | None:
        """Tokens per second; None where the row is missing or failed."""
        row = self.rows.get(name)
        return None if row is None or "error" in row else float(row["tokens_per_second"])

    def peak(self, name: str) -> float | None:
        """GiB that PyTorch had allocated at most."""
        row = self.rows.get(name)
        return None if row is None or "error" in row else row["peak_allocated"] / GIB

    def against(self, name: str, other: str) -> str:
        """How many times as fast the first row is as the second."""
        ours, theirs = self.rate(name), self.rate(other)
        return NOT if ours is None or theirs is None else f"{ours / theirs:.2f}"


def shape_named(model: str, dropout: float = 0.0) -> Shape:
    layers, heads, width = SHAPES[model]
    config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": BLOCK}
    dropouts = {f"{where}_pdrop": dropout for where in ("resid", "embd", "attn")}
    shape = shape_of({**config, **dropouts})
    assert shape is not None
    return shape


def utilisation(model: str, rate: float, peak: float) -> float:
    """MFU, by the PaLM count: 6 N + 12 L H Q T FLOP for each token."""
    return rate * flops_per_token(shape_named(model), BLOCK) / peak


def predicted(row: Row, plan: Found, catalogue: str) -> Candidate:
    """What memory and speed are predicted to be for what `row` ran."""
    job = Job(
        shape=shape_named(row.model, row.dropout),
        gpu=find_gpu(catalogue),
        precision=row.precision,
        block_size=BLOCK,
        compiled=row.compiled,
        world_size=1,
        ranks_per_node=1,
        network=None,
        available=None,
        fast=Fast(**plan["fast"]),
    )
    batch = Batch(row.micro_batch * row.accumulation, row.micro_batch, row.accumulation, 1)
    sharding = Sharding(plan["strategy"], 1, plan["offload"])
    (found,) = candidates(job, [batch], row.checkpointing, [sharding])
    return found


def shown(value: float | None, form: str) -> str:
    return NOT if value is None else format(value, form)


def speed_page(measured: Measured, catalogue: str) -> Iterator[str]:
    about = measured.about
    datasheet, ceiling = find_gpu(catalogue).peak_flops("bf16"), about["ceilings"]["matmul_flops"]
    assert datasheet is not None
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield from (
        "# GPU: the launcher against the stock Trainer and a hand-written loop",
        "",
        "`./scripts/bench_gpu docs/benchmarks/gpu.json` measured it; `scripts/gpu_pages.py` wrote this.",
        "Every row is a process of its own on one GPU, all in one run, one measured while others start, the",
        "first three with nothing beside them. Time for all of them was not at hand. Launcher's are the real",
        "`launcher train`. Blocks of 1,024 tokens, bf16, a vocabulary of 50,257, no",
        "dropout unless said, gradient norm clipped to 1. *Stock* is transformers' Trainer and model as they",
        "come; *loop* is `scripts/bare_loop.py`'s model, compiled as one does by hand: fused AdamW, TF32, a",
        "padded vocabulary. MFU is the PaLM count over the datasheet's peak, and over what a product of two",
        "matrices of 8192 x 8192 reaches on this GPU.",
        "",
        f"{about['gpu']}, {about['memory'] / GIB:.0f} GiB; datasheet {datasheet / 1e12:.0f} TFLOP/s, measured"
        f" {ceiling / 1e12:.0f}; a copy {about['ceilings']['copy_bytes'] / 1e12:.2f} TB/s. {versions}.",
        "",
        "| model, micro-batch | who | tokens/s | of the stock | of the loop | MFU | of what is reached"
        " | peak, GiB | first step after |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for row in rows():
        if row.kind != "launcher" or row.name != f"{row.model} launcher":
            continue
        for who in ("launcher", "stock", "loop"):
            yield _against(measured, row, who, datasheet, ceiling)
    yield from _again(Measured(FOLDER / "gpu_again.json"))
    yield from (
        "",
        "## Item by item",
        "",
        "gpt2, micro-batch 32: what is lost when one of them is switched off.",
        "",
        "| | tokens/s | of all together | peak, GiB |",
        "|---|---|---|---|",
    )
    whole = "gpt2 launcher"
    for name in (whole, *(f"gpt2 without {item}" for item in (*FAST, "compile")), "gpt2 stock, compiled"):
        rate, peak = measured.rate(name), shown(measured.peak(name), ".2f")
        yield f"| {name} | {shown(rate, ',.0f')} | {measured.against(name, whole)} | {peak} |"
    yield from ("", "## Others", "", "| | tokens/s | MFU | peak, GiB |", "|---|---|---|---|")
    for row in rows():
        if "," in row.name and not row.brief and "compiled" not in row.name:
            rate = measured.rate(row.name)
            mfu = None if rate is None else utilisation(row.model, rate, datasheet)
            peak = shown(measured.peak(row.name), ".2f")
            yield f"| {row.name} | {shown(rate, ',.0f')} | {shown(mfu, '.1%')} | {peak} |"
    yield from _predicted_speed(measured, catalogue)


def _again(measured: Measured) -> Iterator[str]:
    """The first three rows of a later run, with what the profiler says of their kernels."""
    yield from (
        "",
        f"The first three again, on another {measured.about['gpu']}, with reports read a step late",
        "([decision 22](../decisions/0022-reports-come-a-step-late.md)); *kernels*: milliseconds of a step",
        "in which one runs, by PyTorch's profiler, over two steps after a pause. The host is a step ahead in",
        "both, so the rest is most likely the clock, which goes down under load. Others started beside them.",
        "",
        "| gpt2, 32 | tokens/s | of the loop | ms a step | kernels | peak, GiB | first step after |",
        "|---|---|---|---|---|---|---|",
    )
    for name, row in measured.rows.items():
        rate, kernels = measured.rate(name), row.get("kernel_seconds")
        assert rate is not None
        cells = (
            name.removeprefix("gpt2 "),
            f"{rate:,.0f}",
            measured.against(name, "gpt2 loop"),
            f"{1e3 * row['micro_batch'] * BLOCK / rate:.1f}",
            NOT if kernels is None else f"{1e3 * kernels:.1f}",
            shown(measured.peak(name), ".2f"),
            f"{row['start_to_first_step']:.0f} s",
        )
        yield f"| {' | '.join(cells)} |"
    yield from (
        "",
        "What launcher's kernels take longer is the loss and the products beside it. A kernel for that",
        "([decision 25](../decisions/0025-a-kernel-of-our-own-for-the-loss.md)) came after this run:",
        "launcher with it was not measured yet.",
    )


def _against(measured: Measured, row: Row, who: str, datasheet: float, ceiling: float) -> str:
    name = f"{row.model} {who}"
    rate = measured.rate(name)
    share, reached = (
        None if rate is None else utilisation(row.model, rate, peak) for peak in (datasheet, ceiling)
    )
    first = None if rate is None else measured.rows[name]["start_to_first_step"]
    cells = (
        f"{row.model}, {row.micro_batch}",
        who,
        shown(rate, ",.0f"),
        measured.against(name, f"{row.model} stock"),
        measured.against(name, f"{row.model} loop"),
        shown(share, ".1%"),
        shown(reached, ".1%"),
        shown(measured.peak(name), ".2f"),
        NOT if first is None else f"{first:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def _predicted_speed(measured: Measured, catalogue: str) -> Iterator[str]:
    yield from (
        "",
        "## Predicted and measured",
        "",
        "One constant, the pace of launcher's own runs (`launcher/plan/speed.py`), was fitted on gpt2's",
        "rows with everything and without compile. A dense mask is not modelled.",
        "",
        "| | predicted, tokens/s | measured | error |",
        "|---|---|---|---|",
    )
    fitted: dict[bool, list[float]] = {True: [], False: []}
    for row, expected, rate in _speeds(measured, catalogue):
        error = expected / rate - 1
        fitted[row.name in ("gpt2 launcher", "gpt2 without compile")].append(error)
        yield f"| {row.name} | {expected:,.0f} | {rate:,.0f} | {error:+.1%} |"
    yield from ("", f"On rows not fitted: {_summary(fitted[False])}.")


def _speeds(measured: Measured, catalogue: str) -> Iterator[tuple[Row, float, float]]:
    """Launcher's rows with what is modelled, and their tokens per second: predicted, and measured."""
    for row in rows():
        rate = measured.rate(row.name)
        if row.kind != "launcher" or rate is None or row.name == "gpt2 without causal_attention":
            continue
        if row.brief:
            continue
        speed = predicted(row, measured.rows[row.name]["plan"], catalogue).speed
        assert speed is not None
        yield row, row.tokens / speed.total, rate


def _memories(measured: Measured, catalogue: str) -> Iterator[tuple[Row, float, float]]:
    """Launcher's rows, and their peaks in GiB: predicted, and measured."""
    for row in rows():
        peak = measured.peak(row.name)
        if row.kind != "launcher" or peak is None:
            continue
        memory = predicted(row, measured.rows[row.name]["plan"], catalogue).memory
        assert memory is not None
        yield row, (memory.total - memory.framework) / GIB, peak


def errors(measured: Measured, catalogue: str) -> Errors:
    """The largest of all rows."""

    def largest(found: Iterator[tuple[Row, float, float]]) -> float:
        return max(abs(expected / real - 1) for _, expected, real in found)

    return Errors(largest(_memories(measured, catalogue)), largest(_speeds(measured, catalogue)))


def _summary(errors: list[float]) -> str:
    worst = max(errors, key=abs)
    return f"median error {statistics.median(map(abs, errors)):.1%}, worst {worst:+.1%}, {len(errors)} rows"


def memory_page(measured: Measured, catalogue: str) -> Iterator[str]:
    yield from (
        "# Memory: predicted and measured",
        "",
        "The peak of what PyTorch had allocated on one GPU, in the rows of [gpu.md](gpu.md), against the",
        "plan's but for the framework, which PyTorch does not allocate. `scripts/gpu_pages.py` wrote it.",
        "Those that are not in gpu.md were measured an hour before the others, on another such machine.",
        f"{measured.about['gpu']}, torch {measured.about['versions']['torch']}.",
        "",
        "What torch.compile makes of the loss was fitted on the rows of gpt2; nothing else was.",
        "",
        "| row | predicted, GiB | measured | error | reserved |",
        "|---|---|---|---|---|",
    )
    fitted: dict[bool, list[float]] = {False: [], True: []}
    for row, expected, peak in _memories(measured, catalogue):
        error = expected / peak - 1
        fitted[row.compiled and row.model == "gpt2"].append(error)
        reserved = measured.rows[row.name]["peak_reserved"] / GIB
        yield f"| {row.name} | {expected:.2f} | {peak:.2f} | {error:+.1%} | {reserved:.2f} |"
    missing = [row.name for row in rows() if row.kind == "launcher" and measured.peak(row.name) is None]
    yield from (
        "",
        f"Rows with nothing fitted on them: {_summary(fitted[False])}. The others: {_summary(fitted[True])}.",
        "",
        f"Not measured yet: {'; '.join(missing)}.",
    )


def main() -> None:
    measured = Measured(FOLDER / "gpu.json")
    catalogue = "h200-sxm-141gb"
    for name, page in (
        ("gpu.md", speed_page(measured, catalogue)),
        ("memory.md", memory_page(measured, catalogue)),
    ):
        (FOLDER / name).write_text("\n".join([*page, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
