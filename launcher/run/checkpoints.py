"""The ledger of checkpoints: commit, verify, set aside, latest good.

A checkpoint is written under a temporary name. Its files are sized and hashed, `MANIFEST.json` is
written last, and the folder is renamed: a folder named `step-NNNNNNNN` with a manifest that verifies
is a checkpoint, and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RequestError, TrainingError

MANIFEST = "MANIFEST.json"
STATE = "launcher.json"
"""In a checkpoint: what launcher itself must know to go on."""
VERSION = 1
FOLDERS = "step-" + 8 * "[0-9]"
"""What a committed checkpoint's folder is called."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint's folder and what its manifest says; `bytes` counts all its files."""

    folder: Path
    step: int
    samples: int
    world_size: int
    created: float
    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def state(self) -> dict[str, Any]:
        """What launcher itself noted in it."""
        noted: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return noted

    def damage(self) -> list[str]:
        """What is wrong with each file that is missing or not what was written; empty: all good."""
        found = []
        for name, (size, digest) in self.files.items():
            file = self.folder / name
            if not file.is_file():
                found.append(f"{name} is missing")
            elif file.stat().st_size != size:
                found.append(f"{name} has {file.stat().st_size} bytes, {size} were written")
            elif _sha256(file) != digest:
                found.append(f"{name} does not have the hash it was written with")
        return found


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what a crash left there is removed."""
    temporary = checkpoints / f".step-{step:08d}.writing"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, *, step: int, samples: int, world_size: int, created: float) -> Checkpoint:
    """Make the checkpoint in `temporary` the one of `step`: hash, manifest, fsync, rename.

    One of the same step that is there already (the run went back and came here again) is replaced.
    """
    files = {}
    for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
        _fsync(file)
        files[file.relative_to(temporary).as_posix()] = (file.stat().st_size, _sha256(file))
    final = temporary.with_name(f"step-{step:08d}")
    manifest = {
        "version": VERSION,
        "step": step,
        "samples": samples,
        "world_size": world_size,
        "created": created,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
    }
    with (temporary / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    _fsync(temporary)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    _fsync(final.parent)
    return Checkpoint(final, step, samples, world_size, created, files)


def committed(checkpoints: Path) -> list[Checkpoint]:
    """Every folder with a readable manifest, oldest step first; not verified."""
    found = [_read(folder) for folder in checkpoints.glob(FOLDERS)]
    return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda each: each.step)


def latest_good(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None."""
    return next((each for each in reversed(committed(checkpoints)) if not each.damage()), None)


def good_at(checkpoints: Path, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that verifies. Raises RequestError where there is none, and
    TrainingError for one that is damaged."""
    if step is None:
        newest = latest_good(checkpoints)
        if newest is None:
            raise RequestError(f"{checkpoints} has no good checkpoint", hint="`launcher train` makes them")
        return newest
    found = {each.step: each for each in committed(checkpoints)}
    if step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise RequestError(f"there is no checkpoint of step {step}", hint=f"there are: {there}")
    if damage := found[step].damage():
        raise TrainingError(
            f"the checkpoint of step {step} is damaged: {'; '.join(damage)}", hint="name another step"
        )
    return found[step]


def set_aside_damaged(checkpoints: Path, newer_than: int) -> list[tuple[str, str]]:
    """Move everything newer than step `newer_than` out of the way, into `quarantine/`.

    After `latest_good` has chosen a step, what is newer is damaged or unfinished. Returns each
    folder's name and what is wrong with it.
    """
    moved = []
    for folder in sorted(checkpoints.glob(FOLDERS)):
        if int(folder.name.removeprefix("step-")) <= newer_than:
            continue
        checkpoint = _read(folder)
        reason = f"no readable {MANIFEST}" if checkpoint is None else "; ".join(checkpoint.damage())
        target = _free_name(checkpoints / "quarantine" / folder.name)
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
        moved.append((folder.name, reason))
    return moved


def prune(checkpoints: Path, *, keep: int, protect: Collection[int]) -> None:
    """Delete all but the newest `keep`, and those of the steps in `protect`. Call after a commit."""
    for checkpoint in committed(checkpoints)[:-keep]:
        if checkpoint.step not in protect:
            _remove(checkpoint.folder)


def _read(folder: Path) -> Checkpoint | None:
    try:
        fields: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in fields["files"].items()}
        return Checkpoint(
            folder, fields["step"], fields["samples"], fields["world_size"], fields["created"], files
        )
    except (
        FileNotFoundError,
        NotADirectoryError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
    ):
        return None


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves nothing that looks like one."""
    doomed = _free_name(folder.with_name(f".{folder.name}.deleting"))
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
