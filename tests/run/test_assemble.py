"""The hardware that a cluster file names, in each way that it can name it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.load import load_cluster, load_run
from launcher.config.presets import starter_run
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError, MachineError, RequestError, RunDirectoryError
from launcher.plan.choose import Plan
from launcher.run.assemble import Assembly, assemble, find_place, going_on, rendered_files
from launcher.run.checkpoints import begin, commit
from launcher.run.directory import RunDirectory, run_directory, write_files
from launcher.run.explain import explain_key
from launcher.run.machine import FoundGPU, Machine

BARE = Machine("node", 8, 2**34, (), None)
H200 = FoundGPU(0, "GPU-aa", "NVIDIA H200", 143_771 * 2**20, "h200-sxm-141gb")
A100 = "{name: mine, memory_gb: 80, bf16_tflops: 312, bandwidth_gbs: 2039, link_gbs: 300}"
"""An A100 80GB (SXM) by its datasheet."""


def planned(folder: Path, gpu: str, gpus: int = 8) -> Plan:
    (folder / "run.yaml").write_text(starter_run("gpt2", "gpt2"))
    (folder / "cluster.yaml").write_text(f"gpus_per_node: {gpus}\ngpu: {gpu}\n")
    return assemble(load_run(folder / "run.yaml"), load_cluster(folder / "cluster.yaml"), BARE).plan


def drafted(folder: Path, *overrides: str) -> Assembly:
    (folder / "run.yaml").write_text(starter_run("gpt2", "gpt2"))
    (folder / "cluster.yaml").write_text("gpus_per_node: 8\ngpu: h100-sxm-80gb\n")
    return assemble(load_run(folder / "run.yaml", overrides), load_cluster(folder / "cluster.yaml"), BARE)


def begun(folder: Path, *overrides: str) -> RunDirectory:
    """A run with a checkpoint at step 10."""
    first = drafted(folder, *overrides)
    directory = run_directory(first.run.config)
    write_files(rendered_files(first, directory, None).items())
    temporary = begin(directory.checkpoints, 10)
    commit(temporary, step=10, samples=5120, world_size=8, created=0.0)
    return directory


def test_a_run_of_another_configuration_is_planned_as_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` would refuse it under this name; it does not go on from a checkpoint of something else."""
    monkeypatch.chdir(tmp_path)
    directory = begun(tmp_path, "train.strategy=zero2", "train.steps=10")
    said: list[str] = []
    same = drafted(tmp_path, "train.strategy=zero2", "train.steps=10")
    assert going_on(same, said.append).plan.samples == 5120
    assert said == []
    other = drafted(tmp_path, "train.strategy=zero1", "train.steps=10")
    assert going_on(other, said.append).plan.strategy == "zero1"
    assert said == [f"{directory.root} has begun with another train.strategy: this is the plan of a new run"]


def test_a_run_that_streams_is_not_cut_short_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begun(tmp_path, "data.mode=stream", "train.steps=20")
    going_on(drafted(tmp_path, "data.mode=stream", "train.steps=30"), print)
    with pytest.raises(RunDirectoryError, match="was planned for 20 steps, and 5 are asked for"):
        going_on(drafted(tmp_path, "data.mode=stream", "train.steps=5"), print)


def test_a_node_s_memory_is_this_machine_s_where_it_may_be_the_node() -> None:
    described = ClusterConfig.model_validate({"gpu": "h200-sxm-141gb", "gpus_per_node": 1})
    assert find_place(described, BARE).memory is None
    assert find_place(described, replace(BARE, gpus=(H200,))).memory == BARE.memory
    assert find_place(ClusterConfig.model_validate({"gpu": "cpu"}), BARE).memory == BARE.memory


def test_auto_is_what_is_found() -> None:
    auto = ClusterConfig.model_validate({})
    assert find_place(auto, BARE).is_cpu
    found = find_place(auto, replace(BARE, gpus=(H200,)))
    assert (found.gpu.name, found.gpu.memory) == ("h200-sxm-141gb", H200.memory)


