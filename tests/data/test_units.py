"""Units cover the listing once, and small files travel together."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from launcher.data.corpus import Corpus
from launcher.data.sources import Reading, SourceFile
from launcher.data.units import cut


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
