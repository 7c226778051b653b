"""Write docs/benchmarks/gpu.md and docs/benchmarks/memory.md from what `scripts/bench_gpu` measured.

    .venv/bin/python -m scripts.gpu_pages

It reads docs/benchmarks/gpu/, one file for each call, in the order in which they were made. What is in none
of them is called not measured; nothing stands in its place. Predictions are those of the models as they are
now, for the plan that each row ran.
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
from launcher.plan.search import Candidate, Job, candidates
from launcher.plan.shape import Shape, flops_per_token, shape_of
from launcher.plan.states import Sharding
from scripts.bench_gpu import BLOCK, FAST, SHAPES, Row, rows

FOLDER = Path(__file__).resolve().parent.parent / "docs/benchmarks"
NOT = "not measured"
WIDTH = 110
GIB = 2**30

FIRST, ITEMS, COLD = 1, 2, 4
"""Calls: the first, which compiled rows of today's launcher are no longer like; the one that took the items
one by one; and the one in which launcher started alone with nothing compiled before."""

UNPADDED = "gpt2 without padded_vocabulary"
"""The row that the call of the items took with launcher's kernel for the loss, which is no longer taken
there: the first call's is what is predicted."""

FITTED = ("launcher", "without compile", "without chunked_loss")
"""The pace of launcher's own runs was fitted on rows whose names have one of these, in the calls before
`COLD`."""

WAITING = (
    "gpt2 launcher, micro-batch 8",
    "gpt2, micro-batch 8",
    "gpt2, micro-batch 8, checkpointed",
    *(f"gpt2-medium, {strategy}, offload none, bf16" for strategy in ("zero1", "zero2", "zero3", "fsdp")),
)
"""The host's time was fitted on these, which wait for it."""

SAME = 1e-3
"""Predictions that differ by less are one: what sets the rows apart is nothing that the models see."""

Found = Mapping[str, Any]


class Measured:
    """What one call of the bench found, by the names of its rows."""

    def __init__(self, file: Path) -> None:
        self.call = int(file.stem)
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


def all_measured(folder: Path = FOLDER / "gpu") -> list[Measured]:
    """Each call's, in their order. Raises SystemExit where they were not made on GPUs of one kind."""
    calls = sorted((Measured(file) for file in folder.glob("*.json")), key=lambda found: found.call)
    if len(gpus := {found.about["gpu"] for found in calls}) > 1:
        raise SystemExit(f"one page is of one kind of GPU, and these are {' and '.join(sorted(gpus))}")
    return calls


def with_most(calls: Sequence[Measured], names: Sequence[str]) -> Measured:
    """The call with most of these rows; of two, the later."""
    return max(calls, key=lambda found: (sum(found.row(name) is not None for name in names), found.call))


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


def speed_page(calls: Sequence[Measured], catalogue: str) -> Iterator[str]:
    datasheet = find_gpu(catalogue).peak_flops("bf16")
    assert datasheet is not None
    yield from _about(calls, datasheet)
    yield from (
        "| model, micro-batch | who | call | tokens/s | its windows | of the stock | of the loop | MFU"
        " | of what is reached | peak, GiB | first step after |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    )
    current = calls[FIRST:]
    for row in rows():
        if row.kind == "launcher" and row.name == f"{row.model} launcher":
            trio = [f"{row.model} {who}" for who in ("launcher", "stock", "loop")]
            for name in trio:
                yield _against(with_most(current, trio), row, name, datasheet)
    yield from _kernels(calls[COLD - 1])
    yield from _start(calls)
    yield from _items(calls)
    yield from ("", "## Others", "", "| | call | tokens/s | MFU | peak, GiB |", "|---|---|---|---|---|")
    for row in rows():
        if "," in row.name and not row.brief and "compiled" not in row.name:
            measured = with_most(current, [row.name])
            rate = measured.rate(row.name)
            mfu = None if rate is None else utilisation(row.model, rate, datasheet)
            peak = shown(measured.peak(row.name), ".2f")
            call = NOT if rate is None else str(measured.call)
            yield f"| {row.name} | {call} | {shown(rate, ',.0f')} | {shown(mfu, '.1%')} | {peak} |"
    yield from _predicted_speed(calls, catalogue)


def _about(calls: Sequence[Measured], datasheet: float) -> Iterator[str]:
    """What was run, and where."""
    yield from (
        "# GPU: the launcher against the stock Trainer and a hand-written loop",
        "",
        prose(
            f"""`scripts/bench_gpu` measured it, in {len(calls)} calls, each on another such GPU, where call
            {FIRST} is what still holds of two; `scripts/gpu_pages.py` wrote this. Every row is a process of
            its own, one measured while others start. Two rows are compared only where one call measured both.
            Launcher's are the real `launcher train`. Where the machine had torch 2.11, launcher asks for
            2.13; its packages were in place."""
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
    )
    for measured in calls:
        about, ceilings = measured.about, measured.about["ceilings"]
        versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        yield (
            f"- Call {measured.call}: {about['gpu']}, {about['memory'] / GIB:.0f} GiB; datasheet"
            f" {datasheet / 1e12:.0f} TFLOP/s, measured {ceilings['matmul_flops'] / 1e12:.0f}; a copy"
            f" {ceilings['copy_bytes'] / 1e12:.2f} TB/s. {versions}."
        )
    yield ""


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
            f"""By PyTorch's profiler, in call {measured.call}, over two steps after a pause, kernels run in
            {" and ".join(told)}: the host is ahead in both, and the rest is most likely the clock, which
            goes down under load ([decision 25](../decisions/0025-a-kernel-of-our-own-for-the-loss.md))."""
        ),
    )


