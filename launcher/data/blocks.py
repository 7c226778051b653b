"""Blocks of tokens, read from a store: what a training sample is, and which text it came from."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from launcher.data.packing import Packing, Span
from launcher.data.store import Split, Store
from launcher.errors import RequestError


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a block that comes from one document.

    `file`, `offset`, `length`: the document's bytes in its decompressed source file. `document`: its index
    in `shard`. `start`, `stop`: token positions in the block. `document_token`: which token of the document
    the passage begins with, of `document_tokens`, end-of-text included.
    """

    file: str
    offset: int
    length: int
    shard: str
    document: int
    start: int
    stop: int
    document_token: int
    document_tokens: int

    @property
    def name(self) -> str:
        """What the document is called, in `data.skip` too: `SHARD:DOCUMENT`."""
        return f"{self.shard}:{self.document}"


COUNTED_SHARDS = 16  # shards whose documents' ends are held at a time: 8 bytes a document


class Blocks:
    """The blocks of one split. Sources are numbered as in `sources`. `full`: each has `block_size` tokens."""

    def __init__(self, store: Store, split: Split, block_size: int, packing: Packing) -> None:
        self.store = store
        self.split = split
        self.block_size = block_size
        self.full = packing == "concat"
        self.sources = store.sources(split)
        self._parts = [SourceBlocks(store, split, source, block_size, packing) for source in self.sources]

    def __len__(self) -> int:
        """How many sources there are."""
        return len(self._parts)

    def __getitem__(self, source: int) -> SourceBlocks:
        return self._parts[source]

    def read(self, source: int, block: int) -> NDArray[np.int64]:
        """`int64[block_size]` ids under concat, else `int64[<= block_size]`. IndexError past the end."""
        return self._parts[source].read(block)

    def length(self, source: int, block: int) -> int:
        """Tokens in a block, without reading them."""
        return self.block_size if self.full else self._parts[source].length(block)

    def describe(self, source: int, block: int) -> list[Passage]:
        """Which bytes of which files a block's tokens come from, in order."""
        return self._parts[source].describe(block)

    def holding(self, document: str) -> tuple[int, NDArray[np.int64]]:
        """The source of a document named `SHARD:DOCUMENT`, and `int64[n]`: every block that holds any of it.

        Raises RequestError for a document that this split does not have.
        """
        name, _, index = document.rpartition(":")
        for source, part in enumerate(self._parts):
            if (blocks := part.holding(name, int(index))) is not None:
                return source, blocks
        raise RequestError(
            f"there is no document {document} in the {self.split} text of {self.store.path}",
            hint="documents are named as `launcher data show RUN --step N` prints them",
            key="data.skip.documents",
        )


class SourceBlocks:
    """The blocks of one source in one split."""

    def __init__(self, store: Store, split: Split, source: str, block_size: int, packing: Packing) -> None:
        self._store = store
        self._shards = store.shards(split, source)
        self._plan = store.plan(split, source, block_size, packing)
        self._ends = lru_cache(COUNTED_SHARDS)(self._count_ends)

    def __len__(self) -> int:
        return self._plan.blocks

    def read(self, block: int) -> NDArray[np.int64]:
        """The block's ids: see `Blocks.read`."""
        spans = self._plan.locate(block)
        parts = [self._store.tokens(self._shards[s.shard])[s.start : s.stop] for s in spans]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined.astype(np.int64)

    def length(self, block: int) -> int:
        """The block's tokens: see `Blocks.length`."""
        return sum(span.stop - span.start for span in self._plan.locate(block))

    def describe(self, block: int) -> list[Passage]:
        """The block's passages: see `Blocks.describe`."""
        passages: list[Passage] = []
        for span in self._plan.locate(block):
            position = passages[-1].stop if passages else 0
            passages += self._passages(span, position)
        return passages

    def holding(self, shard: str, document: int) -> NDArray[np.int64] | None:
        """Every block that holds any of a document; None where it is not in this source. See `Blocks`."""
        for number, each in enumerate(self._shards):
            if each.name == shard and document < each.documents:
                start, stop = [0, *self._ends(number)[max(0, document - 1) : document + 1].tolist()][-2:]
                return self._plan.holding(Span(number, start, stop))
        return None

    def _count_ends(self, shard: int) -> NDArray[np.int64]:
        return np.cumsum(self._store.lengths(self._shards[shard]), dtype=np.int64)

    def _passages(self, span: Span, position: int) -> list[Passage]:
        shard, ends = self._shards[span.shard], self._ends(span.shard)
        places = self._store.places(shard)
        firsts = [origin.first_document for origin in shard.origins]
        passages = []
        token = span.start
        document = int(np.searchsorted(ends, token, side="right"))
        while token < span.stop:
            stop = min(span.stop, int(ends[document]))
            offset, length = places[document].tolist()
            begun = int(ends[document - 1]) if document else 0
            file = shard.origins[bisect_right(firsts, document) - 1].file
            passages.append(
                Passage(
                    file,
                    offset,
                    length,
                    shard.name,
                    document,
                    position,
                    position + stop - token,
                    token - begun,
                    int(ends[document]) - begun,
                )
            )
            position, token, document = position + stop - token, stop, document + 1
        return passages
