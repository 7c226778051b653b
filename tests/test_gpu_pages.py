"""The pages of what was measured on a GPU say what its files and today's models say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.plan.measured import MEASURED
from scripts import bench_gpu, gpu_pages

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
GPU = "h200-sxm-141gb"


def test_the_pages_are_as_written() -> None:
    calls = gpu_pages.all_measured()
    for name, page in (
        ("gpu.md", gpu_pages.speed_page(calls, GPU)),
        ("memory.md", gpu_pages.memory_page(calls, GPU)),
    ):
        written = (FOLDER / name).read_text(encoding="utf-8")
        assert "\n".join([*page, ""]) == written, "run .venv/bin/python -m scripts.gpu_pages"


def test_a_plan_says_of_its_predictions_what_was_measured() -> None:
    memory, speed = gpu_pages.errors(gpu_pages.all_measured(), GPU)
    worth = MEASURED[GPU]
    assert worth.memory is not None
    assert worth.speed is not None
    assert memory <= worth.memory
    assert speed <= worth.speed


def test_a_row_that_failed_was_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "1.json"
    file.write_text(json.dumps({"rows": [{"name": "gpt2 launcher", "error": "no memory"}]}))
    measured = gpu_pages.Measured(file)
    assert measured.rate("gpt2 launcher") is measured.peak("gpt2 launcher") is None
    assert measured.against("gpt2 launcher", "gpt2 launcher") == gpu_pages.NOT
    assert measured.windows("gpt2 launcher") == gpu_pages.NOT


def test_what_is_compared_is_of_the_latest_call_that_measured_most_of_it(tmp_path: Path) -> None:
    rates = ({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}, {"a": 5.0})
    for number, rows in enumerate(rates, 1):
        found = [{"name": name, "tokens_per_second": rate} for name, rate in rows.items()]
        (tmp_path / f"{number}.json").write_text(json.dumps({"rows": found}))
    calls = [gpu_pages.Measured(tmp_path / f"{number}.json") for number in (1, 2, 3)]
    assert gpu_pages.with_most(calls, ["a", "b"]).call == 2
    assert gpu_pages.with_most(calls, ["a"]).call == 3


def test_calls_on_other_gpus_are_no_part_of_the_page(tmp_path: Path) -> None:
    for number, gpu in enumerate(("H100", "H200"), 1):
        (tmp_path / f"{number}.json").write_text(json.dumps({"gpu": gpu, "rows": []}))
    with pytest.raises(SystemExit, match="these are H100 and H200"):
        gpu_pages.all_measured(tmp_path)


def test_what_was_fitted_or_is_its_like_is_not_called_new() -> None:
    found = [(100.0, 110.0), (100.05, 90.0), (200.0, 100.0)]
    short = gpu_pages._in_short(found, fitted=[100.0])
    assert short.startswith(
        "Rows with nothing fitted on them or their like: median error 100.0%, worst +100.0%, 1 rows."
    )
    assert "2 rows" in short


def test_the_bench_says_how_its_rows_compare() -> None:
    def row(name: str, kind: str, rate: float, peak: float, **more: object) -> dict[str, object]:
        return {"name": name, "kind": kind, "tokens_per_second": rate, "peak_allocated": peak, **more}

    rows = [
        row("gpt2 launcher", "launcher", 300, 1),
        row("gpt2 stock", "stock", 100, 4),
        row("gpt2 loop", "loop", 300, 2, error="no memory"),
        row("gpt2 launcher, dropout 0.1", "launcher", 150, 1),
        row("gpt2 stock, dropout 0.1", "stock", 100, 2),
        row("gpt2 without tf32", "launcher", 1, 1),
    ]
    assert bench_gpu.ratios(rows) == [
        "gpt2 launcher: 3.000 of stock's tokens/s, 0.25 of its memory",
        "gpt2 launcher, dropout 0.1: 1.500 of stock's tokens/s, 0.50 of its memory",
    ]
