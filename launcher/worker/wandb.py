"""Where wandb keeps what a rank reports to it, and as which of its runs."""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping
from pathlib import Path

from launcher.run.directory import RunDirectory, write_text


def keep_in_folder(directory: RunDirectory, environment: MutableMapping[str, str]) -> None:
    """Have wandb write to the run's folder, unless the user names another, or has settings where launcher is
    started: those would no longer be read."""
    if not Path("wandb", "settings").exists():
        environment.setdefault("WANDB_DIR", str(directory.root))


def go_on_in_its_run(directory: RunDirectory, environment: MutableMapping[str, str]) -> None:
    """Have every attempt report to one run of wandb's: the user's, or the one that the first one began."""
    if not environment.get("WANDB_RUN_ID"):
        if not directory.wandb_run.exists():
            write_text(directory.wandb_run, secrets.token_hex(4))
        environment["WANDB_RUN_ID"] = directory.wandb_run.read_text(encoding="utf-8")
    environment.setdefault("WANDB_RESUME", "allow")
