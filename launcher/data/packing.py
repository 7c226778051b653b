"""Where the tokens of block b are: pure arithmetic over what the shards of one source and split hold.

A document here includes its end-of-text token. `concat` cuts the joined tokens of all shards into blocks of
exactly `block_size`, which needs only the shards' sizes. The others never cut a document that fits in a
block, so they need the documents' lengths, and are laid out a shard at a time: `pad` gives every document
rows of its own, and `best_fit` fills blocks with those rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Packing = Literal["concat", "best_fit", "pad"]
ByDocument = Literal["best_fit", "pad"]

WINDOW = (
    1 << 17
)  # rows that best_fit fills blocks with at a time: a few MB, and short ones enough for every gap


class Span(NamedTuple):
    """Tokens `[start, stop)` of a shard, by the shard's index in the sequence given."""

    shard: int
    start: int
    stop: int


class PackingPlan(Protocol):
    """Blocks over the shards of one source and split."""

    @property
    def blocks(self) -> int:
        """How many blocks there are."""

    @property
    def dropped(self) -> int:
        """Tokens that are in no block."""

    @property
    def padding(self) -> int:
        """Positions without a token, were every block padded to the full block size."""

    def locate(self, block: int) -> list[Span]:
        """The tokens of a block, in order. Raises IndexError for a block that is not there."""

    def holding(self, span: Span) -> NDArray[np.int64]:
        """`int64[n]`, ascending: every block that holds any of these tokens."""


