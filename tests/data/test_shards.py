"""Shard files, byte by byte, against a parser written from Megatron's description of its format."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.shards import ShardWriter, read_index, read_places, read_tokens
from launcher.errors import StoreError

END = 3


def parse(folder: Path, name: str) -> tuple[int, list[list[int]], list[int], list[tuple[int, int]]]:
    """Type code, the sequences by their pointers, the document table, and our places."""
    index = (folder / f"{name}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack_from("<Q", index, 9)
    assert version == 1
    code = index[17]
    count, entries = struct.unpack_from("<QQ", index, 18)
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    pointers = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    table = struct.unpack_from(f"<{entries}q", index, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * entries
    letter = {8: "H", 4: "i"}[code]
    content = (folder / f"{name}.bin").read_bytes()
    sequences = [
        list(struct.unpack_from(f"<{n}{letter}", content, at))
        for n, at in zip(lengths, pointers, strict=True)
    ]
    assert sum(lengths) * struct.calcsize(letter) == len(content)
    places = list(struct.iter_unpack("<qq", (folder / f"{name}.doc").read_bytes()))
    return code, sequences, list(table), places


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_000), max_size=20), min_size=1, max_size=12),
    vocabulary=st.sampled_from([65_001, 65_499, 65_500, 200_000]),
)
def test_a_shard_is_megatrons_format(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocabulary: int
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    with ShardWriter(folder, "train-00000", vocabulary) as writer:
        for first in range(0, len(documents), 3):
            some = [[*ids, END] for ids in documents[first : first + 3]]
            for ids in some:
                writer.write(np.array(ids, dtype=np.int32))
            numbers = np.arange(first, first + len(some))
            writer.end(np.array([len(ids) for ids in some]), np.stack([numbers * 10, numbers], axis=1))
        assert (writer.documents, writer.tokens) == (len(documents), sum(len(ids) + 1 for ids in documents))
        marks = writer.finish()
    code, sequences, table, places = parse(folder, "train-00000")
    assert code == (8 if vocabulary < 65_500 else 4)
    assert sequences == [[*ids, END] for ids in documents]
    assert table == list(range(len(documents) + 1))
    assert places == [(number * 10, number) for number in range(len(documents))]
    for kind, mark in marks.items():
        content = (folder / f"train-00000.{kind}").read_bytes()
        assert (mark.size, mark.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin", ".doc", ".idx"]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", 500) as writer:
        writer.write(np.array([5, 6, END, END], dtype=np.int32))
        writer.end(np.array([3, 1]), np.array([[0, 4], [9, 1]]))
        writer.finish()
    lengths, pointers = read_index(tmp_path / "s.idx")
    assert read_tokens(tmp_path / "s.bin", 500).tolist() == [5, 6, END, END]
    assert (lengths.tolist(), pointers.tolist()) == ([3, 1], [0, 6])
    assert read_places(tmp_path / "s.doc").tolist() == [[0, 4], [9, 1]]


def test_a_shard_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", 500) as writer:
        writer.write(np.array([5, END], dtype=np.int32))
    assert list(tmp_path.iterdir()) == []


def test_an_id_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", 500) as writer, pytest.raises(AssertionError):
        writer.write(np.array([70_000, END], dtype=np.int32))


@pytest.mark.parametrize("content", [b"short", b"MMIDIDX\x00\x00" + bytes(40)])
def test_an_index_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.idx").write_bytes(content)
    with pytest.raises(StoreError, match=r"s\.idx"):
        read_index(tmp_path / "s.idx")
