"""What wandb keeps is in the run's folder, and all attempts are one run there."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.run.directory import RunDirectory
from launcher.worker.wandb import go_on_in_its_run, keep_in_folder


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


def test_every_attempt_reports_to_the_run_that_the_first_began(tmp_path: Path) -> None:
    first: dict[str, str] = {}
    again: dict[str, str] = {}
    other: dict[str, str] = {"WANDB_RUN_ID": "", "WANDB_RESUME": "must"}
    go_on_in_its_run(RunDirectory(tmp_path / "small"), first)
    go_on_in_its_run(RunDirectory(tmp_path / "small"), again)
    go_on_in_its_run(RunDirectory(tmp_path / "other"), other)
    assert first == again == {"WANDB_RUN_ID": first["WANDB_RUN_ID"], "WANDB_RESUME": "allow"}
    assert len(first["WANDB_RUN_ID"]) == 8
    assert other["WANDB_RUN_ID"] != first["WANDB_RUN_ID"]
    assert other["WANDB_RESUME"] == "must", "the user's own"


def test_a_run_of_the_user_s_is_reported_to(tmp_path: Path) -> None:
    environment = {"WANDB_RUN_ID": "mine"}
    go_on_in_its_run(RunDirectory(tmp_path / "small"), environment)
    assert environment == {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "allow"}
