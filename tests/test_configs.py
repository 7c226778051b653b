"""The example files: they load, they are what `init` writes, and what is rendered from them is not stale."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.config.load import load_cluster, load_run
from launcher.config.presets import PRESETS, starter_run
from launcher.plan.orders import parse_orders
from scripts.render_examples import CONFIGS, EXAMPLES, Example, rendered

RENDERED = CONFIGS / "rendered"
REFRESH = "run ./scripts/render_examples, and look at what changed"


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_an_example_renders_to_the_bytes_that_are_kept(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RENDERED / example.name
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name: text.encode() for name, text in rendered(example).items()} == kept, REFRESH
    assert os.access(folder / "launch.sh", os.X_OK)


def test_no_example_is_left_over() -> None:
    assert {folder.name for folder in RENDERED.iterdir()} == {example.name for example in EXAMPLES}


@pytest.mark.parametrize(
    "file", sorted(RENDERED.rglob("*.*")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_no_path_of_a_machine_is_in_an_example(file: Path) -> None:
    for word in file.read_text(encoding="utf-8").split():
        assert not word.strip("\"',").startswith("/"), word


def test_a_kept_plan_is_orders_that_a_worker_reads() -> None:
    orders = parse_orders((RENDERED / "gpt2-xl-on-8x-h100-80gb" / "plan.json").read_text(encoding="utf-8"))
    batch = orders.plan.batch
    assert batch.micro_batch * batch.accumulation * batch.world_size == batch.batch_size == 1024
    assert batch.world_size == 8


@pytest.mark.parametrize("file", sorted((CONFIGS / "runs").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_run_file_loads_and_is_named_for_its_run(file: Path) -> None:
    assert load_run(file).config.name == file.stem


@pytest.mark.parametrize("file", sorted((CONFIGS / "clusters").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_cluster_file_loads_and_is_named_for_its_cluster(file: Path) -> None:
    assert load_cluster(file).config.name == file.stem


@pytest.mark.parametrize("preset", PRESETS)
def test_the_file_of_a_preset_is_what_init_writes(preset: str) -> None:
    kept = (CONFIGS / "runs" / f"{preset}.yaml").read_text(encoding="utf-8")
    assert kept == starter_run(preset, preset)
