from __future__ import annotations

from pathlib import Path

import pytest

from launcher.run.directory import RunDirectory, write_text
from launcher.run.requests import ask_to_stop, asked_by, is_replaced
from tests.conftest import stale


def test_a_file_system_that_does_not_say_for_once_is_asked_again(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_to_stop(directory, "person")
    write_text(directory.handover, "")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stale)
        patch.setattr(Path, "read_text", stale)
        assert asked_by(directory) is None
        assert not is_replaced(directory, 1)
    assert asked_by(directory) == "person"
    assert is_replaced(directory, 1)
