"""Units cover the listing once, and small files travel together."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.corpus import Corpus
from launcher.data.sources import Reading, SourceFile
from launcher.data.units import FEW, LARGEST, SMALLEST, Slice, cut, parse_slice, unit_bytes
from launcher.errors import RequestError


@given(
    sizes=st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=20),
    unit_bytes=st.integers(1, 200),
)
def test_every_byte_is_in_one_unit(sizes: list[tuple[int, bool]], unit_bytes: int) -> None:
    files = tuple(
        SourceFile(f"/{n:03d}.txt{'.gz' if packed else ''}", size, "")
        for n, (size, packed) in enumerate(sizes)
    )
    units = cut([Corpus("one", files), Corpus("two", files[:1], held_out=True)], Reading(), unit_bytes)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert units[-1].source == "two"
    assert units[-1].held_out
    ranges = defaultdict(list)
    for unit in units:
        if unit.source == "one":
            assert unit.size <= unit_bytes or len(unit.pieces) == 1
            for piece in unit.pieces:
                ranges[piece.file].append((piece.start, piece.end))
    for file in files:
        if file.compression:
            assert ranges[file] == [(0, None)]
        else:
            assert ranges[file][0][0] == 0
            assert ranges[file][-1][1] == file.size
            ends = [end for _, end in ranges[file]]
            assert [start for start, _ in ranges[file][1:]] == ends[:-1]


def test_small_files_share_a_unit() -> None:
    files = tuple(SourceFile(f"/{n}.txt", 10, "") for n in range(10))
    assert [len(unit.pieces) for unit in cut([Corpus("one", files)], Reading(), 40)] == [4, 4, 2]


def test_a_document_file_is_never_split() -> None:
    files = (SourceFile("/a.txt", 1000, ""), SourceFile("/b.jsonl", 1000, ""))
    units = cut([Corpus("one", files)], Reading(sample_by="document"), 100)
    assert [unit.pieces[0].end for unit in units] == [None, *range(100, 1001, 100)]


@given(count=st.integers(1, 12), units=st.integers(0, 40))
def test_every_unit_is_in_one_slice(count: int, units: int) -> None:
    files = tuple(SourceFile(f"/{n:02d}.txt", 10, "") for n in range(units))
    whole = cut([Corpus("one", files)], Reading(), 10)
    parts = [Slice(index, count).of(whole) for index in range(1, count + 1)]
    assert sorted(unit.number for part in parts for unit in part) == list(range(units))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_slice_as_it_is_written() -> None:
    assert parse_slice("2/8") == Slice(2, 8)
    assert str(parse_slice("2/8")) == "2-of-8"
    for wrong in ("0/8", "9/8", "2", "2/", "/8", "a/b", "-1/3", "1/0", "\uff11/\uff12", " 1/2"):
        with pytest.raises(RequestError, match="expected I/N"):
            parse_slice(wrong)


@given(st.integers(0, 1 << 50))
def test_units_are_few_and_soon_done(total: int) -> None:
    size = unit_bytes([Corpus("one", (SourceFile("/a.txt", total, ""),))])
    assert SMALLEST <= size <= LARGEST
    assert total / size < FEW + 1 or size == LARGEST
