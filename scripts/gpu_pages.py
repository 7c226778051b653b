"""Write docs/benchmarks/gpu.md and docs/benchmarks/memory.md from what `scripts/bench_gpu` measured.

    .venv/bin/python -m scripts.gpu_pages

It reads docs/benchmarks/gpu.json, of launcher and those it is held against; gpu_items.json, of the items one
by one; and gpu_earlier.json, rows of an earlier run. What is in none of them is called not measured; nothing
stands in its place. Predictions are those of the models as they are now, for the plan that each row ran.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.plan.batch import Batch
from launcher.plan.fast import Fast
from launcher.plan.hardware import find_gpu
from launcher.plan.measured import Errors
from launcher.plan.search import Candidate, Job, candidates
from launcher.plan.shape import Shape, flops_per_token, shape_of
from launcher.plan.states import Sharding
from scripts.bench_gpu import BLOCK, FAST, SHAPES, Row, rows

FOLDER = Path(__file__).resolve().parent.parent / "docs/benchmarks"
FILES = ("gpu.json", "gpu_items.json", "gpu_earlier.json")
NOT = "not measured"
WIDTH = 110
GIB = 2**30

UNPADDED = "gpt2 without padded_vocabulary"
"""The row that the run of the items took with launcher's kernel for the loss, which is no longer taken there:
an earlier run's is what is predicted."""

FITTED = ("launcher", "without compile", "without chunked_loss")
"""The pace of launcher's own runs was fitted on rows whose names have one of these."""

Found = Mapping[str, Any]


class Measured:
    """What one run of the bench found, by the names of its rows."""

    def __init__(self, file: Path) -> None:
        self.about: Found = json.loads(file.read_text(encoding="utf-8"))
        self.rows: dict[str, Found] = {row["name"]: row for row in self.about["rows"]}

    def row(self, name: str) -> Found | None:
        """The row of that name; None where it is missing or failed."""
        row = self.rows.get(name)
        return None if row is None or "error" in row else row

    def rate(self, name: str) -> float | None:
        """Tokens per second."""
        row = self.row(name)
        return None if row is None else float(row["tokens_per_second"])

    def peak(self, name: str) -> float | None:
        """GiB that PyTorch had allocated at most."""
        row = self.row(name)
        return None if row is None else row["peak_allocated"] / GIB

    def against(self, name: str, other: str, digits: int = 2) -> str:
        """How many times as fast the first row is as the second."""
        ours, theirs = self.rate(name), self.rate(other)
        return NOT if ours is None or theirs is None else f"{ours / theirs:.{digits}f}"

    def windows(self, name: str) -> str:
        """The lowest and the highest rate of a row's windows: the rate is their median."""
        row = self.row(name)
        return NOT if row is None else f"{min(row['windows']):,.0f} to {max(row['windows']):,.0f}"


def all_measured() -> list[Measured]:
    """Each run's."""
    return [Measured(FOLDER / name) for name in FILES]


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


