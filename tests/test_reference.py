from __future__ import annotations

from pathlib import Path

import pytest

from scripts import reference

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["configuration.md", "commands.md"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert reference.pages()[name] == written, "run .venv/bin/python -m scripts.reference"
