"""What is in a token store, and which text is in one step of a run: read, nothing run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data.blocks import Blocks
from launcher.data.mixture import training_order
from launcher.data.store import SPLITS, Store, open_store
from launcher.errors import RequestError, RunDirectoryError
from launcher.run.assemble import store_folder
from launcher.run.directory import RunDirectory

LENGTHS = (1, 16, 64, 256, 1024, 4096)
"""Lower ends of the document lengths, in tokens, that documents are counted by."""

EXCERPT = 200
"""Characters shown of a text."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer, for people and for programs."""

    text: str
    as_json: Any


def show_store(given: Path, samples: int) -> Shown:
    """Documents, tokens, lengths and the first documents of each split and source."""
    store = open_store(store_folder(given))
    tokenizer = store.tokenizer()
    found: list[dict[str, Any]] = []
    for split in SPLITS:
        for source in store.sources(split):
            shards = store.shards(split, source)
            lengths = np.concatenate([store.lengths(shard) for shard in shards])
            size = sum(int(store.places(shard)[:, 1].sum()) for shard in shards)
            tokens = int(lengths.sum())
            found.append(
                {
                    "split": split,
                    "source": source,
                    "documents": len(lengths),
                    "tokens": tokens,
                    "bytes": size,
                    "bytes_per_token": size / max(1, tokens - len(lengths)),
                    "lengths": _histogram(lengths),
                    "samples": [
                        tokenizer.decode(ids[:EXCERPT])[:EXCERPT]
                        for ids in _first_documents(store, split, source, samples)
                    ],
                }
            )
    ledger = [record.model_dump() for record in store.manifest.ledger]
    shown = {"store": str(store.path), "vocabulary": store.vocabulary, "ledger": ledger, "splits": found}
    return Shown(
        "\n".join([f"store {store.path}", f"vocabulary {store.vocabulary:,}", *map(_split_text, found)]),
        shown,
    )


def _histogram(lengths: np.ndarray[Any, np.dtype[np.int32]]) -> dict[str, int]:
    counts, _ = np.histogram(lengths, [*LENGTHS, np.iinfo(np.int32).max])
    ends = [
        *(f"{low}-{high - 1}" for low, high in pairwise(LENGTHS)),
        f"{LENGTHS[-1]} and more",
    ]
    return dict(zip(ends, counts.tolist(), strict=True))


def _first_documents(store: Store, split: Any, source: str, samples: int) -> list[Any]:
    shard = store.shards(split, source)[0]
    ends = np.cumsum(store.lengths(shard), dtype=np.int64)[:samples]
    tokens = store.tokens(shard)
    return [tokens[start:stop] for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


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


def show_step(given: Path, step: int) -> Shown:
    """For every row of optimizer step `step` (from 1): source, file, bytes, and the text's beginning."""
    directory = RunDirectory(given.absolute())
    if not directory.orders.is_file():
        raise RunDirectoryError(
            f"{given} is not a run directory, and a step belongs to a run",
            directory=directory.root,
            hint="give the folder that `launcher train` made, such as runs/NAME",
        )
    run, orders = directory.read_config(), directory.read_orders()
    store = open_store(store_folder(given))
    blocks = Blocks(store, "train", run.data.block_size, run.data.packing)
    order = training_order(blocks, run.data, run.seed)
    if orders.plan.steps is not None and step > orders.plan.steps:
        raise RequestError(f"--step {step}: the run has {orders.plan.steps} steps", hint="steps count from 1")
    tokenizer = store.tokenizer()
    rows: list[dict[str, Any]] = []
    for sample in range((step - 1) * run.train.batch_size, step * run.train.batch_size):
        place = order[sample]
        ids = blocks.read(place.source, place.block)
        rows.append(
            {
                "sample": sample,
                "source": blocks.sources[place.source],
                "epoch": place.epoch,
                "block": place.block,
                "passages": [
                    {
                        "file": passage.file,
                        "document": passage.document,
                        "shard": passage.shard,
                        "offset": passage.offset,
                        "length": passage.length,
                        "tokens": passage.stop - passage.start,
                    }
                    for passage in blocks.describe(place.source, place.block)
                ],
                "text": tokenizer.decode(ids[:EXCERPT])[:EXCERPT],
            }
        )
    return Shown("\n".join(_row_text(row) for row in rows), {"step": step, "rows": rows})


def _row_text(row: dict[str, Any]) -> str:
    lines = [f"sample {row['sample']}: source {row['source']}, epoch {row['epoch']}, block {row['block']}"]
    lines += [
        f"  {passage['file']}: bytes {passage['offset']} to {passage['offset'] + passage['length']},"
        f" {passage['tokens']} tokens"
        for passage in row["passages"]
    ]
    return "\n".join([*lines, f"  | {row['text']!r}"])
