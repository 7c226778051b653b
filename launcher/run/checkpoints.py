"""The ledger of checkpoints: commit, verify, set aside, latest good.

A checkpoint is written under a temporary name. Its files are sized and hashed, `MANIFEST.json` is
written last, and the folder is renamed: a folder named `step-NNNNNNNN` with a manifest that verifies
is a checkpoint, and nothing else is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.durable import Mark, mark_of, sync, write_whole
from launcher.errors import RequestError, TrainingError
from launcher.sizes import size_in_words

MANIFEST = "MANIFEST.json"
STATE = "launcher.json"
"""In a checkpoint: what launcher itself must know to go on."""
VERSION = 2
"""Of the manifest."""
FOLDERS = "step-" + 8 * "[0-9]"
"""What a committed checkpoint's folder is called."""
REASON = "WHY.txt"
"""In a folder that was set aside: what is wrong with it."""
QUARANTINE = "quarantine"
"""The folder beside the checkpoints that bad ones are moved to."""
REPLACED = ".replaced"
"""How the name ends of a checkpoint that is being replaced by one of the same step."""
THREADS = 4
"""Files hashed, and seen to disk, at a time."""

Files = dict[str, Mark]
"""What each file must be, by its name."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint's folder and what its manifest says; `bytes` counts all its files."""

    folder: Path
    step: int
    samples: int
    world_size: int
    created: float
    files: Files

    @property
    def bytes(self) -> int:
        return sum(mark.size for mark in self.files.values())

    def state(self) -> dict[str, Any]:
        """What launcher itself noted in it."""
        noted: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return noted

    def misfits(self) -> dict[str, str]:
        """What is wrong with each file that is missing or of another size; nothing is read."""
        found = {}
        here = self.folder.resolve()
        for name, mark in self.files.items():
            file = self.folder / name
            try:
                now = file.stat().st_size
            except OSError:
                found[name] = f"{name} is missing"
                continue
            if now != mark.size:
                found[name] = f"{name} has {now} bytes, {mark.size} were written"
            elif not file.resolve().is_relative_to(here):
                found[name] = f"{name} leads out of the checkpoint's folder"
        return found

    def damage(self) -> list[str]:
        """What is wrong with each file that is missing or not what was written; empty: all good.

        Every byte is read.
        """
        found = self.misfits()
        whole = [name for name in self.files if name not in found]
        with ThreadPoolExecutor(THREADS) as threads:
            found |= {
                name: wrong
                for name, wrong in zip(whole, threads.map(self._wrong_with, whole), strict=True)
                if wrong
            }
        return [found[name] for name in self.files if name in found]

    def _wrong_with(self, name: str) -> str | None:
        """What is wrong with the content of a file; it may be gone: a run that prunes may be at work."""
        try:
            same = mark_of(self.folder / name).sha256 == self.files[name].sha256
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{name} cannot be read: {error.strerror}"
        return None if same else f"{name} does not have the hash it was written with"


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what crashes have left is removed."""
    if not checkpoints.exists():
        checkpoints.mkdir(parents=True)
        sync(checkpoints.parent)
    for left in checkpoints.glob(".step-*"):
        if not _restored(left):
            _delete(left)
    temporary = checkpoints / f".step-{step:08d}.writing"
    temporary.mkdir()
    return temporary


def check_room(folder: Path, *, size: int, files: int) -> None:
    """Raise TrainingError unless the file system of `folder` has room for `size` bytes in `files` files."""
    found = os.statvfs(folder)
    hint = "make room and run the same command again, or set checkpoint.keep lower"
    if (free := found.f_bavail * found.f_frsize) < size:
        raise TrainingError(
            f"a checkpoint needs about {size_in_words(size)} in {folder.parent}, "
            f"and {size_in_words(free)} are free",
            hint=hint,
        )
    # File systems that make inodes as they need them say that they have none at all.
    if found.f_files and found.f_favail < files:
        raise TrainingError(
            f"a checkpoint needs about {files} files in {folder.parent}, and there are inodes for "
            f"{found.f_favail}",
            hint=hint,
        )


def seal(folder: Path, names: Iterable[str]) -> Files:
    """See the files `names` of `folder` on disk; their sizes and hashes.

    The process that wrote them should be the one: it has them in memory, and on some network file systems
    only it can see them to disk.
    """
    names = list(names)
    with ThreadPoolExecutor(THREADS) as threads:
        synced = threads.map(lambda name: sync(folder / name), names)
        found = _sealed(folder, names)
        list(synced)
    return dict(zip(names, found, strict=True))


def commit(
    temporary: Path, *, step: int, samples: int, world_size: int, created: float, sealed: Files | None = None
) -> Checkpoint:
    """Make the checkpoint in `temporary` the one of `step`: hash, manifest, fsync, rename.

    `sealed`: what `seal` has given for some of the files. A checkpoint of the same step that is there already
    (the run went back and came here again) is replaced, and until then it can be had back.
    """
    # A network file system may not list yet what another rank has just written.
    names = sorted({*names_in(temporary), *(sealed or {})})
    files = {**(sealed or {}), **seal(temporary, [name for name in names if name not in (sealed or {})])}
    final = temporary.with_name(f"step-{step:08d}")
    manifest: dict[str, Any] = {
        "version": VERSION,
        "step": step,
        "samples": samples,
        "world_size": world_size,
        "created": created,
        "files": {name: {"bytes": files[name].size, "sha256": files[name].sha256} for name in names},
    }
    text = json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=2)
    write_whole(temporary / MANIFEST, (text.encode(),))
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync(folder)
    replaced = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    if replaced.exists():
        _delete(replaced)
    return Checkpoint(final, step, samples, world_size, created, {name: files[name] for name in names})


def publish(temporary: Path, target: Path) -> None:
    """Give the folder `temporary` its name, once all in it is on disk."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    temporary.rename(target)
    sync(target.parent)