def _start(calls: Sequence[Measured]) -> Iterator[str]:
    """How long the first step takes, and of what."""
    measured = calls[COLD - 1]
    alone, loop, stock = (measured.rows[f"gpt2 {who}"] for who in ("launcher", "loop", "stock"))
    whole, until_rank = alone["start_to_first_step"], alone["seconds"] - alone["process_age"]
    loading, building = alone["loaded"], alone["begun"] - alone["loaded"]
    stepping, compiling = whole - until_rank - alone["begun"], alone["compiling"]["total_wall_time"]
    again = measured.rows["gpt2 launcher, accumulation 16"]["start_to_first_step"]
    slow = calls[ITEMS - 1].rows["gpt2 launcher"]["start_to_first_step"]
    yield from (
        "",
        prose(
            f"""**From the start to the first step** launcher took {whole:.0f} s in call {COLD}, alone on the
            machine and with nothing compiled before: {until_rank:.0f} until the rank was there, {loading:.0f}
            to load it, {building:.1f} to build and prove the run, {stepping:.0f} for the first step,
            {compiling:.0f} of them in torch.compile. Packages had their bytecode, as pip leaves them, and had
            been read since the machine was started, to prepare the text. After it, alone as well, the stock
            Trainer, which compiles nothing, took {stock["start_to_first_step"]:.0f} s, and the loop
            {loop["start_to_first_step"]:.0f}, {loop["compiling"]["total_wall_time"]:.0f} of them in
            torch.compile. With 16 micro-batches a step launcher found all of its compilation in the cache:
            {again:.0f} s, others starting beside it. Without bytecode, on the machine of call {ITEMS}, it had
            been {slow:.0f} s."""
        ),
    )


def _items(calls: Sequence[Measured]) -> Iterator[str]:
    """What each item is worth."""
    first, items, whole = calls[FIRST - 1], calls[ITEMS - 1], "gpt2 launcher"
    yield from (
        "",
        "## Item by item",
        "",
        prose(
            f"""gpt2, micro-batch 32, in call {ITEMS}: what is lost when one of them is switched off. Without
            padding launcher's kernel for the loss held all chunks' logits at once; in call {FIRST} PyTorch's
            operators made it ({shown(first.rate(UNPADDED), ",.0f")} tokens/s,
            {first.against(UNPADDED, whole)} of all together then,
            {shown(first.peak(UNPADDED), ".2f")} GiB), and since call {ITEMS} they do so again. Stock
            compiled had {shown(first.rate("gpt2 stock, compiled"), ",.0f")} tokens/s in call {FIRST};
            why is not known."""
        ),
        "",
        "| | tokens/s | its windows | of all together | peak, GiB |",
        "|---|---|---|---|---|",
    )
    for name in (whole, *(f"gpt2 without {item}" for item in (*FAST, "compile")), "gpt2 stock, compiled"):
        rate, peak = items.rate(name), shown(items.peak(name), ".2f")
        cells = (name, shown(rate, ",.0f"), items.windows(name), items.against(name, whole), peak)
        yield f"| {' | '.join(cells)} |"


