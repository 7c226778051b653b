"""Which fast paths a model takes: the worker tries it, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.config.load import load_cluster, load_run
from launcher.config.models import find_model
from launcher.config.schema import DataSection, ModelSection
from launcher.errors import LauncherError, RequestError
from launcher.plan.fast import Fast, every_path
from launcher.run.assemble import assemble
from launcher.run.checks import Check
from launcher.run.directory import RunDirectory
from launcher.run.machine import find_machine

BLOCK_SIZE = 1024
"""Tokens in a block where only a model is named."""


def examine_model(source: str, cluster: Path | None) -> list[Check]:
    """The checks of a run.yaml (planned on `cluster`), a run's folder, or a model named as in model.name.

    Raises what reading and planning it raises; LauncherError where the worker cannot try it.
    """
    asked = json.dumps(_asked(source, cluster))
    command = [sys.executable, "-P", "-m", "launcher.worker.doctor"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise LauncherError(f"{source} could not be tried: {done.stderr.strip()[-500:]}")
    return [Check(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _asked(source: str, cluster: Path | None) -> dict[str, Any]:
    if not source:
        raise RequestError("--model is empty", hint="name a run.yaml, a run's folder or a model")
    path = Path(source)
    if path.is_file():
        assembly = assemble(load_run(path, []), load_cluster(cluster), find_machine())
        return _as_json(assembly.model.config, assembly.plan.fast, assembly.run.config.data)
    directory = RunDirectory(path)
    if directory.orders.is_file():
        orders = directory.read_orders()
        return _as_json(orders.model, orders.plan.fast, directory.read_config().data)
    config = find_model(ModelSection(name=source)).config
    positions = config.get("max_position_embeddings", config.get("n_positions", BLOCK_SIZE))
    block_size = min(BLOCK_SIZE, positions) if isinstance(positions, int) else BLOCK_SIZE
    return _as_json(config, every_path(), DataSection(train=[source], block_size=block_size))


def _as_json(model: Mapping[str, Any], fast: Fast, data: DataSection) -> dict[str, Any]:
    return {"model": dict(model), "fast": asdict(fast), "data": data.model_dump(mode="json")}
