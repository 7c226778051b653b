"""Where each key ends up: for every key of the configuration, the rendered places that carry it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

PLAN, ACCELERATE, LAUNCH = "plan.json", "accelerate.yaml", "launch.sh"

CARRIES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "name": ((PLAN, "plan.name"),),
    "model.name": ((PLAN, "model"), (PLAN, "weights"), (PLAN, "plan.parameters"), (PLAN, "plan.memory")),
    "model.init": ((PLAN, "weights"),),
    "model.tokenizer": ((PLAN, "store"), (PLAN, "plan.parameters"), (PLAN, "plan.memory")),
    "model.overrides": ((PLAN, "model"), (PLAN, "plan.parameters"), (PLAN, "plan.memory")),
    "data.train": ((PLAN, "store"), (PLAN, "plan.blocks")),
    "data.validation": ((PLAN, "store"), (PLAN, "plan.blocks"), (PLAN, "plan.eval_every")),
    "data.format": ((PLAN, "store"),),
    "data.sample_by": ((PLAN, "store"), (PLAN, "plan.blocks")),
    "data.text_field": ((PLAN, "store"),),
    "data.block_size": (
        (PLAN, "plan.block_size"),
        (PLAN, "plan.steps"),
        (PLAN, "plan.blocks"),
        (PLAN, "plan.memory"),
    ),
    "data.packing": ((PLAN, "plan.blocks"),),
    "data.cache_dir": ((PLAN, "store"),),
    "train.batch_size": ((PLAN, "plan.batch"), (PLAN, "plan.steps")),
    "train.tokens": ((PLAN, "plan.steps"), (PLAN, "plan.warmup_steps")),
    "train.steps": ((PLAN, "plan.steps"), (PLAN, "plan.warmup_steps")),
    "train.epochs": ((PLAN, "plan.steps"), (PLAN, "plan.warmup_steps")),
    "train.warmup": ((PLAN, "plan.warmup_steps"),),
    "train.precision": ((PLAN, "plan.precision"), (PLAN, "plan.memory"), (ACCELERATE, "mixed_precision")),
    "train.gradient_checkpointing": ((PLAN, "plan.gradient_checkpointing"), (PLAN, "plan.memory")),
    "train.strategy": ((PLAN, "plan.strategy"), (ACCELERATE, "distributed_type")),
    "train.micro_batch": ((PLAN, "plan.batch"), (PLAN, "plan.memory")),
    "train.compile": ((PLAN, "plan.compile"),),
    "train.eval_every": ((PLAN, "plan.eval_every"),),
    "checkpoint.every": ((PLAN, "plan.checkpoint_every"),),
    "output_dir": ((LAUNCH, ""),),
    "cluster.name": ((PLAN, "plan.cluster"),),
    "cluster.nodes": ((PLAN, "plan.nodes"), (ACCELERATE, "num_machines")),
    "cluster.gpus_per_node": (
        (PLAN, "plan.ranks_per_node"),
        (PLAN, "plan.batch"),
        (PLAN, "plan.threads_per_rank"),
        (ACCELERATE, "num_processes"),
        (ACCELERATE, "distributed_type"),
    ),
    "cluster.gpu": (
        (PLAN, "plan.gpu"),
        (PLAN, "plan.device"),
        (PLAN, "plan.precision"),
        (ACCELERATE, "use_cpu"),
        (ACCELERATE, "mixed_precision"),
    ),
    "cluster.env": ((LAUNCH, ""),),
}
"""Key to (file, dotted path in it), besides `config.yaml` or `cluster.yaml`, which carry every key.
A key that is not here is read by the worker from `config.yaml` itself."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a rendered file; `line` counts from 1."""

    file: str
    line: int
    text: str


def places(key: str, files: Mapping[str, str]) -> list[Place]:
    """Every line of the rendered `files` (name to text) that carries `key`.

    `key` is dotted, a cluster's key with `cluster.` before it.
    """
    own = (
        ("cluster.yaml", key.removeprefix("cluster.")) if key.startswith("cluster.") else ("config.yaml", key)
    )
    found = []
    for name, path in (own, *CARRIES.get(_carried(key), ())):
        if name == LAUNCH:
            lines = [number for number, text in enumerate(files[name].splitlines(), 1) if _sets(text, key)]
        else:
            lines = list(_find(files[name], path.split(".")))
        found += [Place(name, number, files[name].splitlines()[number - 1].strip()) for number in lines]
    return found


def _carried(key: str) -> str:
    """The entry of `CARRIES` for a key, which may stand inside an open section: `model.overrides.n_layer`."""
    return next((known for known in CARRIES if key == known or key.startswith(f"{known}.")), key)


def _sets(line: str, key: str) -> bool:
    return line.startswith("export " if key.startswith("cluster.env") else "exec ")


def _find(text: str, path: list[str]) -> Iterator[int]:
    """The line at a dotted path, or every line inside the section that stands there.

    JSON is YAML, so one parser reads both.
    """
    node = yaml.compose(text, Loader=yaml.CSafeLoader)
    line = 1
    for part in path:
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        match = next(((key, value) for key, value in entries if key.value == part), None)
        if match is None:
            return
        line, node = match[0].start_mark.line + 1, match[1]
    yield from _leaves(node, line)


def _leaves(node: yaml.Node | None, line: int) -> Iterator[int]:
    if not isinstance(node, yaml.MappingNode) or not node.value:
        yield line
        return
    for key, value in node.value:
        yield from _leaves(value, key.start_mark.line + 1)
