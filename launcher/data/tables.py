"""Tables as documents: one column of text of a parquet or Arrow file, a few rows at a time.

A document's offset is its row in the file, from 0, and its length the bytes of its text in UTF-8. A range of
a parquet file owns the row groups whose first byte lies in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.batches import BATCH, Cuts, DocumentBatch, OnBad, in_parts
from launcher.data.files import SourceFile, opened
from launcher.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MOST_ROWS = 4096  # that are decoded at a time
PAGES = 1 << 20  # bytes of a column that are read at a time
INDEXED = b"ARROW1"
STREAM_END = bytes(4)


class Table:
    """The batches of one table, of those rows whose group starts in bytes `[start, end)`."""

    def __init__(self, file: SourceFile, field: str, cuts: Cuts | None, on_bad: OnBad) -> None:
        self._file = file
        self._field = field
        self._cuts = cuts
        self._on_bad = on_bad

    def parquet(self, start: int, end: int | None) -> Iterator[DocumentBatch]:
        """The batches of a parquet file. What is wrong with all of it is told by its first range."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with opened(self._file) as stream:
            try:
                table = pq.ParquetFile(pa.PythonFile(stream, "r"), buffer_size=PAGES, pre_buffer=False)
                self._check(table.schema_arrow)
            except (pa.ArrowException, OSError, _SchemaError) as error:
                if start == 0:
                    self._report(error, "parquet")
                return
            row = 0
            for group in range(table.num_row_groups):
                meta = table.metadata.row_group(group)
                if start <= _first_byte(meta) < (self._file.size if end is None else end):
                    yield from self._group(table, group, row)
                row += meta.num_rows

    def _group(self, table: Any, group: int, row: int) -> Iterator[DocumentBatch]:
        import pyarrow as pa

        try:
            for part in table.iter_batches(
                batch_size=_rows(table.metadata.row_group(group), self._field),
                row_groups=[group],
                columns=[self._field],
                use_threads=False,
            ):
                yield from self._batches(part.column(0), row)
                row += part.num_rows
        except (pa.ArrowException, OSError) as error:
            self._report(error, "parquet", row)

    def arrow(self) -> Iterator[DocumentBatch]:
        """The batches of an Arrow file of either kind: a stream, or with an index."""
        import pyarrow as pa

        row = 0
        with opened(self._file) as stream:
            try:
                for part in _arrow_batches(pa.PythonFile(stream, "r"), self._field, self._check):
                    yield from self._batches(part.column(self._field), row)
                    row += part.num_rows
            except (pa.ArrowException, OSError, EOFError, _SchemaError) as error:
                self._report(error, "Arrow", row)

    def _check(self, schema: pa.Schema) -> None:
        """Raise _SchemaError where the schema has no such column of strings."""
        import pyarrow as pa

        field = self._field
        if field not in schema.names:
            columns = ", ".join(map(repr, schema.names)) or "none"
            hint = "set data.text_field to one of them, or leave the file out"
            raise _SchemaError(f"no column {field!r} among {columns}", hint)
        if schema.names.count(field) > 1:
            raise _SchemaError(f"two columns are called {field!r}", "rename one, or leave the file out")
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            reason = f"column {field!r} is of type {kind}, not string"
            raise _SchemaError(reason, "set data.text_field to the text's column, or leave the file out")

    def _report(self, error: Exception, kind: str, row: int | None = None) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            raise error  # not the bytes are at fault
        if isinstance(error, _SchemaError):
            self._on_bad(DataError(error.reason, file=self._file.path, hint=error.hint))
            return
        reason = f"damaged {kind} file ({str(error).strip().splitlines()[0]})"
        hint = "get the file again, or leave it out of data.train"
        self._on_bad(DataError(reason, file=self._file.path, offset=row, counted="row", hint=hint))

    def _batches(self, column: pa.Array, row: int) -> Iterator[DocumentBatch]:
        """The rows of a column from number `row` on, BATCH bytes at a time."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not pa.types.is_large_string(column.type):
            column = column.cast(pa.large_string())
        lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.cumsum(lengths)
        first = 0
        while first < len(column):
            before = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, before + BATCH, side="right")))
            batch = self._batch(column.slice(first, stop - first), row + first, lengths[first:stop])
            if self._cuts is None:
                yield batch
            else:
                yield from in_parts(batch, self._cuts, self._file.path, self._on_bad, "row")
            first = stop

    def _batch(self, column: pa.Array, row: int, lengths: NDArray[np.int64]) -> DocumentBatch:
        rows = np.arange(row, row + len(column), dtype=np.int64)
        try:
            texts = column.to_pylist()
            if not column.null_count:
                return DocumentBatch(texts, rows, lengths)
        except UnicodeDecodeError:
            pass
        texts = [self._text(column[number], row + number) for number in range(len(column))]
        kept = [number for number, text in enumerate(texts) if text is not None]
        return DocumentBatch([texts[number] for number in kept], rows[kept], lengths[kept])

    def _text(self, cell: pa.Scalar, row: int) -> str | None:
        """The text of a cell. One without it is reported."""
        reason = f"column {self._field!r} is null"
        try:
            text: str | None = cell.as_py()
        except UnicodeDecodeError as error:
            text = None
            bad = error.object[error.start]
            reason = f"column {self._field!r}: byte 0x{bad:02x} is not UTF-8 ({error.reason})"
        if text is None:
            hint = "leave the row out of the table"
            self._on_bad(DataError(reason, file=self._file.path, offset=row, counted="row", hint=hint))
        return text


class _SchemaError(Exception):
    """A table that has no column to read."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def _first_byte(group: pq.RowGroupMetaData) -> int:
    column = group.column(0)
    return int(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)


def _rows(group: pq.RowGroupMetaData, field: str) -> int:
    """How many rows of a group have about BATCH bytes of text."""
    columns = (group.column(number) for number in range(group.num_columns))
    size = next(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return max(1, min(MOST_ROWS, int(group.num_rows) * BATCH // max(int(size), 1)))


def _arrow_batches(
    source: pa.PythonFile, field: str, check: Callable[[pa.Schema], None]
) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, of that column alone. Raises EOFError where its end is missing."""
    import pyarrow as pa

    size = source.size()
    indexed = source.read(len(INDEXED)) == INDEXED
    source.seek(max(0, size - len(STREAM_END)))
    if not indexed and source.read() != STREAM_END:
        raise EOFError("its end is missing")
    source.seek(0)
    schema = (pa.ipc.open_file if indexed else pa.ipc.open_stream)(source).schema
    check(schema)
    source.seek(0)
    only = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(field)], use_threads=False)
    if indexed:
        opened_file = pa.ipc.open_file(source, options=only)
        yield from (opened_file.get_batch(number) for number in range(opened_file.num_record_batches))
    else:
        yield from pa.ipc.open_stream(source, options=only)
