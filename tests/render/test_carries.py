"""The table of places against what really changes in the rendered files when a key changes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.config.document import dotted
from launcher.config.keys import leaves
from launcher.config.load import Loaded, load_cluster, load_run
from launcher.config.rules import CLUSTER_NOT_YET
from launcher.config.schema import ClusterConfig, RunConfig
from launcher.plan.choose import Blocks
from launcher.render.carries import CARRIES, places
from launcher.run.assemble import Prepared, assemble, rendered_files
from launcher.run.directory import RunDirectory, run_directory
from launcher.run.machine import Machine
from tests.conftest import small_run, write_json

MACHINE = Machine("node", 8, 2**34, (), None)
PREPARED = Prepared(Path("/stores/0123"), 300, Blocks(4000, 256_000, 100))
FILES = ("config.yaml", "cluster.yaml", "plan.json", "accelerate.yaml", "launch.sh")

ANOTHER: Mapping[str, object] = {
    "name": "another",
    "model.name": "model",
    "model.init": "pretrained",
    "model.tokenizer": {"train": {"vocab_size": 400}},
    "model.overrides": {"n_layer": 3},
    "data.train": ["other.txt"],
    "data.validation": 0,
    "data.format": "text",
    "data.sample_by": "document",
    "data.text_field": "body",
    "data.block_size": 32,
    "data.packing": "pad",
    "data.cache_dir": "/elsewhere",
    "train.batch_size": 16,
    "train.tokens": 100_000,
    "train.steps": 200,
    "train.epochs": 3,
    "train.learning_rate": 0.01,
    "train.schedule": "linear",
    "train.warmup": 0.5,
    "train.weight_decay": 0.2,
    "train.betas": [0.8, 0.99],
    "train.max_grad_norm": 2,
    "train.precision": "bf16",
    "train.gradient_checkpointing": True,
    "train.strategy": "ddp",
    "train.micro_batch": 2,
    "train.compile": True,
    "train.eval_every": "30min",
    "train.log_every": 5,
    "train.early_stopping": {"patience": 3},
    "train.metrics": ["mine:accuracy"],
    "train.callbacks": ["mine:Stop"],
    "train.extra": {"group_by_length": True},
    "checkpoint.every": "30min",
    "checkpoint.keep": 3,
    "report_to": ["tensorboard"],
    "push_to_hub": "user/name",
    "seed": 7,
    "output_dir": "elsewhere",
}
ANOTHER_CLUSTER: Mapping[str, object] = {
    "name": "elsewhere",
    "gpus_per_node": 4,
    "gpu": "v100-sxm-32gb",
    "env": {"TOKENIZERS_PARALLELISM": "false"},
}
NO_OTHER_VALUE = frozenset({"data.isolate_documents", "data.mode", "train.offload"})
"""Keys of a run that have one value in this version."""

def rendered(folder: Path, run: Mapping[str, object], cluster: Mapping[str, object]) -> dict[str, str]:
    """Every rendered file, name to text."""
    write_json(folder / "run.yaml", run)
    write_json(folder / "cluster.yaml", cluster)
    loaded = load_run(folder / "run.yaml")
    assembly = assemble(loaded, load_cluster(folder / "cluster.yaml"), MACHINE, PREPARED)
    files = rendered_files(assembly, run_directory(loaded.config), PREPARED)
    return {path.name: text for path, text in files.items()}
