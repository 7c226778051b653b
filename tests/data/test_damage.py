"""Files of a store that are not what its manifest says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from launcher.data.damage import verify_store
from launcher.data.duplicates import find_duplicates
from launcher.data.shards import HEADER
from launcher.data.store import MANIFEST, Store, open_store
from launcher.durable import Mark, mark_of
from launcher.errors import StoreError


def test_a_store_as_it_was_written(store: Store) -> None:
    assert verify_store(store.path) == []


def test_a_flipped_byte_is_found_in_every_file(store: Store) -> None:
    files = [path for path in store.path.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert len(files) == 8
    for path in files:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[len(damaged) * 2 // 3] ^= 1
        path.write_bytes(damaged)
        (damage,) = verify_store(store.path)
        assert damage.file == path
        assert damage.shard == (None if path.parent != store.path else path.stem)
        assert path.name in str(damage)
        path.write_bytes(content)
    assert verify_store(store.path) == []


def test_a_file_that_has_grown(store: Store) -> None:
    with (store.path / "train-00000.bin").open("ab") as stream:
        stream.write(b"x")
    (damage,) = verify_store(store.path)
    assert (damage.shard, damage.reason.split(" ")[1:3]) == ("train-00000", ["bytes", "where"])
    opened = open_store(store.path)
    with pytest.raises(StoreError, match=r"train-00000\.bin: .* bytes where the manifest says"):
        opened.tokens(opened.shards("train", "text")[0])


def test_a_missing_and_a_short_file(store: Store) -> None:
    (store.path / "train-00000.idx").unlink()
    (store.path / "validation-00000.bin").write_bytes(b"12")
    assert [(d.shard, d.reason.split(" ")[0]) for d in verify_store(store.path)] == [
        ("train-00000", "missing"),
        ("validation-00000", "2"),
    ]
    opened = open_store(store.path)
    with pytest.raises(StoreError, match=r"train-00000\.idx: missing") as refused:
        opened.lengths(opened.shards("train", "text")[0])
    assert refused.value.hint
    with pytest.raises(StoreError, match=r"validation-00000\.bin: 2 bytes where the manifest says"):
        opened.tokens(opened.shards("validation", "text")[0])
    with pytest.raises(StoreError, match=r"train-00000\.idx: missing"):
        opened.summary(32, "best_fit")


@pytest.mark.parametrize("place", [18, HEADER.size], ids=["count", "length"])
def test_lengths_that_are_not_the_shard_s_are_refused(store: Store, place: int) -> None:
    index = store.path / "train-00000.idx"
    damaged = bytearray(index.read_bytes())
    damaged[place] ^= 1
    index.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"train-00000\.idx: its lengths are not the shard's") as refused:
        find_duplicates(open_store(store.path), 3)
    assert "launcher data verify" in (refused.value.hint or "")


def test_a_sector_that_cannot_be_read_is_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> Mark:
        if path.name == "train-00000.bin":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return mark_of(path)

    monkeypatch.setattr("launcher.data.damage.mark_of", fails)
    (damage,) = verify_store(store.path)
    assert str(damage).endswith("train-00000.bin: it cannot be read: Input/output error")
