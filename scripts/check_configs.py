"""Every run of configs/ on every cluster of configs/, under every strategy, read by the libraries themselves.

./scripts/check_configs

What is rendered is read by accelerate's own parser and, on a rank of the plan's world, by DeepSpeed's, and
held against the plan. Prints what `auto` plans for each run on each cluster, or the first remedy where it is
refused; for finetune.yaml, with a tiny model. Exit code 1 if anything is read otherwise than it was planned.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.config.config_args import load_config_from_file

from launcher.config.load import load_cluster, load_run
from launcher.config.presets import PRESETS
from launcher.config.rules import OFFLOADS
from launcher.errors import LauncherError
from launcher.plan.choose import Plan
from launcher.run.assemble import assemble, rendered_files
from launcher.run.directory import run_directory
from scripts.deepspeed_reads import deepspeed_reads
from scripts.render_examples import CONFIGS, MACHINE

STAGES: Mapping[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3}
ON_HOST: Mapping[str, list[str | None]] = {
    "none": [None, None],
    "optimizer": ["cpu", None],
    "parameters": ["cpu", "cpu"],
}
"""Where DeepSpeed is to keep the optimizer and the parameters; None: on the GPU."""


@dataclass(frozen=True)
class Choice:
    """A run on a cluster, and what is asked of it."""

    run: str
    cluster: str
    strategy: str
    offload: str

    def __str__(self) -> str:
        return f"{self.run} on {self.cluster}, {self.strategy}, offload {self.offload}"


@dataclass(frozen=True)
class Rendered:
    """What a choice becomes; `files` by name."""

    choice: Choice
    plan: Plan
    files: Mapping[str, str]


@dataclass(frozen=True)
class Refused:
    """A choice that cannot be; `remedy`: the first thing to do about it."""

    choice: Choice
    remedy: str


@dataclass(frozen=True)
class Difference:
    """A value that a library reads otherwise than it was planned."""

    choice: Choice
    what: str
    planned: object
    read: object

    def __str__(self) -> str:
        return f"{self.choice}: {self.what}: planned {self.planned!r}, read {self.read!r}"


def choices(strategies: Iterable[str]) -> list[Choice]:
    """Each run of configs/ on each cluster, under each strategy with each offload that it can have."""
    runs, clusters = (
        sorted(file.stem for file in (CONFIGS / kind).glob("*.yaml")) for kind in ("runs", "clusters")
    )
    return [
        Choice(run, cluster, strategy, offload)
        for run in runs
        for cluster in clusters
        for strategy in strategies
        for offload in OFFLOADS[strategy]
    ]


def write_model(folder: Path) -> None:
    """The model that configs/runs/finetune.yaml starts from, as far as a plan looks at it."""
    small = {"n_layer": 2, "n_head": 2, "n_embd": 32}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({**PRESETS["gpt2"].config(), **small}))


def render(choice: Choice) -> Rendered | Refused:
    """Plan and render, in the current folder, without writing anything."""
    overrides = [f"train.strategy={choice.strategy}", f"train.offload={choice.offload}"]
    try:
        run = load_run(CONFIGS / "runs" / f"{choice.run}.yaml", overrides)
        cluster = load_cluster(CONFIGS / "clusters" / f"{choice.cluster}.yaml")
        assembly = assemble(run, cluster, MACHINE)
    except LauncherError as error:
        return Refused(choice, re.split("[,;] or ", error.hint or error.message)[0])
    files = rendered_files(assembly, run_directory(run.config), None)
    return Rendered(choice, assembly.plan, {path.name: text for path, text in files.items()})


def differences(found: Sequence[Rendered]) -> list[Difference]:
    """Whatever accelerate or DeepSpeed reads otherwise than it was planned."""
    sharded = [one for one in found if "deepspeed.json" in one.files]
    read = deepspeed_reads([(one.files["deepspeed.json"], one.plan.batch.world_size) for one in sharded])
    return [
        *(difference for one in found for difference in _apart(one, _by_accelerate(one))),
        *(
            difference
            for one, fields in zip(sharded, read, strict=True)
            for difference in _apart(one, _by_deepspeed(one.plan, fields))
        ),
    ]


Compared = Iterator[tuple[str, object, object]]
"""What it is, what was planned, what was read."""


def _apart(one: Rendered, compared: Compared) -> Iterator[Difference]:
    return (Difference(one.choice, *each) for each in compared if each[1] != each[2])


def _by_accelerate(one: Rendered) -> Compared:
    plan = one.plan
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "accelerate.yaml")
        file.write_text(one.files["accelerate.yaml"], encoding="utf-8")
        read = vars(load_config_from_file(str(file)))
    if one.choice.strategy != "auto":
        yield "strategy", one.choice.strategy, plan.strategy
    yield "offload", one.choice.offload, plan.offload
    yield "deepspeed.json", plan.strategy in STAGES, "deepspeed.json" in one.files
    yield "num_machines", plan.nodes, read["num_machines"]
    yield "num_processes", plan.nodes * plan.ranks_per_node, read["num_processes"]
    if plan.strategy in STAGES:
        yield "distributed_type", "DEEPSPEED", read["distributed_type"]
        yield "deepspeed_config_file", "deepspeed.json", _file_name(read["deepspeed_config"])
        return
    yield "mixed_precision", {"fp32": "no"}.get(plan.precision, plan.precision), read["mixed_precision"]
    if plan.strategy == "fsdp":
        yield "distributed_type", "FSDP", read["distributed_type"]
        fsdp = read["fsdp_config"]
        yield "fsdp_version", 2, fsdp.get("fsdp_version")
        yield "fsdp_offload_params", plan.offload == "parameters", fsdp.get("fsdp_offload_params")
        return
    alone = plan.nodes * plan.ranks_per_node == 1
    yield "distributed_type", "NO" if alone else "MULTI_GPU", read["distributed_type"]
    yield "use_cpu", plan.device == "cpu", read["use_cpu"]


def _file_name(section: Mapping[str, str]) -> str:
    return Path(section.get("deepspeed_config_file", "")).name


def _by_deepspeed(plan: Plan, read: Mapping[str, Any]) -> Compared:
    if "refused" in read:
        yield "deepspeed.json", "read", read["refused"]
        return
    batch = plan.batch
    yield "stage", STAGES.get(plan.strategy), read["stage"]
    yield "offload", ON_HOST[plan.offload], read["offload"]
    yield "world", plan.nodes * plan.ranks_per_node, read["world"]
    yield "train_batch_size", batch.batch_size, read["batch"]
    yield "train_micro_batch_size_per_gpu", batch.micro_batch, read["micro"]
    yield "gradient_accumulation_steps", batch.accumulation, read["accumulation"]
    halves = [precision for precision in ("bf16", "fp16") if read[precision]]
    yield "precision", [] if plan.precision == "fp32" else [plan.precision], halves


def in_words(one: Rendered | Refused) -> str:
    """A plan in a few words, or what to do where there is none."""
    if isinstance(one, Refused):
        return f"no: {one.remedy}"
    plan, batch = one.plan, one.plan.batch
    memory = "" if plan.memory is None else f", {sum(plan.memory.values()) / 2**30:.1f} GiB"
    hours = None if plan.forecast is None else plan.forecast.hours
    time = "" if hours is None else ", seconds" if hours < 1 / 60 else f", {hours:,.3g} h"
    again = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    split = f"{batch.micro_batch} x {batch.accumulation} x {batch.world_size}"
    return f"{plan.strategy}, {plan.precision}, {split}{again}{memory}{time}"


def table(found: Iterable[Rendered | Refused]) -> list[str]:
    """A line for each run on each cluster: what is planned where nothing is asked."""
    auto = [one for one in found if (one.choice.strategy, one.choice.offload) == ("auto", "none")]
    rows = [(one.choice.run, one.choice.cluster, in_words(one)) for one in auto]
    heads = ("run", "cluster", "strategy, precision, micro-batch x accumulation x ranks, memory a rank, time")
    run, cluster = (max(len(row[column]) for row in (heads, *rows)) for column in (0, 1))
    return [f"{row[0]:<{run}}  {row[1]:<{cluster}}  {row[2]}" for row in (heads, *rows)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_model(Path(folder))
        found = [render(choice) for choice in choices(OFFLOADS)]
    rendered = [one for one in found if isinstance(one, Rendered)]
    wrong = differences(rendered)
    refused = len(found) - len(rendered)
    print(*table(found), "", *wrong, sep="\n")
    print(f"{len(rendered)} plans read, {len(wrong)} values otherwise than planned; {refused} plans refused")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