class ConcatPlan:
    """Blocks of exactly `block_size` tokens, across documents and shards; the short tail is dropped."""

    padding = 0

    def __init__(self, tokens: Sequence[int], block_size: int) -> None:
        self._block_size = block_size
        self._starts = [0, *accumulate(tokens)]
        self.blocks, self.dropped = divmod(self._starts[-1], block_size)

    def locate(self, block: int) -> list[Span]:
        _check(block, self.blocks)
        start, stop = block * self._block_size, (block + 1) * self._block_size
        shard = bisect_right(self._starts, start) - 1
        spans = []
        while start < stop:
            first, after = self._starts[shard], self._starts[shard + 1]
            if start < after:
                spans.append(Span(shard, start - first, min(stop, after) - first))
            start = min(stop, after)
            shard += 1
        return spans

    def holding(self, span: Span) -> NDArray[np.int64]:
        begins = self._starts[span.shard]
        first, last = ((begins + token) // self._block_size for token in (span.start, span.stop - 1))
        return np.arange(first, min(last + 1, self.blocks))


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The blocks of one shard, written out: block b is `pieces[firsts[b] : firsts[b + 1]]`.

    `firsts`: int64[blocks + 1]. `pieces`: int64[n, 2], each the tokens `[start, stop)` of the shard.
    """

    firsts: NDArray[np.int64]
    pieces: NDArray[np.int64]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.firsts) - 1


class LaidOutPlan:
    """Blocks by shard, as `layout(shard)` lays each out in `blocks[shard]` blocks; nothing is dropped.

    `tokens`: those of all shards.
    """

    dropped = 0

    def __init__(
        self, blocks: Sequence[int], tokens: int, block_size: int, layout: Callable[[int], ShardLayout]
    ) -> None:
        self._layout = layout
        self._starts = [0, *accumulate(blocks)]
        self.blocks = self._starts[-1]
        self.padding = self.blocks * block_size - tokens

    def locate(self, block: int) -> list[Span]:
        _check(block, self.blocks)
        shard = bisect_right(self._starts, block) - 1
        layout = self._layout(shard)
        row = block - self._starts[shard]
        first, after = layout.firsts[row : row + 2].tolist()
        return [Span(shard, start, stop) for start, stop in layout.pieces[first:after].tolist()]

    def holding(self, span: Span) -> NDArray[np.int64]:
        layout = self._layout(span.shard)
        starts, stops = layout.pieces.T
        pieces = np.flatnonzero((starts < span.stop) & (stops > span.start))
        rows = np.searchsorted(layout.firsts, pieces, side="right") - 1
        return self._starts[span.shard] + np.unique(rows)


def lay_out(lengths: NDArray[np.int32], block_size: int, packing: ByDocument) -> ShardLayout:
    """The blocks of a shard of documents of these lengths in tokens."""
    rows = _rows(lengths, block_size)
    if packing == "pad":
        return ShardLayout(np.arange(len(rows) + 1), rows)
    return _fill(rows, block_size)


def _rows(lengths: NDArray[np.int32], block_size: int) -> NDArray[np.int64]:
    """`int64[n, 2]`: every document in rows of its own, `[start, stop)`, each full but a document's last."""
    stops = np.cumsum(lengths, dtype=np.int64)
    starts = stops - lengths
    counts = -(-lengths.astype(np.int64) // block_size)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(starts, counts) + nth * block_size
    return np.stack([first, np.minimum(first + block_size, np.repeat(stops, counts))], axis=1)


def _fill(rows: NDArray[np.int64], block_size: int) -> ShardLayout:
    """Rows put together into blocks, in each block in their own order."""
    firsts, pieces = [np.zeros(1, dtype=np.int64)], [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(rows), WINDOW):
        window = rows[start : start + WINDOW]
        blocks = best_fit(window[:, 1] - window[:, 0], block_size)
        pieces.append(window[np.argsort(blocks, kind="stable")])
        firsts.append(start + np.cumsum(np.bincount(blocks)))
    return ShardLayout(np.concatenate(firsts), np.concatenate(pieces))


def best_fit(sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """`int64[n]`: the block of each of n rows of 1 <= size <= room, numbered from 0 without a gap.

    Best-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973): the longest row first, each
    into the block with the least room that takes it. Rows of one size are placed together, and blocks with
    the same room are taken together, so the work is by kinds and not by rows.
    """
    result = np.empty(len(sizes), dtype=np.int64)
    opened = _Opened()
    count = 0
    for size, rows in _by_size(sizes):
        while len(rows):
            left, blocks = opened.take(size)
            if not len(blocks):
                left, blocks = room, np.arange(count, count - (-len(rows) // (room // size)))
                count += len(blocks)
            each = left // size
            placed = min(len(rows), each * len(blocks))
            full, rest = divmod(placed, each)
            result[rows[:placed]] = np.repeat(blocks, each)[:placed]
            opened.put(left - each * size, blocks[:full])
            opened.put(left - rest * size, blocks[full : full + 1])
            opened.put(left, blocks[full + 1 :])
            rows = rows[placed:]
    return result


def _by_size(sizes: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each size from the largest, with the rows of that size in order."""
    rows = np.argsort(-sizes, kind="stable")
    falling = sizes[rows]
    for same in np.split(rows, np.flatnonzero(np.diff(falling)) + 1) if len(rows) else ():
        yield int(sizes[same[0]]), same


class _Opened:
    """Blocks that have room left, by how much. A bit of `_rooms` says that there are some of that room."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[NDArray[np.int64]]] = {}
        self._rooms = 0

    def put(self, room: int, blocks: NDArray[np.int64]) -> None:
        if room and len(blocks):
            self._blocks.setdefault(room, []).append(blocks)
            self._rooms |= 1 << room

    def take(self, size: int) -> tuple[int, NDArray[np.int64]]:
        """The least room that takes `size`, and all blocks with it; no blocks where there is none."""
        fitting = self._rooms >> size
        if not fitting:
            return 0, np.empty(0, dtype=np.int64)
        room = size + (fitting & -fitting).bit_length() - 1
        self._rooms &= ~(1 << room)
        return room, np.concatenate(self._blocks.pop(room))


def _check(block: int, blocks: int) -> None:
    if not 0 <= block < blocks:
        raise IndexError(f"block {block} of {blocks}")