def names_in(folder: Path) -> list[str]:
    """Every file in `folder`, as a manifest names them."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def committed(checkpoints: Path) -> list[Checkpoint]:
    """Every folder with a readable manifest, oldest step first; not verified."""
    found = [_read(folder) for folder in checkpoints.glob(FOLDERS)]
    return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda each: each.step)


def newest_step(checkpoints: Path) -> int:
    """The step of the newest of them; 0 where there is none."""
    return max((each.step for each in committed(checkpoints)), default=0)


def latest_good(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None."""
    for left in checkpoints.glob(f".step-*{REPLACED}"):
        _restored(left)
    return next((each for each in reversed(committed(checkpoints)) if not each.damage()), None)


def damages(checkpoints: Path, step: int | None) -> dict[str, list[str] | None]:
    """What is wrong with each checkpoint's folder, or with that of `step`, by name; every byte is read.

    None for one that a run has removed or replaced meanwhile. Raises RequestError where there is none of
    `step`.
    """
    found = {folder.name: _read(folder) for folder in sorted(checkpoints.glob(FOLDERS))}
    if step is not None:
        name = f"step-{step:08d}"
        if name not in found:
            raise _no_checkpoint(step, [int(each.removeprefix("step-")) for each in found])
        found = {name: found[name]}
    return {name: _damage_now(checkpoints / name, checkpoint) for name, checkpoint in found.items()}


def _damage_now(folder: Path, checkpoint: Checkpoint | None) -> list[str] | None:
    """What is wrong with `checkpoint`, which was in `folder`; None where it is there no more."""
    damage = [f"no readable {MANIFEST}"] if checkpoint is None else checkpoint.damage()
    is_here = folder.exists() and _read(folder) in (checkpoint, None)
    return damage if is_here or not damage else None


