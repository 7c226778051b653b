"""The pages of what was measured on a GPU say what its files and today's models say."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.plan.measured import MEASURED
from scripts import gpu_pages

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
    found = gpu_pages.errors(gpu_pages.all_measured(), GPU)
    assert found.memory <= MEASURED[GPU].memory
    assert found.speed <= MEASURED[GPU].speed


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
