from __future__ import annotations

from pathlib import Path

import pytest

from scripts import reference

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["configuration.md", "commands.md"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert reference.pages()[name] == written, "run .venv/bin/python -m scripts.reference"


def test_a_key_inside_a_list_or_a_section_that_may_be_absent_has_its_row_and_its_values() -> None:
    text = reference.pages()["configuration.md"]
    for row in (
        "| `data.train[].files` | a list of text | required |",
        "| `train.early_stopping.min_delta` | a number from 0 on | `0.0` |",
        "| `slurm.container.runtime` | one of pyxis, apptainer | required |",
    ):
        assert row in text
