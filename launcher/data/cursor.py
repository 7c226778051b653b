"""One logical stream of text: its tokens in windows of blocks, from any cursor on.

A source has S streams. Each epoch visits the source's units through a permutation, and stream j reads the
units at places j, j + S, j + 2S, ... of it, then those of the next epoch. Its documents are tokenised, each
followed by end-of-text, joined and cut into blocks, so that block k of stream j depends on the text and the
configuration alone. Blocks are shuffled within windows of WINDOW.

A cursor is a place in the text, with no tokens carried along: to go on from it the unit's records before it
are read again (and, in a compressed file, all that stands before them), but only the one document that it
points into is tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from launcher.data.order import permute, round_keys
from launcher.data.sources import Cuts, DocumentBatch, Reading, batches, changed
from launcher.data.split import HeldOut
from launcher.data.tokenizers import Tokenizer
from launcher.data.units import Piece, Unit
from launcher.errors import DataError

WINDOW = 64
"""Blocks of a stream that are shuffled together."""


class Cursor(NamedTuple):
    """The place in the text where a window begins. Of two cursors of a stream the later compares greater.

    `turn` counts the stream's units in the epoch, `piece` the unit's pieces, `document` the piece's
    documents (each part of a long one by itself), `token` the document's tokens.
    """

    window: int = 0
    epoch: int = 0
    turn: int = 0
    piece: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks in the order they are trained in, `int32[n, block_size]`, and where they were read from."""

    start: Cursor
    blocks: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SourceText:
    """The text of one source as its streams read it; `number` is the source's place among the run's."""

    number: int
    units: Sequence[Unit]
    streams: int
    reading: Reading
    tokenizer: Tokenizer
    cuts: Cuts
    held_out: HeldOut
    block_size: int
    seed: int

    def shuffled_units(self, epoch: int, first: int = 0, stride: int = 1) -> Iterator[Unit]:
        """The units at places `first`, `first + stride`, ... of the epoch's order."""
        keys = round_keys(self.seed, self.number, epoch)
        for place in range(first, len(self.units), stride):
            yield self.units[permute(place, len(self.units), keys)]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents of one piece as tokens: which of the piece's they are, their ids joined, where each ends."""

    numbers: NDArray[np.int64]
    ids: NDArray[np.int32]
    ends: NDArray[np.int64]

    def place(self, used: int) -> tuple[int, int]:
        """The document, and the token of it, that comes after the first `used` tokens."""
        index = int(np.searchsorted(self.ends, used, side="right"))
        if index == len(self.ends):
            return int(self.numbers[-1]) + 1, 0
        return int(self.numbers[index]), used - (int(self.ends[index - 1]) if index else 0)


class LogicalStream:
    """Reads one stream's windows in order. Holds one window, and the text that is tokenised at a time."""

    def __init__(self, text: SourceText, number: int, cursor: Cursor) -> None:
        self._text = text
        self._number = number
        self._next = cursor
        self._parts = self._read_on(cursor)
        self._at = cursor
        self._part = Encoded(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64))
        self._used = 0

    def read(self) -> Window:
        """The next window. Raises DataError for bad text, and for a file that is not as it was listed."""
        start, size = self._next, self._text.block_size
        blocks = window_blocks(self._number, self._text.streams, start.window)
        tokens = np.empty(blocks * size, dtype=np.int32)
        filled = 0
        while filled < len(tokens):
            if self._used == len(self._part.ids):
                self._at, self._part = next(self._parts)
                self._used = self._at.token
            taken = self._part.ids[self._used : self._used + len(tokens) - filled]
            tokens[filled : filled + len(taken)] = taken
            filled += len(taken)
            self._used += len(taken)
        document, token = self._part.place(self._used)
        self._next = self._at._replace(window=start.window + 1, document=document, token=token)
        keys = round_keys(self._text.seed, self._text.number, self._number, start.window)
        order = [permute(place, blocks, keys) for place in range(blocks)]
        return Window(start, tokens.reshape(blocks, size)[order])

    def _read_on(self, cursor: Cursor) -> Iterator[tuple[Cursor, Encoded]]:
        """The stream's tokens from a cursor on, without end, each part with the place it is from."""
        text, (_, epoch, turn, piece, document, token) = self._text, cursor
        while True:
            units = text.shuffled_units(epoch, self._number + turn * text.streams, text.streams)
            for unit in units:
                for each in unit.pieces[piece:]:
                    for part in encode(text, each, held_out=False, skip=document):
                        yield Cursor(0, epoch, turn, piece, 0, token), part
                        token = 0
                    piece, document = piece + 1, 0
                turn, piece = turn + 1, 0
            epoch, turn = epoch + 1, 0


def window_of(stream: int, streams: int, block: int) -> tuple[int, int]:
    """The window that a stream's n-th block is given from, and its place in it.

    Streams reach the end of a window at different times, so that the work of reading comes evenly: stream j
    begins j/S of the way through its first one.
    """
    ahead = stream * WINDOW // streams
    window, place = divmod(block + ahead, WINDOW)
    return window, place if window else place - ahead


def window_blocks(stream: int, streams: int, window: int) -> int:
    """Blocks in a stream's window: WINDOW, but fewer in its first."""
    return WINDOW if window else WINDOW - stream * WINDOW // streams


def encode(text: SourceText, piece: Piece, *, held_out: bool, skip: int = 0) -> Iterator[Encoded]:
    """The documents of a piece that are held out, or those that are not, from its number `skip` on.

    Raises DataError for bad text, and for a file that is not as it was listed.
    """
    if changed(piece.file):
        raise DataError(
            "has changed since the run began",
            file=piece.file.path,
            hint="put it back as it was (time of change too), or give a run on other text another name",
        )
    for numbers, texts, more in chosen_texts(text, piece, held_out=held_out, skip=skip):
        if more:
            (ids,) = text.tokenizer.encode_batch(texts)
            ends = np.array([len(ids)], dtype=np.int64)
        else:
            ids, lengths = text.tokenizer.encode_joined(texts)
            ends = np.cumsum(lengths)
        yield Encoded(numbers, ids, ends)


def chosen_texts(
    text: SourceText, piece: Piece, *, held_out: bool, skip: int = 0
) -> Iterator[tuple[NDArray[np.int64], list[str], bool]]:
    """The same documents as text: their numbers, their texts, and whether the one there is goes on.

    A cursor only ever points into a document that is read, so the rest of one begun before `skip` is too.
    """
    number, inside, chosen = 0, False, True
    for batch in _batches(text, piece):
        if inside or batch.more:
            if not inside:
                chosen = number < skip or _is_long_one_held_out(text, piece, number) == held_out
            inside = batch.more
            wanted = np.array([chosen])
        else:
            wanted = ~batch.empty & (text.held_out(batch.texts) == held_out)
        wanted[: max(0, skip - number)] = False
        if wanted.any():
            yield number + np.flatnonzero(wanted), list(compress(batch.texts, wanted)), batch.more
        number += len(batch.texts)


def _is_long_one_held_out(text: SourceText, piece: Piece, number: int) -> bool:
    """By the hash of all its parts, which are read once more for it."""
    if text.held_out.nothing:
        return False
    digest = text.held_out.digest()
    reached = 0
    for batch in _batches(text, piece):
        if reached >= number:
            digest.update(batch.texts[0].encode())
            if not batch.more:
                break
        reached += len(batch.texts)
    return text.held_out.holds(digest)


def _batches(text: SourceText, piece: Piece) -> Iterator[DocumentBatch]:
    return batches(piece.file, text.reading, piece.start, piece.end, cuts=text.cuts)
