"""Write docs/benchmarks/gpu.md and docs/benchmarks/memory.md from what `scripts/bench_gpu` measured.

    python scripts/gpu_pages.py

It reads docs/benchmarks/gpu.json. What is not there is called not measured; nothing stands in its place.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench_gpu import BLOCK, FAST, SHAPES, Row, rows

from launcher.plan.hardware import find_gpu
from launcher.plan.shape import flops_per_token, shape_of

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


def utilisation(model: str, rate: float, peak: float) -> float:
    """MFU, by the PaLM count: 6 N + 12 L H Q T FLOP for each token."""
    layers, heads, width = SHAPES[model]
    config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": BLOCK}
    shape = shape_of(config)
    assert shape is not None
    return rate * flops_per_token(shape, BLOCK) / peak


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
        "Every row is a process of its own on one GPU, all in one run of ten minutes, measured one by one;",
        "launcher's are the real `launcher train`. Blocks of 1,024 tokens, bf16, a vocabulary of 50,257, no",
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
        rate, peak = shown(measured.rate(name), ",.0f"), shown(measured.peak(name), ".2f")
        yield f"| {name} | {rate} | {measured.against(name, whole)} | {peak} |"
    yield from ("", "## Others", "", "| | tokens/s | MFU | peak, GiB |", "|---|---|---|---|")
    for row in rows():
        if "," in row.name and row.window > 2 and "compiled" not in row.name:
            rate = measured.rate(row.name)
            mfu = None if rate is None else utilisation(row.model, rate, datasheet)
            peak = shown(measured.peak(row.name), ".2f")
            yield f"| {row.name} | {shown(rate, ',.0f')} | {shown(mfu, '.1%')} | {peak} |"
    yield from _predicted_speed(measured)


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


def _predicted_speed(measured: Measured) -> Iterator[str]:
    yield from (
        "",
        "## Predicted and measured",
        "",
        "| | predicted, tokens/s | measured | error |",
        "|---|---|---|---|",
    )
    errors = []
    for row in rows():
        rate, found = measured.rate(row.name), measured.rows.get(row.name, {})
        if row.kind == "launcher" and rate is not None and found["plan"]["forecast"] is not None:
            predicted = found["plan"]["forecast"]["tokens_per_second"]
            errors.append(predicted / rate - 1)
            yield f"| {row.name} | {predicted:,.0f} | {rate:,.0f} | {errors[-1]:+.1%} |"
    if errors:
        yield from ("", f"Median error {statistics.median(map(abs, errors)):.1%}.")


def memory_page(measured: Measured) -> Iterator[str]:
    yield from (
        "# Memory: predicted and measured",
        "",
        "The peak of what PyTorch had allocated on one GPU, in the rows of [gpu.md](gpu.md), against the",
        "plan but for the framework, which PyTorch does not allocate. `scripts/gpu_pages.py` wrote it.",
        f"{measured.about['gpu']}, torch {measured.about['versions']['torch']}.",
        "",
        "| row | predicted, GiB | measured | error | reserved |",
        "|---|---|---|---|---|",
    )
    errors: dict[bool, list[float]] = {False: [], True: []}
    for row in rows():
        if row.kind != "launcher":
            continue
        peak = measured.peak(row.name)
        if peak is None:
            yield f"| {row.name} | | {NOT} | | |"
            continue
        found = measured.rows[row.name]
        memory = found["plan"]["memory"]
        predicted = sum(size for category, size in memory.items() if category != "framework") / GIB
        errors[row.compiled].append(predicted / peak - 1)
        reserved = found["peak_reserved"] / GIB
        yield f"| {row.name} | {predicted:.2f} | {peak:.2f} | {predicted / peak - 1:+.1%} | {reserved:.2f} |"
    for compiled, name in ((False, "eager"), (True, "compiled")):
        if errors[compiled]:
            half = statistics.median(map(abs, errors[compiled]))
            worst = max(errors[compiled], key=abs)
            yield from ("", f"{name}: median error {half:.1%}, worst {worst:+.1%}.")


def main() -> None:
    measured = Measured(FOLDER / "gpu.json")
    for name, page in (
        ("gpu.md", speed_page(measured, "h200-sxm-141gb")),
        ("memory.md", memory_page(measured)),
    ):
        (FOLDER / name).write_text("\n".join([*page, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
