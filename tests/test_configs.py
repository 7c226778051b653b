"""The example files: they load, they are what `init` writes, and what is rendered from them is not stale.

`scripts/check_configs` has the libraries read every run on every cluster, under every strategy; here, as
`auto` plans it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.load import load_cluster, load_run
from launcher.config.presets import PRESETS, starter_run
from launcher.plan.orders import parse_orders
from scripts.check_configs import Choice, Refused, Rendered, choices, differences, render, table, write_model
from scripts.render_examples import CONFIGS, EXAMPLES, SLURM, Example, place_of, rendered

RENDERED = CONFIGS / "rendered"
REFRESH = "run ./scripts/render_examples, and look at what changed"


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_an_example_renders_to_the_bytes_that_are_kept(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RENDERED / example.name
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    script = place_of(example, "job.sbatch")
    if script.exists():
        kept["job.sbatch"] = script.read_bytes()
    assert {name: text.encode() for name, text in rendered(example).items()} == kept, REFRESH
    assert os.access(folder / "launch.sh", os.X_OK)


def test_no_example_is_left_over() -> None:
    assert {folder.name for folder in RENDERED.iterdir()} == {example.name for example in EXAMPLES}
    scripts = {script.stem for script in SLURM.glob("*.sbatch")}
    assert scripts == {example.name for example in EXAMPLES if "job.sbatch" in rendered(example)}


@pytest.mark.parametrize(
    "file",
    sorted([*RENDERED.rglob("*.*"), *SLURM.glob("*.sbatch")]),
    ids=lambda file: f"{file.parent.name}/{file.name}",
)
def test_no_path_of_a_machine_is_in_an_example(file: Path) -> None:
    for word in file.read_text(encoding="utf-8").split():
        assert word == "#!/bin/bash" or not word.strip("\"',").startswith("/"), word


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


@pytest.fixture(scope="module")
def auto(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Rendered | Refused]:
    """Every run on every cluster, with each offload, as `auto` plans it."""
    folder = tmp_path_factory.mktemp("configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_model(folder)
        return [render(choice) for choice in choices(["auto"])]


def test_the_libraries_read_what_auto_plans(auto: Sequence[Rendered | Refused]) -> None:
    found = [one for one in auto if isinstance(one, Rendered)]
    assert differences(found) == []
    assert {one.choice.run for one in found} == {file.stem for file in (CONFIGS / "runs").iterdir()}
    assert {one.choice.cluster for one in found} == {file.stem for file in (CONFIGS / "clusters").iterdir()}


def test_a_value_that_a_library_reads_otherwise_is_named(auto: Sequence[Rendered | Refused]) -> None:
    sharded, plain = found_in(auto, "gpt2-xl", "8x-a100-40gb"), found_in(auto, "gpt2", "cpu-2-ranks")
    assert isinstance(sharded, Rendered)
    assert isinstance(plain, Rendered)
    assert (sharded.plan.strategy, plain.plan.strategy) == ("zero2", "ddp")
    split = replace(sharded.plan.batch, micro_batch=3, accumulation=5, batch_size=120)
    expected = {
        "a stage": (replace(sharded.plan, strategy="zero3"), {"stage"}),
        "a precision": (replace(sharded.plan, precision="fp16"), {"precision"}),
        "an offload": (replace(sharded.plan, offload="parameters"), {"offload"}),
        "a batch": (
            replace(sharded.plan, batch=split),
            {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"},
        ),
        "a world": (replace(sharded.plan, nodes=2), {"num_machines", "num_processes", "world"}),
        "no engine": (
            replace(sharded.plan, strategy="ddp"),
            {"deepspeed.json", "distributed_type", "mixed_precision", "stage"},
        ),
        "a device": (replace(plain.plan, device="cuda"), {"use_cpu"}),
        "half of it": (replace(plain.plan, precision="bf16"), {"mixed_precision"}),
        "another engine": (
            replace(plain.plan, strategy="fsdp", offload="parameters"),
            {"distributed_type", "offload", "fsdp_version", "fsdp_offload_params"},
        ),
    }
    changed = [
        Rendered(replace(one.choice, run=name), plan, one.files)
        for name, (plan, _) in expected.items()
        for one in (sharded, plain)
        if plan.name == one.plan.name
    ]
    found: dict[str, set[str]] = {name: set() for name in expected}
    for difference in differences(changed):
        found[difference.choice.run].add(difference.what)
    assert found == {name: what for name, (_, what) in expected.items()}


def test_what_deepspeed_refuses_is_said(auto: Sequence[Rendered | Refused]) -> None:
    one = found_in(auto, "gpt2-xl", "8x-a100-40gb")
    assert isinstance(one, Rendered)
    text = one.files["deepspeed.json"].replace('"train_batch_size": 1024', '"train_batch_size": 1000')
    (refused,) = differences([replace(one, files={**one.files, "deepspeed.json": text})])
    assert "1000 != 8 * 16 * 8" in str(refused.read)


def found_in(found: Sequence[Rendered | Refused], run: str, cluster: str) -> Rendered | Refused:
    return next(one for one in found if one.choice == Choice(run, cluster, "auto", "none"))


XL = {
    "1x-h200": "ddp",
    "1x-rtx-4090": "set train.strategy: zero2 and train.offload: optimizer",
    "4x8-h100": "ddp",
    "8x-a100-40gb": "zero2",
    "8x-a100-80gb": "ddp",
    "8x-h100-80gb": "ddp",
    "cpu-2-ranks": "use a GPU with more memory",
    "slurm-cpu": "use a GPU with more memory",
}
"""What gpt2-xl becomes on each cluster: its strategy, or what to do."""

XL_STATE = 16 * 1_557_611_200
"""Bytes of fp32 weights, gradients and AdamW's two moments: what each rank holds that shares nothing."""


@pytest.mark.parametrize("cluster", sorted(file.stem for file in (CONFIGS / "clusters").glob("*.yaml")))
def test_gpt2_xl_is_planned_sensibly_or_told_what_to_do(
    auto: Sequence[Rendered | Refused], cluster: str
) -> None:
    found = found_in(auto, "gpt2-xl", cluster)
    if isinstance(found, Refused):
        assert found.remedy.startswith(XL[cluster])
        return
    plan = found.plan
    assert plan.strategy == XL[cluster]
    assert plan.memory is not None
    assert plan.memory_available is not None
    assert plan.forecast is not None
    assert sum(plan.memory.values()) <= 0.9 * plan.memory_available
    assert plan.strategy != "ddp" or sum(plan.memory.values()) > XL_STATE
    assert plan.batch.batch_size == 1024
    # 6 FLOP for each parameter and token at the least, and no GPU is faster than its peak.
    assert plan.peak_flops is not None
    least = 6 * 1_557_611_200 * 31e9 / (plan.peak_flops * plan.batch.world_size) / 3600
    assert least < (plan.forecast.hours or 0) < 4 * least


def test_what_gpt2_xl_is_told_to_do_works(auto: Sequence[Rendered | Refused]) -> None:
    refused = found_in(auto, "gpt2-xl", "1x-rtx-4090")
    offloaded = render(replace(refused.choice, strategy="zero2", offload="optimizer"))
    assert isinstance(offloaded, Rendered)
    assert offloaded.plan.host_memory > 0


def test_no_path_of_this_machine_is_in_the_table(auto: Sequence[Rendered | Refused]) -> None:
    lines = table(auto)
    assert len(lines) == 1 + len(XL) * len(list((CONFIGS / "runs").iterdir()))
    assert not any("/" in line for line in lines)
