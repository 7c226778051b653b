"""The control half asks, a process with torch answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import LauncherError
from launcher.run.model_doctor import examine_model
from tests.conftest import write_json


def test_a_run_s_own_model_is_tried_with_the_paths_that_its_plan_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 90}
    write_json(
        tmp_path / "run.yaml",
        {
            "name": "run",
            "model": {"name": "gpt2", "overrides": overrides},
            "data": {"train": ["text"], "block_size": 32, "packing": "pad"},
            "train": {"batch_size": 1, "steps": 1, "fast": {"causal_attention": False}},
        },
    )
    write_json(tmp_path / "cluster.yaml", {"gpu": "cpu", "gpus_per_node": 1})
    checks = {check.name: check for check in examine_model("run.yaml", tmp_path / "cluster.yaml")}
    said = {name: check.found for name, check in checks.items() if name.startswith("train.fast.")}
    assert said == {
        "train.fast.tanh_gelu": "taken",
        "train.fast.causal_attention": "off: train.fast",
        "train.fast.chunked_loss": "taken",
        "train.fast.padded_vocabulary": "off: a CPU gains nothing",
    }
    assert checks["attention"].found == "a dense mask in 2 of 2 layers", "its padded rows have one"
    assert checks["attention, compiled"].found == "a dense mask in 2 layers"
    assert checks["host"].state == "warning"


def test_what_is_neither_a_run_nor_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LauncherError, match="no-such-model"):
        examine_model("no-such-model", None)
    with pytest.raises(LauncherError, match="is empty"):
        examine_model("", None)
