"""Work units: a listing cut by bytes, always in the same way, whoever works on them and how many they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.data.corpus import Corpus
from launcher.data.sources import Reading, SourceFile, splittable
from launcher.errors import RequestError

SMALLEST = 8 << 20  # of files as stored: some 2 million tokens of plain text, half a second of work
LARGEST = 1 << 30  # a minute of work: what a kill may cost
FEW = 4096  # shards a split, for a store of any size to open at once


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


@dataclass(frozen=True, slots=True)
class Slice:
    """The `index`-th, from 1, of `count` equal parts of the units: what one machine of several does."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        """Its units: every `count`-th, so that each slice has its share of every source."""
        return [unit for unit in units if unit.number % self.count == self.index - 1]


WHOLE = Slice(1, 1)


def parse_slice(text: str) -> Slice:
    """`2/8` is the second of eight. Raises RequestError."""
    found = re.fullmatch("([0-9]+)/([0-9]+)", text)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise RequestError(
            f"--units {text}: expected I/N, the I-th of N parts, with I from 1 to N",
            hint="in a SLURM array of 1-8: --units $SLURM_ARRAY_TASK_ID/8",
        )
    return Slice(index, count)


def unit_bytes(corpora: Sequence[Corpus]) -> int:
    """Bytes of files as stored in a unit: few enough units to open quickly, each soon done."""
    total = sum(file.size for corpus in corpora for file in corpus.files)
    return min(max(total // FEW, SMALLEST), LARGEST)


def cut(corpora: Sequence[Corpus], reading: Reading, unit_bytes: int) -> list[Unit]:
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
