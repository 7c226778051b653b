"""What a run was made with: `environment.json`."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from launcher.config.secrets import secret_in
from launcher.run.machine import Machine

PACKAGES = (
    "launcher",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "tokenizers",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "fsspec",
    "pydantic",
    "tensorboard",
)
DIFF_CHARACTERS = 1 << 20
"""A working tree's diff is kept up to this length."""


def versions() -> dict[str, str | None]:
    """The installed version of each package a run depends on; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_environment(machine: Machine, folder: Path) -> str:
    """The text of `environment.json`: versions, this machine, and the git state of `folder`."""
    commit = _git(folder, "rev-parse", "HEAD")
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "host": machine.hostname,
        "cores": machine.cores,
        "memory_bytes": machine.memory,
        "gpus": [gpu.nvml_name for gpu in machine.gpus],
        "driver": machine.driver,
        "git": commit
        and {"commit": commit.strip(), "diff": _without_secrets(_git(folder, "diff", "HEAD") or "")},
    }
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def _without_secrets(diff: str) -> str:
    """A diff cut to DIFF_CHARACTERS, less each line that looks as if it held a token or a password."""
    lines = diff[:DIFF_CHARACTERS].split("\n")
    left_out = "(left out: it looks like a secret)"
    return "\n".join(line[:1] + left_out if secret_in(line) else line for line in lines)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None outside a repository and where there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
