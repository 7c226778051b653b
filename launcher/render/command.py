"""`launch.sh` and the command in it: what `launcher train` runs, and anyone may run by hand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping


def launch_command(run_directory: str, *, accelerate: str = "accelerate") -> list[str]:
    """The argument vector that starts every rank of one node. `accelerate` is its executable."""
    return [
        accelerate,
        "launch",
        "--config_file",
        f"{run_directory}/accelerate.yaml",
        "-m",
        "launcher.worker",
        run_directory,
    ]


def render_launch(run_directory: str, environment: Mapping[str, str]) -> str:
    """A shell script that sets the cluster's `environment` and starts the ranks, all quoted."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join(
        ["#!/bin/sh", "set -eu", *exports, "exec " + shlex.join(launch_command(run_directory)), ""]
    )