def good_at(checkpoints: Path, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that verifies. Raises RequestError where there is none or none
    any more, and TrainingError for one that is damaged."""
    if step is None:
        newest = latest_good(checkpoints)
        if newest is None:
            raise RequestError(f"{checkpoints} has no good checkpoint", hint="`launcher train` makes them")
        return newest
    found = {each.step: each for each in committed(checkpoints)}
    if step not in found:
        raise _no_checkpoint(step, found)
    damage = _damage_now(found[step].folder, found[step])
    if damage is None:
        raise RequestError(
            f"the checkpoint of step {step} was removed or replaced meanwhile",
            hint="a run is at work there: try again, or name a later step",
        )
    if damage:
        raise TrainingError(
            f"the checkpoint of step {step} is damaged: {'; '.join(damage)}", hint="name another step"
        )
    return found[step]


def _no_checkpoint(step: int, there: Iterable[int]) -> RequestError:
    steps = ", ".join(map(str, there)) or "none"
    return RequestError(f"there is no checkpoint of step {step}", hint=f"there are: {steps}")


def set_aside_damaged(checkpoints: Path, newer_than: int) -> list[tuple[str, str]]:
    """Move everything newer than step `newer_than` out of the way, into `quarantine/`.

    After `latest_good` has chosen a step, what is newer is damaged or unfinished. Returns each
    folder's name and what is wrong with it, which is also written into it.
    """
    moved = []
    for folder in sorted(checkpoints.glob(FOLDERS)):
        if int(folder.name.removeprefix("step-")) <= newer_than:
            continue
        checkpoint = _read(folder)
        reason = f"no readable {MANIFEST}" if checkpoint is None else "; ".join(checkpoint.damage())
        target = _free_name(checkpoints / QUARANTINE / folder.name)
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
        with contextlib.suppress(OSError):  # on a full disk the log alone has it
            (target / REASON).write_text(reason + "\n", encoding="utf-8")
        moved.append((folder.name, reason))
    return moved


def quarantined(checkpoints: Path) -> dict[str, str]:
    """What is wrong with each folder that was set aside, by its name in `quarantine/`."""
    found = {}
    for folder in sorted((checkpoints / QUARANTINE).glob(f"{FOLDERS}*")):
        try:
            found[folder.name] = (folder / REASON).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            found[folder.name] = f"its {REASON} is missing"
    return found


def prune(checkpoints: Path, *, keep: int, protect: Collection[int]) -> None:
    """Delete all but the newest `keep`, and those of the steps in `protect`. Call after a commit.

    One whose files are not of their sizes is not among the kept: it goes when there are `keep` newer ones.
    """
    newest_first = committed(checkpoints)[::-1]
    whole = [checkpoint.step for checkpoint in newest_first if not checkpoint.misfits()]
    for checkpoint in newest_first:
        if len(whole) >= keep and checkpoint.step < whole[keep - 1] and checkpoint.step not in protect:
            _remove(checkpoint.folder)


def _read(folder: Path) -> Checkpoint | None:
    try:
        fields: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: Mark(entry["bytes"], entry["sha256"]) for name, entry in fields["files"].items()}
        if not all(_stays_inside(name) for name in files):
            return None
        if fields["version"] != VERSION or fields.pop("sha256") != _own_hash(fields):
            return None
        return Checkpoint(
            folder, fields["step"], fields["samples"], fields["world_size"], fields["created"], files
        )
    except (
        FileNotFoundError,
        NotADirectoryError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        AttributeError,
        KeyError,
        TypeError,
    ):
        return None


def _own_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _restored(left: Path) -> bool:
    """Give a checkpoint its name back that a crash kept from being replaced; whether this is one."""
    final = left.with_name(left.name.removeprefix(".").removesuffix(REPLACED))
    if not left.name.endswith(REPLACED) or final.exists():
        return False
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        left.rename(final)
    return True


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves nothing that looks like one."""
    doomed = _free_name(folder.with_name(f".{folder.name}.deleting"))
    folder.rename(doomed)
    _delete(doomed)


def _delete(folder: Path) -> None:
    """As far as it can be: a file that somebody reads stays on a network file system. `begin` tries again."""
    shutil.rmtree(folder, ignore_errors=True)


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _sealed(folder: Path, names: Sequence[str]) -> list[Mark]:
    """What each file is, several at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda name: mark_of(folder / name), names))
