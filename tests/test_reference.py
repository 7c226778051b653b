from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["configuration.md", "commands.md"])
def test_the_reference_is_what_the_code_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("reference", None)
    import reference

    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert reference.pages()[name] == written, "run .venv/bin/python scripts/reference.py"