def prose(text: str) -> str:
    """A paragraph, in lines."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def shown(value: float | None, form: str) -> str:
    return NOT if value is None else format(value, form)


def speed_page(runs: Sequence[Measured], catalogue: str) -> Iterator[str]:
    measured, items, earlier = runs
    about = measured.about
    datasheet, ceiling = find_gpu(catalogue).peak_flops("bf16"), about["ceilings"]["matmul_flops"]
    assert datasheet is not None
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield from (
        "# GPU: the launcher against the stock Trainer and a hand-written loop",
        "",
        prose(
            """`scripts/bench_gpu` measured it, in three calls on three such GPUs; `scripts/gpu_pages.py`
            wrote this. Every row is a process of its own, one measured while others start, the first
            three with nothing beside them. What is compared was measured in one call. Time for all rows
            was not at hand. Launcher's are the real `launcher train`. The machines had torch 2.11,
            where launcher asks for 2.13; its packages were in place."""
        ),
        "",
        prose(
            """Blocks of 1,024 tokens, bf16, a vocabulary of 50,257, no dropout unless said, gradient norm
            clipped to 1. *Stock* is transformers' Trainer and model as they come; *loop* is
            `scripts/bare_loop.py`'s model, compiled as one does by hand: fused AdamW, TF32, a padded
            vocabulary. MFU is the PaLM count over the datasheet's peak, and over what a product of two
            matrices of 8192 x 8192 reaches on this GPU. A rate is the median of its windows."""
        ),
        "",
        f"{about['gpu']}, {about['memory'] / GIB:.0f} GiB; datasheet {datasheet / 1e12:.0f} TFLOP/s, measured"
        f" {ceiling / 1e12:.0f}; a copy {about['ceilings']['copy_bytes'] / 1e12:.2f} TB/s. {versions}.",
        "",
        "| model, micro-batch | who | tokens/s | its windows | of the stock | of the loop | MFU"
        " | of what is reached | peak, GiB | first step after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    for row in rows():
        if row.kind != "launcher" or row.name != f"{row.model} launcher":
            continue
        for who in ("launcher", "stock", "loop"):
            yield _against(measured, row, who, datasheet, ceiling)
    whole = "gpt2 launcher"
    yield from _kernels(measured)
    yield from _start(measured, items)
    yield from (
        "",
        "## Item by item",
        "",
        prose(
            f"""gpt2, micro-batch 32: what is lost when one of them is switched off. Without padding
            launcher's kernel for the loss held all chunks' logits at once; in an earlier run PyTorch's
            operators made it ({shown(earlier.rate(UNPADDED), ",.0f")} tokens/s,
            {earlier.against(UNPADDED, whole)} of all together then,
            {shown(earlier.peak(UNPADDED), ".2f")} GiB), and since this run they do so again. Stock
            compiled had {shown(earlier.rate("gpt2 stock, compiled"), ",.0f")} tokens/s in that earlier
            run; why is not known."""
        ),
        "",
        "| | tokens/s | its windows | of all together | peak, GiB |",
        "|---|---|---|---|---|",
    )
    for name in (whole, *(f"gpt2 without {item}" for item in (*FAST, "compile")), "gpt2 stock, compiled"):
        rate, peak = items.rate(name), shown(items.peak(name), ".2f")
        cells = (name, shown(rate, ",.0f"), items.windows(name), items.against(name, whole), peak)
        yield f"| {' | '.join(cells)} |"
    yield from ("", "## Others", "", "| | tokens/s | MFU | peak, GiB |", "|---|---|---|---|")
    for row in rows():
        if "," in row.name and not row.brief and "compiled" not in row.name:
            rate = measured.rate(row.name)
            mfu = None if rate is None else utilisation(row.model, rate, datasheet)
            peak = shown(measured.peak(row.name), ".2f")
            yield f"| {row.name} | {shown(rate, ',.0f')} | {shown(mfu, '.1%')} | {peak} |"
    yield from _predicted_speed(runs, catalogue)


def _kernels(measured: Measured) -> Iterator[str]:
    """What the profiler says of the first rows' kernels."""
    told = []
    for who in ("launcher", "loop"):
        row = measured.rows[f"gpt2 {who}"]
        step = row["micro_batch"] * BLOCK / row["tokens_per_second"]
        told.append(f"{1e3 * row['kernel_seconds']:.1f} of the {1e3 * step:.1f} ms of a step of {who}")
    yield from (
        "",
        prose(
            f"""By PyTorch's profiler, over two steps after a pause, kernels run in {" and ".join(told)}:
            the host is ahead in both, and the rest is most likely the clock, which goes down under load
            ([decision 25](../decisions/0025-a-kernel-of-our-own-for-the-loss.md))."""
        ),
    )