def _against(measured: Measured, row: Row, name: str, datasheet: float) -> str:
    rate, ceiling = measured.rate(name), measured.about["ceilings"]["matmul_flops"]
    share, reached = (
        None if rate is None else utilisation(row.model, rate, peak) for peak in (datasheet, ceiling)
    )
    first = None if rate is None else measured.rows[name]["start_to_first_step"]
    cells = (
        f"{row.model}, {row.micro_batch}",
        name.removeprefix(f"{row.model} "),
        NOT if rate is None else str(measured.call),
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


def _predicted_speed(calls: Sequence[Measured], catalogue: str) -> Iterator[str]:
    yield from (
        "",
        "## Predicted and measured",
        "",
        prose(
            f"""The pace of launcher's own runs (`launcher/plan/speed.py`) was fitted on the rows of calls
            {FIRST} to {COLD - 1} that have everything, no compile, or no chunked loss. The host's time was
            fitted on seven that wait for it, four of them one strategy's only one, while other rows started
            on the same 16 processors: alone it would be less. Rows without compile are run for their memory,
            most of them in three windows of two steps, which vary as is told. A dense mask is not modelled.
            Where a plan says how near its speed is, it is like the rows with compile and without
            checkpointing."""
        ),
        "",
        "| | call | predicted, tokens/s | measured | its windows | error |",
        "|---|---|---|---|---|---|",
    )
    found = list(_speeds(calls, catalogue))
    for row, measured, expected, rate in found:
        error = f"{expected / rate - 1:+.1%}"
        cells = (row.name, str(measured.call), f"{expected:,.0f}", f"{rate:,.0f}", measured.windows(row.name))
        yield f"| {' | '.join(cells)} | {error} |"
    fitted = [
        expected
        for row, measured, expected, _ in found
        if row.name in WAITING or (measured.call < COLD and any(name in row.name for name in FITTED))
    ]
    yield from ("", _in_short([(expected, rate) for *_, expected, rate in found], fitted))


def _in_short(found: Sequence[tuple[float, float]], fitted: Sequence[float]) -> str:
    """Errors of what was predicted and measured: where nothing was `fitted` on such a prediction, and where
    it was. A row taken again is none that was not fitted on."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    for expected, real in found:
        known = any(abs(expected / other - 1) < SAME for other in fitted)
        errors[known].append(expected / real - 1)
    new, old = _summary(errors[False]), _summary(errors[True])
    return f"Rows with nothing fitted on them or their like: {new}. The others: {old}."


def _ours(calls: Sequence[Measured]) -> Iterator[tuple[Row, Measured, Found]]:
    """Launcher's rows that were measured as it is now, with their calls."""
    for measured in calls:
        for row in rows():
            found = measured.row(row.name)
            if row.kind == "launcher" and found is not None and not _has_changed(row, measured.call):
                yield row, measured, found


def _has_changed(row: Row, call: int) -> bool:
    """Whether launcher's row is no longer what that call measured."""
    if row.name == UNPADDED:
        return call == ITEMS
    return call == FIRST and not row.brief


def _speeds(calls: Sequence[Measured], catalogue: str) -> Iterator[tuple[Row, Measured, float, float]]:
    """Launcher's rows, their calls, and their tokens per second: predicted, and measured."""
    for row, measured, found in _ours(calls):
        if row.name != "gpt2 without causal_attention":
            speed = predicted(row, found["plan"], catalogue).speed
            assert speed is not None
            yield row, measured, row.tokens / speed.total, found["tokens_per_second"]


def _memories(
    calls: Sequence[Measured], catalogue: str
) -> Iterator[tuple[Row, Measured, Found, float, float]]:
    """Launcher's rows, their calls, and their peaks in GiB: predicted, and measured."""
    for row, measured, found in _ours(calls):
        memory = predicted(row, found["plan"], catalogue).memory
        assert memory is not None
        yield row, measured, found, (memory.total - memory.framework) / GIB, found["peak_allocated"] / GIB


def errors(calls: Sequence[Measured], catalogue: str) -> tuple[float, float]:
    """The largest of memory, of all rows, and of speed, of those with compile and without checkpointing."""
    return (
        max(abs(expected / real - 1) for *_, expected, real in _memories(calls, catalogue)),
        max(
            abs(expected / real - 1)
            for row, _, expected, real in _speeds(calls, catalogue)
            if row.compiled and not row.checkpointing
        ),
    )


def _summary(errors: list[float]) -> str:
    worst = max(errors, key=abs)
    return f"median error {statistics.median(map(abs, errors)):.1%}, worst {worst:+.1%}, {len(errors)} rows"


def memory_page(calls: Sequence[Measured], catalogue: str) -> Iterator[str]:
    about = calls[-1].about
    yield from (
        "# Memory: predicted and measured",
        "",
        prose(
            f"""The peak of what PyTorch had allocated on one GPU, in the rows of [gpu.md](gpu.md) and in
            others that were run for their memory, against the plan's but for the framework, which PyTorch
            does not allocate. `scripts/gpu_pages.py` wrote it. {about["gpu"]}."""
        ),
        "",
        prose(
            f"""What torch.compile makes of the loss was fitted on the rows of gpt2 before call {COLD};
            nothing else was."""
        ),
        "",
        "| row | call | predicted, GiB | measured | error | reserved |",
        "|---|---|---|---|---|---|",
    )
    found_all = list(_memories(calls, catalogue))
    for row, measured, found, expected, peak in found_all:
        error, reserved = f"{expected / peak - 1:+.1%}", f"{found['peak_reserved'] / GIB:.2f}"
        cells = (row.name, str(measured.call), f"{expected:.2f}", f"{peak:.2f}", error, reserved)
        yield f"| {' | '.join(cells)} |"
    fitted = [
        expected
        for row, measured, _, expected, _ in found_all
        if row.compiled and row.model == "gpt2" and measured.call < COLD
    ]
    seen = {row.name for row, *_ in found_all}
    missing = [row.name for row in rows() if row.kind == "launcher" and row.name not in seen]
    yield from (
        "",
        _in_short([(expected, peak) for *_, expected, peak in found_all], fitted),
        "",
        f"Not measured yet: {'; '.join(missing)}.",
    )


def main() -> None:
    calls = all_measured()
    catalogue = "h200-sxm-141gb"
    for name, page in (
        ("gpu.md", speed_page(calls, catalogue)),
        ("memory.md", memory_page(calls, catalogue)),
    ):
        (FOLDER / name).write_text("\n".join([*page, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
