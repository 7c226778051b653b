"""Blocks against the documents of the corpus, tokenised one by one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.schema import Source
from launcher.data.blocks import Blocks
from launcher.data.store import Store
from launcher.data.tokenizers import Tokenizer
from launcher.errors import RequestError


@pytest.mark.usefixtures("small_units")
def test_concat_blocks_are_the_joined_documents(prepared: Any, corpus: Path, tokenizer: Tokenizer) -> None:
    store = prepared([f"{corpus}/*.txt"], validation=0.0)
    assert len(store.manifest.shards) > 5
    texts = [line for name in ("a.txt", "b.txt") for line in (corpus / name).read_text().splitlines()]
    joined = [i for ids in tokenizer.encode_batch(texts) for i in [*ids.tolist(), tokenizer.end_of_text_id]]
    blocks = Blocks(store, "train", 128, "concat")
    assert len(blocks) == 1
    assert len(blocks[0]) == len(joined) // 128
    for block in range(len(blocks[0])):
        ids = blocks.read(0, block)
        assert ids.dtype == np.int64
        assert ids.tolist() == joined[block * 128 : (block + 1) * 128]


@pytest.mark.usefixtures("small_units")
def test_pad_rows_are_the_documents(prepared: Any, corpus: Path, tokenizer: Tokenizer) -> None:
    store = prepared([f"{corpus}/*.txt"], validation=0.0)
    texts = [line for name in ("a.txt", "b.txt") for line in (corpus / name).read_text().splitlines()]
    documents = [[*ids.tolist(), tokenizer.end_of_text_id] for ids in tokenizer.encode_batch(texts)]
    rows = [ids[at : at + 16] for ids in documents for at in range(0, len(ids), 16)]
    blocks = Blocks(store, "train", 16, "pad")
    assert [blocks.read(0, row).tolist() for row in range(len(blocks[0]))] == rows


@pytest.mark.usefixtures("small_units")
def test_best_fit_blocks_hold_whole_documents_each_once(
    prepared: Any, corpus: Path, tokenizer: Tokenizer
) -> None:
    store = prepared([f"{corpus}/*.txt"], validation=0.0)
    texts = [line for name in ("a.txt", "b.txt") for line in (corpus / name).read_text().splitlines()]
    documents = [(*ids.tolist(), tokenizer.end_of_text_id) for ids in tokenizer.encode_batch(texts)]
    blocks = Blocks(store, "train", 100, "best_fit")
    found = []
    for block in range(len(blocks[0])):
        ids = blocks.read(0, block).tolist()
        assert len(ids) <= 100
        ends = [place + 1 for place, token in enumerate(ids) if token == tokenizer.end_of_text_id]
        assert ends[-1] == len(ids)
        found += [tuple(ids[start:stop]) for start, stop in pairwise([0, *ends])]
    assert sorted(found) == sorted(documents)
    assert len(blocks[0]) < len(Blocks(store, "train", 100, "pad")[0]) / 3


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
def test_a_description_leads_back_to_the_bytes(
    prepared: Any, corpus: Path, tokenizer: Tokenizer, packing: Any
) -> None:
    blocks = Blocks(prepared([f"{corpus}/*.txt"], validation=0.3), "train", 40, packing)
    for block in range(len(blocks[0])):
        ids = blocks.read(0, block).tolist()
        passages = blocks.describe(0, block)
        assert [p.start for p in passages] == [0, *(p.stop for p in passages[:-1])]
        assert passages[-1].stop == len(ids) == blocks.length(0, block)
        for p in passages:
            assert p.name == f"{p.shard}:{p.document}"
            text = Path(p.file).read_bytes()[p.offset : p.offset + p.length].decode()
            document = [*tokenizer.encode_batch([text])[0].tolist(), tokenizer.end_of_text_id]
            assert len(document) == p.document_tokens
            assert ids[p.start : p.stop] == document[p.document_token : p.document_token + p.stop - p.start]


def test_sources_of_a_mixture_stay_apart(prepared: Any, corpus: Path, tokenizer: Tokenizer) -> None:
    mixture = [
        Source(name="second", files=[str(corpus / "b.txt")], weight=1.0),
        Source(name="first", files=[str(corpus / "a.txt")], weight=3.0),
    ]
    store = prepared(mixture, validation=0.1)
    blocks = Blocks(store, "train", 64, "concat")
    assert blocks.sources == ["second", "first"]
    for number, mark in ((0, " 2."), (1, " 1.")):
        assert mark in tokenizer.decode(blocks.read(number, 0))
    assert [ledger.source for ledger in store.manifest.ledger] == ["second", "first"]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
def test_a_document_is_found_in_every_block_that_describes_it(
    prepared: Any, corpus: Path, packing: Any
) -> None:
    mixture = [
        Source(name="second", files=[str(corpus / "b.txt")], weight=1.0),
        Source(name="first", files=[str(corpus / "a.txt")], weight=3.0),
    ]
    store = prepared(mixture, validation=0.1)
    blocks = Blocks(store, "train", 10, packing)
    held: dict[str, list[int]] = {}
    for source in range(len(blocks)):
        for block in range(len(blocks[source])):
            for passage in blocks.describe(source, block):
                held.setdefault(passage.name, []).append(block)
    assert len(held) > 900
    for name, own in held.items():
        source, found = blocks.holding(name)
        assert found.tolist() == own
        assert (" 2." if blocks.sources[source] == "second" else " 1.") in _text(store, name)
    shard = store.shards("train", "first")[0]
    for name in (f"{shard.name}:{shard.documents}", "train-99999:0", "validation-00000:0"):
        with pytest.raises(RequestError, match=f"no document {name} in the train text"):
            blocks.holding(name)


def _text(store: Store, name: str) -> str:
    """The text of a document by its name, from the file it came from."""
    shard_name, _, document = name.partition(":")
    (shard,) = (each for each in store.manifest.shards if each.name == shard_name)
    offset, length = store.places(shard)[int(document)].tolist()
    return Path(shard.file_of(int(document))).read_bytes()[offset : offset + length].decode()


def test_past_the_end(prepared: Any, corpus: Path) -> None:
    blocks = Blocks(prepared([f"{corpus}/*.txt"]), "train", 64, "concat")
    with pytest.raises(IndexError):
        blocks.read(0, len(blocks[0]))
