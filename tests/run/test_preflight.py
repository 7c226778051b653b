"""What is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.schema import RunConfig
from launcher.run.preflight import say_upload
from tests.conftest import small_run


@pytest.mark.parametrize(
    ("upload", "token", "notes"),
    [(None, "", 0), ("someone/small", "", 1), ("someone/small", "hf_notarealtoken", 0)],
)
def test_an_upload_without_a_token_is_told_of(
    upload: str | None, token: str, notes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    said: list[str] = []
    say_upload(RunConfig.model_validate({**small_run(), "push_to_hub": upload}), said.append)
    assert len(said) == notes
    assert all("no token of the Hub is here to upload to someone/small" in each for each in said)
