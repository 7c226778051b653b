"""Where the tokens of block b are: pure arithmetic over what the shards of one source and split hold.

A document here includes its end-of-text token. `concat` cuts the joined tokens of all shards into blocks of
exactly `block_size`; `pad` gives every document rows of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.errors import RequestError

Packing = Literal["concat", "best_fit", "pad"]


class Span(NamedTuple):
    """Tokens `[start, stop)` of a shard, by the shard's index in the sequence given."""

    shard: int
    start: int
    stop: int


class Plan(Protocol):
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


@dataclass(frozen=True, slots=True)
class ShardSizes:
    """A shard to plan over: its tokens, and the length of each document in tokens (read only by `pad`)."""

    tokens: int
    lengths: NDArray[np.int32]


def plan_blocks(shards: Sequence[ShardSizes], block_size: int, packing: Packing) -> Plan:
    """How these shards' tokens become blocks. Raises RequestError for `best_fit`."""
    if packing == "concat":
        return ConcatPlan([shard.tokens for shard in shards], block_size)
    if packing == "pad":
        return PadPlan([shard.lengths for shard in shards], block_size)
    raise RequestError("data.packing: best_fit is not in this version", hint="use concat or pad")


class ConcatPlan:
    """Blocks of exactly `block_size` tokens, across documents and shards; the short tail is dropped."""

    padding = 0

    def __init__(self, tokens: Sequence[int], block_size: int) -> None:
        self._block_size = block_size
        self._starts = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        self.blocks, self.dropped = divmod(int(self._starts[-1]), block_size)

    def locate(self, block: int) -> list[Span]:
        _check(block, self.blocks)
        start, stop = block * self._block_size, (block + 1) * self._block_size
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        spans = []
        while start < stop:
            first, after = int(self._starts[shard]), int(self._starts[shard + 1])
            spans.append(Span(shard, start - first, min(stop, after) - first))
            start = min(stop, after)
            shard += 1
        return spans


class PadPlan:
    """A document a block, going on in the next blocks where it is longer; nothing is dropped.

    Holds 16 bytes a document.
    """

    dropped = 0

    def __init__(self, lengths: Sequence[NDArray[np.int32]], block_size: int) -> None:
        self._block_size = block_size
        self._token_ends = [np.cumsum(own, dtype=np.int64) for own in lengths]
        self._row_ends = [np.cumsum(-(-own.astype(np.int64) // block_size)) for own in lengths]
        rows = [int(ends[-1]) if len(ends) else 0 for ends in self._row_ends]
        tokens = sum(int(ends[-1]) if len(ends) else 0 for ends in self._token_ends)
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self.blocks = int(self._starts[-1])
        self.padding = self.blocks * block_size - tokens

    def locate(self, block: int) -> list[Span]:
        _check(block, self.blocks)
        shard = int(np.searchsorted(self._starts, block, side="right")) - 1
        row = block - int(self._starts[shard])
        row_ends, token_ends = self._row_ends[shard], self._token_ends[shard]
        document = int(np.searchsorted(row_ends, row, side="right"))
        rows_before, tokens_before = (
            (int(row_ends[document - 1]), int(token_ends[document - 1])) if document else (0, 0)
        )
        start = tokens_before + (row - rows_before) * self._block_size
        return [Span(shard, start, min(start + self._block_size, int(token_ends[document])))]


def _check(block: int, blocks: int) -> None:
    if not 0 <= block < blocks:
        raise IndexError(f"block {block} of {blocks}")
