"""Work units: a listing cut by bytes, always in the same way, whoever works on them and how many they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.data.corpus import Corpus
from launcher.data.sources import Reading, SourceFile, splittable

UNIT_BYTES = 16 << 20  # of files as stored: some 4 million tokens of plain text, seconds of work


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `[start, end)` of a file; end is None for a file that is only read whole."""

    file: SourceFile
    start: int
    end: int | None

    @property
    def size(self) -> int:
        """Bytes as stored."""
        return self.file.size if self.end is None else self.end - self.start


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker does at a time; it becomes at most one shard a split, numbered as the unit is."""

    number: int
    source: str
    held_out: bool
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes as stored."""
        return sum(piece.size for piece in self.pieces)


def cut(corpora: Sequence[Corpus], reading: Reading, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of a listing: small files together, large ones in equal ranges where they can be split."""
    units: list[Unit] = []
    for corpus in corpora:
        for pieces in _groups(corpus.files, reading, unit_bytes):
            units.append(Unit(len(units), corpus.source, corpus.held_out, pieces))
    return units


def _groups(files: Sequence[SourceFile], reading: Reading, unit_bytes: int) -> Iterator[tuple[Piece, ...]]:
    group: list[Piece] = []
    held = 0
    for file in files:
        pieces = _pieces(file, reading, unit_bytes)
        for piece in pieces:
            if group and held + piece.size > unit_bytes:
                yield tuple(group)
                group, held = [], 0
            group.append(piece)
            held += piece.size
    if group:
        yield tuple(group)


def _pieces(file: SourceFile, reading: Reading, unit_bytes: int) -> list[Piece]:
    if not splittable(file, reading):
        return [Piece(file, 0, None)]
    ranges = max(1, -(-file.size // unit_bytes))
    cuts = [file.size * i // ranges for i in range(ranges + 1)]
    return [Piece(file, start, end) for start, end in pairwise(cuts)]
