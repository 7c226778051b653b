"""Whether a store is what its manifest says: files that are missing, short or changed, set aside."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.data.layout import find_damaged
from launcher.data.store import TOKENIZER_FOLDER, Manifest, read_manifest, size_problem
from launcher.durable import Mark, mark_of
from launcher.errors import MachineError

DAMAGED = ".damaged"  # ends the name of a file that was set aside


@dataclass(frozen=True, slots=True)
class Damage:
    """A file of a store that is not what the manifest says. `shard` is None for the tokenizer's files and for
    a layout, whose folder `file` then is."""

    shard: str | None
    file: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def find_missing(path: Path, manifest: Manifest) -> Iterator[Damage]:
    """Every file that is not there in its full size. Reads none."""
    for name, shard, mark in _files(manifest):
        if problem := size_problem(path / name, mark.size):
            yield Damage(shard, path / name, problem)


def verify_store(path: Path) -> list[Damage]:
    """Every file whose content is not what the manifest says, and every damaged layout. Reads all of them.

    Raises StoreError when the manifest itself is missing or damaged.
    """
    manifest = read_manifest(path)
    damage = {each.file: each for each in find_missing(path, manifest)}
    for name, shard, mark in _files(manifest):
        if path / name not in damage and (problem := _content_problem(path / name, mark)):
            damage[path / name] = Damage(shard, path / name, problem)
    return [*damage.values(), *(Damage(None, folder, reason) for folder, reason in find_damaged(path))]


def set_aside(damage: Sequence[Damage]) -> None:
    """Rename damaged files that are there to `NAME.damaged`: nobody opens them any more, and `prepare`
    finds them missing and makes them again. Whoever has one open reads on. Raises MachineError."""
    for each in damage:
        if each.file.exists():
            aside = each.file.with_name(each.file.name + DAMAGED)
            try:
                if aside.is_dir():
                    shutil.rmtree(aside)
                each.file.replace(aside)
            except OSError as error:
                raise MachineError(
                    f"{each.file} is damaged and cannot be set aside: {error.strerror}",
                    hint="let someone who may write to the store run `launcher data verify`",
                ) from error


def _content_problem(path: Path, mark: Mark) -> str | None:
    try:
        return None if mark_of(path) == mark else "its content has changed (sha256 differs)"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"it cannot be read: {error.strerror}"


def _files(manifest: Manifest) -> Sequence[tuple[str, str | None, Mark]]:
    shards = [(file, shard.name, mark) for shard in manifest.shards for file, mark in shard.marks.items()]
    tokenizer = [
        (f"{TOKENIZER_FOLDER}/{name}", None, mark) for name, mark in manifest.tokenizer_files.items()
    ]
    return [*shards, *tokenizer]
