"""docs/concepts/scaling.md says what plans say."""

from __future__ import annotations

from scripts import scaling


def test_the_page_is_as_written() -> None:
    assert scaling.PAGE.read_text(encoding="utf-8") == "\n".join([*scaling.page(), ""]), (
        "run .venv/bin/python -m scripts.scaling"
    )