def test_a_described_gpu_is_planned_for_as_the_catalogue_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine, known = planned(tmp_path, A100), planned(tmp_path, "a100-sxm-80gb")
    assert known.peak_flops == 312e12
    assert known.forecast is not None
    assert mine == replace(known, gpu="mine")


def test_a_gpu_by_itself_needs_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    without = A100.replace(", link_gbs: 300", "")
    assert planned(tmp_path, without).forecast is None
    alone = planned(tmp_path, without, gpus=1)
    assert alone.forecast is not None
    assert alone == planned(tmp_path, A100, gpus=1)


def test_memory_alone_says_what_fits_and_not_how_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(tmp_path, "{name: mine, memory_gb: 24.5}")
    assert plan.memory_available == 24_500_000_000
    assert plan.memory is not None
    assert 0 < sum(plan.memory.values()) < plan.memory_available
    assert (plan.peak_flops, plan.forecast) == (None, None)


def test_each_figure_is_explained_by_the_line_it_was_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(starter_run("gpt2", "gpt2"))
    (tmp_path / "cluster.yaml").write_text("gpus_per_node: 8\ngpu:\n  name: mine\n  memory_gb: 48\n")
    run, cluster = load_run(tmp_path / "run.yaml"), load_cluster(tmp_path / "cluster.yaml")
    (found,) = explain_key(assemble(run, cluster, BARE), "cluster.gpu.memory_gb")
    assert (found["value"], found["set_by"]) == ("48.0", "cluster.yaml:4")
    assert any('"memory_available": 48000000000' in place["text"] for place in found["places"])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("name", "./nosuch", "no model in "),
        ("name", "./broken", r"config\.json cannot be read"),
        ("tokenizer", "nosuch/", "no tokenizer in "),
    ],
)
def test_a_model_that_is_not_there_is_said_with_its_key_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    run = {"name": "r", "model": {"name": "gpt2", key: value}, "data": {"train": ["a"]}}
    (tmp_path / "run.yaml").write_text(json.dumps({**run, "train": {"batch_size": 8, "steps": 1}}))
    with pytest.raises(RequestError, match=says) as refused:
        assemble(load_run(tmp_path / "run.yaml"), load_cluster(None), BARE)
    assert refused.value.message.endswith(f"(model.{key}, run.yaml:1)")


def test_gpus_that_cannot_be_counted_are_asked_for_where_they_are_missing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(starter_run("gpt2", "gpt2"))
    (tmp_path / "cluster.yaml").write_text("gpu: t4-16gb\ngpus_per_node: auto\n")
    with pytest.raises(MachineError) as lacking:
        assemble(load_run(tmp_path / "run.yaml"), load_cluster(tmp_path / "cluster.yaml"), BARE)
    assert lacking.value.message.endswith("it has none (cluster.yaml:2)")


def test_what_does_not_depend_on_each_other_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        drafted(tmp_path, "model.overrides.n_leyer=3", "train.batch_size=7")
    model, batch = caught.value.faults
    assert (model.path, model.place) == ("model.overrides.n_leyer", "override model.overrides.n_leyer=3")
    assert str(batch) == "train.batch_size: 7 does not divide over 8 ranks (override train.batch_size=7)"
    assert "set train.batch_size to 8" in (batch.hint or "")


def test_a_model_and_a_machine_that_are_not_there_are_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(starter_run("gpt2", "gpt2"))
    (tmp_path / "cluster.yaml").write_text("gpu: t4-16gb\ngpus_per_node: auto\n")
    run = load_run(tmp_path / "run.yaml", ["model.name=./nosuch"])
    with pytest.raises(ConfigError) as caught:
        assemble(run, load_cluster(tmp_path / "cluster.yaml"), BARE)
    places = [(fault.path, fault.place) for fault in caught.value.faults]
    assert places == [
        ("model.name", "override model.name=./nosuch"),
        ("cluster.gpus_per_node", "cluster.yaml:2"),
    ]
