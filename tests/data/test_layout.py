"""A layout is made once, kept, and never met by another store."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from launcher.data import units
from launcher.data.blocks import Blocks
from launcher.data.damage import set_aside, verify_store
from launcher.data.layout import COUNTS, FOLDER
from launcher.data.shards import HEADER
from launcher.data.store import Store, open_store
from launcher.errors import MachineError, StoreError

SIZE = 48


@pytest.fixture
def store(prepared: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of some ten shards."""
    monkeypatch.setattr(units, "SMALLEST", 3000)
    made: Store = prepared([f"{corpus}/*.txt"], validation=0.2)
    return made


def rows(path: Path, packing: Any) -> list[list[int]]:
    """Every training block of the store, opened anew."""
    blocks = Blocks(open_store(path), "train", SIZE, packing)
    return [blocks.read(0, block).tolist() for block in range(len(blocks[0]))]


def kept(path: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file under `layouts`: its inode and content."""
    return {
        file: (file.stat().st_ino, file.read_bytes()) for file in (path / FOLDER).rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_it_is_made_once_and_read_from_then_on(store: Store, packing: Any) -> None:
    first = rows(store.path, packing)
    files = kept(store.path)
    assert len(files) == len(store.manifest.shards) + 2
    assert rows(store.path, packing) == first
    assert kept(store.path) == files
    shutil.rmtree(store.path / FOLDER)
    assert rows(store.path, packing) == first
    assert {file: content for file, (_, content) in kept(store.path).items()} == {
        file: content for file, (_, content) in files.items()
    }


def test_concat_needs_none(store: Store) -> None:
    assert rows(store.path, "concat")
    assert not (store.path / FOLDER).exists()


def test_other_shards_never_meet_it(store: Store, prepared: Any, corpus: Path) -> None:
    expected = rows(store.path, "best_fit")
    other = prepared([f"{corpus}/*.txt"], validation=0.5)
    others = rows(other.path, "best_fit")
    shutil.rmtree(other.path / FOLDER)
    shutil.copytree(store.path / FOLDER, other.path / FOLDER)
    assert rows(other.path, "best_fit") == others != expected


@contextmanager
def only_reading(source: Path) -> Iterator[Path]:
    """A copy of a store that this process, being nobody for once, may not write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    copied = shutil.copytree(source, folder / "store", ignore=shutil.ignore_patterns(FOLDER))
    copied.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield copied
    finally:
        os.seteuid(user)
        copied.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_a_folder_that_cannot_be_written_to_serves_too(store: Store, packing: Any) -> None:
    expected = rows(store.path, packing)
    with only_reading(store.path) as copied:
        with pytest.raises(PermissionError):
            (copied / "new").touch()
        assert rows(copied, packing) == expected
        assert not (copied / FOLDER).exists()


def _read_together(path: Path, barrier: Barrier, found: Any) -> None:
    barrier.wait(60)
    found.put(rows(path, "best_fit"))


def test_several_at_once_make_one(store: Store) -> None:
    context = get_context("spawn")
    barrier, found = context.Barrier(4), context.Queue()
    readers = [context.Process(target=_read_together, args=(store.path, barrier, found)) for _ in range(4)]
    for reader in readers:
        reader.start()
    answers = [found.get(timeout=120) for _ in readers]
    for reader in readers:
        reader.join(60)
    assert all(answer == answers[0] for answer in answers)
    (folder,) = (store.path / FOLDER).iterdir()
    assert len(list(folder.iterdir())) == len(store.manifest.shards) + 2
    assert answers[0] == rows(store.path, "best_fit")


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_damage_is_named_with_what_to_do(store: Store, damage: str) -> None:
    rows(store.path, "best_fit")
    (folder,) = (store.path / FOLDER).iterdir()
    file = folder / "train-00003.layout"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-16] if damage == "short" else content + bytes(16))
    with pytest.raises(StoreError, match=r"train-00003\.layout") as refused:
        rows(store.path, "best_fit")
    assert f"delete {folder}" in (refused.value.hint or "")
    (folder / COUNTS).write_text("{")
    with pytest.raises(StoreError, match=r"blocks\.json"):
        open_store(store.path).summary(SIZE, "best_fit")


def test_a_flipped_byte_of_any_file_is_found_and_set_aside(store: Store) -> None:
    expected = rows(store.path, "best_fit")
    rows(store.path, "pad")
    assert verify_store(store.path) == []
    for file in kept(store.path):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        (damage,) = verify_store(store.path)
        assert damage.file == file.parent
        set_aside([damage])
        assert not file.parent.exists()
        assert rows(store.path, "best_fit") == expected
        assert rows(store.path, "pad")
        assert verify_store(store.path) == []


def test_none_is_made_of_a_damaged_index(store: Store) -> None:
    """It would be kept, and vouch for itself, when the index has long been mended."""
    expected = rows(store.path, "best_fit")
    shutil.rmtree(store.path / FOLDER)
    index = store.path / "train-00000.idx"
    content = index.read_bytes()
    first, second = struct.unpack_from("<2i", content, HEADER.size)
    damaged = bytearray(content)
    struct.pack_into("<2i", damaged, HEADER.size, first + 1, second - 1)
    index.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"train-00000\.idx: its content has changed"):
        rows(store.path, "best_fit")
    index.write_bytes(content)
    assert rows(store.path, "best_fit") == expected


def test_an_unfinished_one_is_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it, a layout is whole or absent, and nothing is left over."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launcher.data.layout.sync", full)
    with pytest.raises(MachineError, match="cannot be written: No space left"):
        rows(store.path, "pad")
    assert list((store.path / FOLDER).iterdir()) == []
    monkeypatch.undo()
    assert rows(store.path, "pad")
    counts = json.loads(next((store.path / FOLDER).glob(f"*/{COUNTS}")).read_text())
    assert sum(counts.values()) == sum(each.blocks for each in store.summary(SIZE, "pad"))