def _start(measured: Measured, items: Measured) -> Iterator[str]:
    """How long the first step takes, and of what."""
    alone = items.rows["gpt2 launcher"]
    cached = measured.rows["gpt2 launcher, accumulation 16"]["start_to_first_step"]
    whole, until_rank = alone["start_to_first_step"], alone["seconds"] - alone["process_age"]
    loading, building = alone["loaded"], alone["begun"] - alone["loaded"]
    compiling = whole - until_rank - alone["begun"]
    yield from (
        "",
        prose(
            f"""**From the start to the first step** launcher was to take less than 60 s, and was not seen
            to where nothing was compiled before. The first three rows started at one time on 16 cores;
            alone, in the run below, it took {whole:.0f} s, as the first on a machine just started, with
            packages that had no bytecode: {until_rank:.0f} until the rank was there, {loading:.0f} to
            load it, {building:.0f} to build and prove the run, {compiling:.0f} for the first step,
            which compiles. With what an earlier row had compiled, and others starting beside it, it
            took {cached:.0f} s."""
        ),
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
        measured.windows(name),
        measured.against(name, f"{row.model} stock"),
        measured.against(name, f"{row.model} loop", 3),
        shown(share, ".1%"),
        shown(reached, ".1%"),
        shown(measured.peak(name), ".2f"),
        NOT if first is None else f"{first:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def _predicted_speed(runs: Sequence[Measured], catalogue: str) -> Iterator[str]:
    yield from (
        "",
        "## Predicted and measured",
        "",
        prose(
            """One constant, the pace of launcher's own runs (`launcher/plan/speed.py`), was fitted on rows
            of the first two calls: all that have everything, no compile, or no chunked loss. A dense
            mask is not modelled."""
        ),
        "",
        "| | predicted, tokens/s | measured | error |",
        "|---|---|---|---|",
    )
    fitted: dict[bool, list[float]] = {True: [], False: []}
    for row, expected, rate in _speeds(runs, catalogue):
        error = expected / rate - 1
        fitted[any(name in row.name for name in FITTED)].append(error)
        yield f"| {row.name} | {expected:,.0f} | {rate:,.0f} | {error:+.1%} |"
    yield from (
        "",
        f"On rows not fitted: {_summary(fitted[False])}. The others: {_summary(fitted[True])}.",
    )


def _ours(runs: Sequence[Measured]) -> Iterator[tuple[Row, Found]]:
    """Launcher's rows that were measured as it is now, run by run."""
    earlier = runs[-1]
    for measured in runs:
        for row in rows():
            unchanged = row.brief or row.name == UNPADDED if measured is earlier else row.name != UNPADDED
            found = measured.row(row.name)
            if row.kind == "launcher" and found is not None and unchanged:
                yield row, found


def _speeds(runs: Sequence[Measured], catalogue: str) -> Iterator[tuple[Row, float, float]]:
    """Launcher's rows, and their tokens per second: predicted, and measured."""
    for row, found in _ours(runs):
        if row.brief or row.name == "gpt2 without causal_attention":
            continue
        speed = predicted(row, found["plan"], catalogue).speed
        assert speed is not None
        yield row, row.tokens / speed.total, found["tokens_per_second"]


def _memories(runs: Sequence[Measured], catalogue: str) -> Iterator[tuple[Row, Found, float, float]]:
    """Launcher's rows, and their peaks in GiB: predicted, and measured."""
    for row, found in _ours(runs):
        memory = predicted(row, found["plan"], catalogue).memory
        assert memory is not None
        yield row, found, (memory.total - memory.framework) / GIB, found["peak_allocated"] / GIB


def errors(runs: Sequence[Measured], catalogue: str) -> Errors:
    """The largest of all rows."""
    return Errors(
        max(abs(expected / real - 1) for *_, expected, real in _memories(runs, catalogue)),
        max(abs(expected / real - 1) for *_, expected, real in _speeds(runs, catalogue)),
    )


def _summary(errors: list[float]) -> str:
    worst = max(errors, key=abs)
    return f"median error {statistics.median(map(abs, errors)):.1%}, worst {worst:+.1%}, {len(errors)} rows"


def memory_page(runs: Sequence[Measured], catalogue: str) -> Iterator[str]:
    about = runs[0].about
    yield from (
        "# Memory: predicted and measured",
        "",
        "The peak of what PyTorch had allocated on one GPU, in the rows of [gpu.md](gpu.md), against the",
        "plan's but for the framework, which PyTorch does not allocate. `scripts/gpu_pages.py` wrote it.",
        "Those that are not in gpu.md were measured in an earlier run, on another such machine.",
        f"{about['gpu']}, torch {about['versions']['torch']}.",
        "",
        "What torch.compile makes of the loss was fitted on the rows of gpt2; nothing else was.",
        "",
        "| row | predicted, GiB | measured | error | reserved |",
        "|---|---|---|---|---|",
    )
    fitted: dict[bool, list[float]] = {False: [], True: []}
    for row, found, expected, peak in _memories(runs, catalogue):
        error = expected / peak - 1
        fitted[row.compiled and row.model == "gpt2"].append(error)
        reserved = found["peak_reserved"] / GIB
        yield f"| {row.name} | {expected:.2f} | {peak:.2f} | {error:+.1%} | {reserved:.2f} |"
    seen = {row.name for row, *_ in _memories(runs, catalogue)}
    missing = [row.name for row in rows() if row.kind == "launcher" and row.name not in seen]
    yield from (
        "",
        f"Rows with nothing fitted on them: {_summary(fitted[False])}. The others: {_summary(fitted[True])}.",
        "",
        f"Not measured yet: {'; '.join(missing)}.",
    )


def main() -> None:
    runs = all_measured()
    catalogue = "h200-sxm-141gb"
    for name, page in (
        ("gpu.md", speed_page(runs, catalogue)),
        ("memory.md", memory_page(runs, catalogue)),
    ):
        (FOLDER / name).write_text("\n".join([*page, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
