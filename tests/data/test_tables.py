"""Rows of parquet and Arrow files as documents; and what is wrong with a table, with its row."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.sources import (
    Document,
    Reading,
    SourceFile,
    batches,
    file_format,
    list_files,
    splittable,
)
from launcher.errors import DataError, RequestError
from tests.data.conftest import documents
from tests.data.faulty import Fault, Site, serving
from tests.data.test_long_documents import AfterSpace, joined, small
from tests.data.test_remote import PASSING, _hurry  # noqa: F401 - a fixture
from tests.data.test_sources import one

TEXTS = [f"row {i} \u20ac" * (i % 7) for i in range(5000)]
READING = Reading()


def parquet(
    path: Path, texts: list[str | None] | list[str], rows: int = 500, **kinds: pa.Array
) -> SourceFile:
    table = pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, pa.string()), **kinds})
    pq.write_table(table, path, row_group_size=rows)
    return one(path)


def arrow(
    path: Path, texts: list[str | None] | list[str], rows: int = 300, indexed: bool = False
) -> SourceFile:
    table = pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, pa.string())})
    with (pa.ipc.new_file if indexed else pa.ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return one(path)


def expected(texts: list[str]) -> list[Document]:
    return [Document(text, row, len(text.encode())) for row, text in enumerate(texts)]


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_rows_of_parquet_are_documents(tmp_path: Path, compression: str, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(TEXTS).cast(kind), "id": range(len(TEXTS))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700, compression=compression)
    file = one(tmp_path / "a.parquet")
    assert file_format(file, READING) == "parquet"
    assert splittable(file, READING)
    assert list(documents(file, READING)) == expected(TEXTS)


@pytest.mark.parametrize("indexed", [True, False])
def test_rows_of_arrow_are_documents(tmp_path: Path, indexed: bool) -> None:
    file = arrow(tmp_path / "a.arrow", TEXTS, indexed=indexed)
    assert not splittable(file, READING)
    assert list(documents(file, READING)) == expected(TEXTS)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=5), max_size=40),
    rows=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 4000), max_size=5),
)
def test_ranges_of_parquet_together_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], rows: int, cuts: list[int]
) -> None:
    file = parquet(tmp_path_factory.mktemp("ranges") / "a.parquet", texts, rows)
    bounds = sorted({0, file.size, *(cut for cut in cuts if cut < file.size)})
    apart = [d for start, end in pairwise(bounds) for d in documents(file, READING, start, end)]
    assert apart == expected(texts)


def test_a_row_group_belongs_to_the_range_it_starts_in(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", TEXTS, 500)
    halves = [0, file.size // 2, file.size]
    first, second = (
        [document.offset for document in documents(file, READING, start, end)]
        for start, end in pairwise(halves)
    )
    assert first + second == list(range(5000))
    assert 1500 <= len(first) <= 3500
    assert len(first) % 500 == 0


def test_a_long_text_comes_in_parts(tmp_path: Path) -> None:
    texts = ["short", "one two three four five six seven", "", "last"]
    for file in (parquet(tmp_path / "a.parquet", texts), arrow(tmp_path / "a.arrow", texts)):
        with small():
            parts = list(documents(file, READING, cuts=AfterSpace()))
        assert len(parts) > 5
        assert joined(parts) == expected(texts)


def test_a_batch_is_small_whatever_its_rows(tmp_path: Path) -> None:
    texts = ["x" * 300_000] * 50
    for file in (parquet(tmp_path / "a.parquet", texts, 50), arrow(tmp_path / "a.arrow", texts, 50)):
        found = list(batches(file, READING))
        assert max(int(batch.lengths.sum()) for batch in found) <= 1 << 20
        assert sum(len(batch.texts) for batch in found) == 50


# Bad input


def told(file: SourceFile, reading: Reading = READING, start: int = 0) -> tuple[list[str], DataError]:
    """The texts that are read on past one bad thing, which is raised where nobody takes it."""
    bad: list[DataError] = []
    texts = [document.text for document in documents(file, reading, start, on_bad=bad.append)]
    assert len(bad) == 1
    assert bad[0].file == file.path
    assert bad[0].hint
    with pytest.raises(DataError) as raised:
        list(documents(file, reading, start))
    assert str(raised.value) == str(bad[0])
    return texts, bad[0]


def test_a_null(tmp_path: Path) -> None:
    texts = ["a", None, "", "b"]
    for file in (parquet(tmp_path / "a.parquet", texts, 2), arrow(tmp_path / "a.arrow", texts)):
        found, error = told(file)
        assert found == ["a", "", "b"]
        assert (error.offset, error.counted) == (1, "row")
        assert f"{file.path}, row 1: column 'text' is null" in str(error)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    content = pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())
    file = parquet(tmp_path / "a.parquet", ["", "", ""], text=content)
    found, error = told(file)
    assert found == ["a", "b"]
    assert error.offset == 1
    assert "0xe9 is not UTF-8" in error.reason


@pytest.mark.parametrize(
    ("field", "reason"),
    [("body", "no column 'body' among 'id', 'text', 'no'"), ("id", "type int64"), ("no", "type null")],
)
def test_another_column(tmp_path: Path, field: str, reason: str) -> None:
    file = parquet(tmp_path / "a.parquet", ["a"] * 9, 3, no=pa.nulls(9))
    found, error = told(file, Reading(text_field=field))
    assert found == []
    assert reason in error.reason


def test_a_sibling_with_another_schema(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["a", "b"])
    pq.write_table(pa.table({"content": ["c"]}), tmp_path / "b.parquet")
    bad: list[DataError] = []
    found = [
        document.text
        for name in ("a", "b")
        for document in documents(one(tmp_path / f"{name}.parquet"), READING, on_bad=bad.append)
    ]
    assert found == ["a", "b"]
    assert "b.parquet" in str(bad[0])
    assert "no column 'text' among 'content'" in str(bad[0])


def test_what_is_wrong_with_a_file_is_told_once(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", ["a"] * 9, 3)
    bad: list[DataError] = []
    for start, end in pairwise([0, 100, 200, file.size]):
        assert not list(documents(file, Reading(text_field="body"), start, end, on_bad=bad.append))
    assert len(bad) == 1


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "indexed.arrow"])
@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.999])
def test_a_table_that_was_cut_off(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    whole = parquet(path, TEXTS) if name == "a.parquet" else arrow(path, TEXTS, indexed=name != "a.arrow")
    path.write_bytes(path.read_bytes()[: int(kept * whole.size if kept < 1 else kept)])
    found, error = told(one(path))
    assert found == []
    assert "damaged" in error.reason


def test_a_damaged_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i * i} is a text" for i in range(3000)]})
    pq.write_table(table, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    found, error = told(one(path))
    assert error.offset == 1000
    assert found == table.column(0).to_pylist()[:1000] + table.column(0).to_pylist()[2000:]


def test_a_table_inside_something_else(tmp_path: Path) -> None:
    for path in ("/x/a.parquet.gz", "zip://a.parquet::/x/a.zip", "/x/a.arrow.zst"):
        with pytest.raises(RequestError, match="cannot be read inside"):
            file_format(SourceFile(path, 0, ""), READING)


# Over the network


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    parquet(tmp_path / "a.parquet", TEXTS)
    arrow(tmp_path / "a.arrow", TEXTS)
    with serving(Site({f"/{path.name}": path.read_bytes() for path in tmp_path.iterdir()})) as served:
        yield served


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_remote_table(site: Site, name: str, ranges: bool) -> None:
    site.ranges = ranges
    (file,) = list_files([f"{site.url}/{name}"])
    site.faults.extend(PASSING[:5])
    assert list(documents(file, READING)) == expected(TEXTS)
    site.always = Fault(status=403)
    bad: list[DataError] = []
    with pytest.raises(DataError, match="refuses"):
        list(documents(file, READING, on_bad=bad.append))
    assert not bad


FLAT = """
import re, sys
from launcher.data.sources import Reading, batches, list_files
(file,) = list_files([sys.argv[1]])
size = sum(int(batch.lengths.sum()) for batch in batches(file, Reading()))
# Not ru_maxrss: that is at least what the process which started this one held.
print(size, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, kind: str) -> None:
    peaks = []
    for groups in (2, 30):
        path = tmp_path / f"{groups}.{kind}"
        schema = pa.schema([("text", pa.string())])
        parts = [
            pa.record_batch([pa.array([f"{group} {i} words " * 300 for i in range(1500)])], schema)
            for group in range(groups)
        ]
        # One row group for all: a row group is not read whole either.
        with (
            pq.ParquetWriter(path, schema, compression="none")
            if kind == "parquet"
            else pa.ipc.new_stream(path, schema) as writer
        ):
            if kind == "parquet":
                writer.write_table(pa.Table.from_batches(parts), row_group_size=10**9)
            else:
                for part in parts:
                    writer.write_batch(part)
        done = subprocess.run(
            [sys.executable, "-c", FLAT, str(path)], capture_output=True, text=True, check=True
        )
        size, peak = map(int, done.stdout.split())
        assert size == sum(sum(map(len, part.column(0).to_pylist())) for part in parts)
        peaks.append(peak)
        path.unlink()
    assert peaks[1] < peaks[0] * 1.25, peaks
