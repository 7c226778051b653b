"""Documents on both sides of the split, against the texts themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.data import duplicates
from launcher.data.duplicates import find_duplicates
from launcher.data.store import Shard, Store
from tests.data.conftest import sentences


def text_of(store: Store, shard: Shard, document: int) -> str:
    offset, length = store.places(shard)[document].tolist()
    return Path(shard.file_of(document)).read_bytes()[offset : offset + length].decode()


@pytest.mark.parametrize("chunk", [1 << 16, 7])
def test_every_document_on_both_sides_is_found(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(duplicates, "CHUNK", chunk)
    train, held = sentences(300), [*sentences(40, 2), *sentences(300)[100:130:3]]
    (tmp_path / "a.txt").write_text("\n".join(train) + "\n")
    (tmp_path / "b.txt").write_text("\n".join(train[110:140]) + "\n")
    (tmp_path / "held.txt").write_text("\n".join(held) + "\n")
    store = prepared([f"{tmp_path}/[ab].txt"], validation=[f"{tmp_path}/held.txt"])
    expected = [text for text in [*train, *train[110:140]] if text in held]
    found = find_duplicates(store, examples=4)
    assert found.documents == len(expected) == 16
    assert [text_of(store, twin.shard, twin.document) for twin in found.examples] == expected[:4]
    for twin in found.examples:
        ours = text_of(store, twin.shard, twin.document)
        assert text_of(store, twin.validation_shard, twin.validation_document) == ours


def test_two_texts_that_differ_where_no_key_looks_are_told_apart(prepared: Any, tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(200))
    (tmp_path / "a.txt").write_text(words + "\n")
    (tmp_path / "held.txt").write_text(
        "".join(words.replace(f"word{n}", "word0") + "\n" for n in range(1, 200))
    )
    store = prepared([f"{tmp_path}/a.txt"], validation=[f"{tmp_path}/held.txt"])
    assert find_duplicates(store, examples=1).documents == 0


def test_a_split_by_content_parts_no_two_copies(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(400) * 2) + "\n")
    store = prepared([f"{tmp_path}/a.txt"], validation=0.3)
    assert store.sources("validation")
    assert find_duplicates(store, examples=1).documents == 0
    alone = prepared([f"{tmp_path}/a.txt"], validation=0.0)
    assert find_duplicates(alone, examples=1).documents == 0
