"""Which fast paths a model takes: the worker tries it, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.config.load import load_cluster, load_run
from launcher.config.models import find_model
from launcher.config.schema import ModelSection
from launcher.errors import LauncherError
from launcher.plan.fast import every_path
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
    command = [sys.executable, "-m", "launcher.worker.doctor"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise LauncherError(f"{source} could not be tried: {done.stderr.strip()[-500:]}")
    return [Check(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _asked(source: str, cluster: Path | None) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        assembly = assemble(load_run(path, []), load_cluster(cluster), find_machine())
        model, plan = assembly.model.config, assembly.plan
        return {"model": dict(model), "fast": asdict(plan.fast), "block_size": plan.block_size}
    if RunDirectory(path).orders.is_file():
        orders = RunDirectory(path).read_orders()
        plan = orders.plan
        return {"model": dict(orders.model), "fast": asdict(plan.fast), "block_size": plan.block_size}
    config = find_model(ModelSection(name=source)).config
    positions = config.get("max_position_embeddings", config.get("n_positions", BLOCK_SIZE))
    return {
        "model": dict(config),
        "fast": asdict(every_path()),
        "block_size": min(BLOCK_SIZE, positions) if isinstance(positions, int) else BLOCK_SIZE,
    }
