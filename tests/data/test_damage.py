"""Files of a store that are not what its manifest says."""

from __future__ import annotations

import pytest

from launcher.data.damage import verify_store
from launcher.data.store import MANIFEST, Store, open_store
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
