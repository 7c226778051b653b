from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.load import load_cluster, load_run
from launcher.errors import RequestError
from launcher.run.assemble import Assembly, assemble, rendered_files
from launcher.run.directory import run_directory
from launcher.run.explain import explain_key
from launcher.run.machine import Machine
from tests.conftest import small_run, write_json

MACHINE = Machine("node", 8, 2**34, (), None)


@pytest.fixture
def assembly(tmp_path: Path) -> Assembly:
    write_json(tmp_path / "run.yaml", small_run())
    (tmp_path / "cluster.yaml").write_text("gpu: cpu\ngpus_per_node: 2\nenv: {GREETING: good day}\n")
    run = load_run(tmp_path / "run.yaml", ["train.precision=bf16", "train.steps=40"])
    return assemble(run, load_cluster(tmp_path / "cluster.yaml"), MACHINE)


def explained(assembly: Assembly, key: str) -> dict[str, Any]:
    (entry,) = explain_key(assembly, key)
    return entry


def test_who_set_a_value(assembly: Assembly, tmp_path: Path) -> None:
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    batch = explained(assembly, "train.batch_size")
    line = int(batch["set_by"].removeprefix("run.yaml:"))
    assert '"batch_size": 8' in lines[line - 1]
    assert explained(assembly, "train.precision")["set_by"] == "override train.precision=bf16"
    assert explained(assembly, "train.weight_decay")["set_by"] == "default"
    assert explained(assembly, "cluster.gpus_per_node")["set_by"] == "cluster.yaml:2"
    assert explained(assembly, "cluster.nodes")["set_by"] == "default"


def test_what_auto_became(assembly: Assembly) -> None:
    micro_batch = explained(assembly, "train.micro_batch")
    assert (micro_batch["value"], micro_batch["became"]) == ('"auto"', str(assembly.plan.batch.micro_batch))
    assert explained(assembly, "train.compile")["became"] == "false"
    assert explained(assembly, "train.steps")["became"] is None


def test_every_place_it_names_is_that_line_of_that_file(assembly: Assembly) -> None:
    files = rendered_files(assembly, run_directory(assembly.run.config), None)
    texts = {path.name: text.splitlines() for path, text in files.items()}
    for key in ("model", "data", "train", "checkpoint", "output_dir", "cluster"):
        for entry in explain_key(assembly, key):
            for place in entry["places"]:
                assert texts[place["file"]][place["line"] - 1].strip() == place["text"]


def test_a_value_is_followed_into_the_files_other_tools_read(assembly: Assembly) -> None:
    entry = explained(assembly, "train.precision")
    assert (entry["key"], entry["value"]) == ("train.precision", '"bf16"')
    assert "bf16 where the GPU has it" in entry["meaning"]
    texts = [f"{place['file']}: {place['text']}" for place in entry["places"]]
    for line in (
        "config.yaml: precision: bf16",
        'plan.json: "precision": "bf16",',
        "accelerate.yaml: mixed_precision: bf16",
    ):
        assert line in texts
    greeting = explained(assembly, "cluster.env.GREETING")
    assert any(place["file"] == "launch.sh" and "good day" in place["text"] for place in greeting["places"])


def test_a_section_is_each_key_in_it(assembly: Assembly) -> None:
    assert [entry["key"] for entry in explain_key(assembly, "checkpoint")] == [
        "checkpoint.every",
        "checkpoint.keep",
    ]
    overrides = {entry["key"]: entry for entry in explain_key(assembly, "model.overrides")}
    assert overrides["model.overrides.n_layer"]["value"] == "2"
    assert "own config" in overrides["model.overrides.n_layer"]["meaning"]


def test_every_key_has_a_meaning_and_a_place(assembly: Assembly) -> None:
    keys = [*assembly.run.origins, *(f"cluster.{key}" for key in assembly.cluster.origins)]
    for key in keys:
        for entry in explain_key(assembly, key):
            assert entry["meaning"], key
            assert entry["places"], key


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.batchsize", "train.batch_size"),
        ("cluster.gpu_per_node", "cluster.gpus_per_node"),
        ("every", "checkpoint.every"),
    ],
)
def test_a_key_that_does_not_exist(assembly: Assembly, key: str, near: str) -> None:
    with pytest.raises(RequestError, match=f"{key} is not a key") as refused:
        explain_key(assembly, key)
    assert near in (refused.value.hint or "")
    with pytest.raises(RequestError) as far:
        explain_key(assembly, "zzz")
    assert "launcher explain RUN train" in (far.value.hint or "")
