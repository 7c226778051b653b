"""What is in a token store, and where each of its tokens goes: read, nothing run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from launcher.config.schema import RunConfig
from launcher.data.duplicates import find_duplicates
from launcher.data.files import SourceFile
from launcher.data.sources import TABLES, Reading, file_format
from launcher.data.store import SPLITS, Shard, Split, Store, Summary, open_store

LENGTHS = (1, 16, 64, 256, 1024, 4096)
"""Lower ends of the document lengths, in tokens, that documents are counted by."""

EXCERPT = 200
"""Characters shown of a text."""

EXAMPLES = 10
"""Duplicates and bad records shown, at most; all bad records are in the JSON."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer, for people and for programs."""

    text: str
    as_json: Any


def show_store(path: Path, run: RunConfig | None, samples: int) -> Shown:
    """Documents, tokens, lengths and the first documents of each split and source; the ledger; what is in
    training and validation text both. With a `run`, what its blocks hold of each source."""
    store = open_store(path)
    splits = [_split(store, split, source, samples) for split in SPLITS for source in store.sources(split)]
    ledger = [record.model_dump() for record in store.manifest.ledger]
    if run is not None:
        summaries = store.summary(run.data.block_size, run.data.packing)
        for record in ledger:
            own = [each for each in summaries if each.source == record["source"]]
            record["blocks"] = _in_blocks(run, own)
    duplicates = find_duplicates(store, EXAMPLES)
    twins = [
        {
            "train": _place(store, twin.shard, twin.document),
            "validation": _place(store, twin.validation_shard, twin.validation_document),
        }
        for twin in duplicates.examples
    ]
    text = [f"store {store.path}", f"vocabulary {store.vocabulary:,}", *map(_split_text, splits)]
    text += map(_ledger_text, ledger)
    text += [f"\n{duplicates.documents:,} documents of the training text are in the validation text too"]
    text += [f"  {place_text(twin['train'])}\n    is {place_text(twin['validation'])}" for twin in twins]
    bad = [record.model_dump() for record in store.manifest.bad]
    if bad:
        text += [f"\n{len(bad):,} bad records were left out", *map(_bad_text, bad[:EXAMPLES])]
    return Shown(
        "\n".join(text),
        {
            "store": str(store.path),
            "vocabulary": store.vocabulary,
            "ledger": ledger,
            "splits": splits,
            "duplicates": {"documents": duplicates.documents, "examples": twins},
            "bad": bad,
        },
    )


def place(store: Store, document: str, file: str, offset: int, length: int) -> dict[str, Any]:
    """Where a document of this name is: its file, and its bytes there, or in a table its row."""
    reading = Reading(format=cast("Any", store.manifest.content.format))
    counted = "row" if file_format(SourceFile(file, 0, ""), reading) in TABLES.values() else "byte"
    return {"document": document, "file": file, "counted": counted, "offset": offset, "length": length}


def place_text(found: dict[str, Any]) -> str:
    """A place, for people."""
    if found["counted"] == "row":
        return f"{found['document']}  {found['file']}: row {found['offset']}, {found['length']} bytes of text"
    end = found["offset"] + found["length"]
    return f"{found['document']}  {found['file']}: bytes {found['offset']} to {end}"


def _place(store: Store, shard: Shard, document: int) -> dict[str, Any]:
    offset, length = store.places(shard)[document].tolist()
    return place(store, f"{shard.name}:{document}", shard.file_of(document), offset, length)


def _split(store: Store, split: Split, source: str, samples: int) -> dict[str, Any]:
    shards = store.shards(split, source)
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(_histogram(store.lengths(shard)))
    size = sum(int(store.places(shard)[:, 1].sum()) for shard in shards)
    tokens, documents = sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards)
    tokenizer = store.tokenizer()
    return {
        "split": split,
        "source": source,
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(1, tokens - documents),
        "lengths": dict(counts),
        "samples": [
            tokenizer.decode(ids[:EXCERPT])[:EXCERPT] for ids in _first_documents(store, shards[0], samples)
        ],
    }


def _histogram(lengths: np.ndarray[Any, np.dtype[np.int32]]) -> dict[str, int]:
    counts, _ = np.histogram(lengths, [*LENGTHS, np.iinfo(np.int32).max])
    ends = [
        *(f"{low}-{high - 1}" for low, high in pairwise(LENGTHS)),
        f"{LENGTHS[-1]} and more",
    ]
    return dict(zip(ends, counts.tolist(), strict=True))


def _first_documents(store: Store, shard: Shard, samples: int) -> list[Any]:
    ends = np.cumsum(store.lengths(shard)[:samples], dtype=np.int64)
    tokens = store.tokens(shard)
    return [tokens[start:stop] for start, stop in pairwise([0, *ends])]


def _split_text(split: dict[str, Any]) -> str:
    lengths = ", ".join(f"{name}: {count:,}" for name, count in split["lengths"].items())
    lines = [
        f"\n{split['split']}, source {split['source']}",
        f"  documents      {split['documents']:,}",
        f"  tokens         {split['tokens']:,}, end-of-text after each document included",
        f"  bytes a token  {split['bytes_per_token']:.2f}",
        f"  lengths        {lengths}",
        *(f"  | {sample!r}" for sample in split["samples"]),
    ]
    return "\n".join(lines)


def _in_blocks(run: RunConfig, own: Sequence[Summary]) -> dict[str, Any]:
    """What a source's tokens become in the blocks of `run`: tokens in = train + validation + dropped."""
    return {
        "packing": run.data.packing,
        "block_size": run.data.block_size,
        **{split: sum(s.tokens - s.dropped for s in own if s.split == split) for split in SPLITS},
        "dropped": sum(each.dropped for each in own),
        "padded": sum(each.padding for each in own),
    }


def _ledger_text(record: dict[str, Any]) -> str:
    lines = [
        f"\nledger of source {record['source']}",
        f"  tokens         {record['tokens_in']:,} = {record['train_tokens']:,} train"
        f" + {record['validation_tokens']:,} validation",
        f"  left out       {record['skipped_empty']:,} empty documents,"
        f" {record['skipped_bad']:,} bad records",
    ]
    if blocks := record.get("blocks"):
        lines.append(
            f"  in blocks      {record['tokens_in']:,} = {blocks['train']:,} train"
            f" + {blocks['validation']:,} validation + {blocks['dropped']:,} dropped;"
            f" {blocks['padded']:,} positions padded ({blocks['packing']}, {blocks['block_size']:,} tokens)"
        )
    return "\n".join(lines)


def _bad_text(record: dict[str, Any]) -> str:
    line = "" if record["line"] is None else f":{record['line']}"
    offset = "" if record["offset"] is None else f", {record['counted']} {record['offset']}"
    return f"  {record['file']}{line}{offset}: {record['reason']}"
