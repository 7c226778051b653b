"""What a rank sets up around its training."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.run.directory import RunDirectory
from launcher.worker.main import keep_in_folder


def test_wandb_writes_to_the_folder_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(tmp_path / "runs" / "small")
    environment: dict[str, str] = {}
    keep_in_folder(directory, environment)
    assert environment == {"WANDB_DIR": str(directory.root)}
    named = {"WANDB_DIR": "elsewhere"}
    keep_in_folder(directory, named)
    assert named == {"WANDB_DIR": "elsewhere"}, "the user's own"
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").touch()
    without: dict[str, str] = {}
    keep_in_folder(directory, without)
    assert not without, "settings that are read where it is launched from"
