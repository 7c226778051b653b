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


def render_launch(run_directory: str, environment: Mapping[str, str], *, nodes: int) -> str:
    """A shell script that sets the cluster's `environment` and starts the ranks of one node, all quoted.

    With several `nodes` it is run on each of them, and told which one it is and where they meet.
    """
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    command = [shlex.quote(word) for word in launch_command(run_directory)]
    if nodes > 1:
        usage = f"usage: launch.sh NODE HOST PORT, on each node: NODE from 0 to {nodes - 1}, HOST is node 0"
        exports = [f"# {usage}", f'[ $# -eq 3 ] || {{ echo "{usage}" >&2; exit 2; }}', *exports]
        command[2:2] = ["--machine_rank", '"$1"', "--main_process_ip", '"$2"', "--main_process_port", '"$3"']
    return "\n".join(["#!/bin/sh", "set -eu", *exports, f"exec {' '.join(command)}", ""])
