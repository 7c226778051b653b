"""Files as documents: any format, any byte range, in batches or one by one.

Offsets count bytes of the decompressed stream. A range `[start, end)` owns the records that start in
it, so the ranges of a file can be read apart, by anyone, and together give the file's documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Literal

import numpy as np

from launcher.data.batches import (
    LONG,
    Cuts,
    Document,
    DocumentBatch,
    OnBad,
    forgotten,
    in_parts,
    no_place_to_cut,
    single,
)
from launcher.data.files import CHUNK, DamagedFileError, SourceFile, changed, list_files, opened
from launcher.data.json_lines import BadLineError, LineParser
from launcher.data.records import (
    BadBytesError,
    Lines,
    NoPlaceToCutError,
    Paragraphs,
    Places,
    RecordRule,
    Records,
    Run,
    Whole,
)
from launcher.data.tables import Table
from launcher.errors import DataError, RequestError

__all__ = [
    "Cuts",
    "Document",
    "DocumentBatch",
    "OnBad",
    "Reading",
    "SourceFile",
    "batches",
    "changed",
    "file_format",
    "list_files",
    "splittable",
]  # fmt: skip

JSON_LINES = frozenset({".jsonl", ".json", ".ndjson"})
TABLES: Mapping[str, Literal["parquet", "arrow"]] = {".parquet": "parquet", ".arrow": "arrow"}
LONGEST_LINE = 256 << 20  # bytes of a line of jsonl, which can only be read whole
COUNTED = 1 << 30  # bytes that are read again at most to tell the number of a line

SampleBy = Literal["line", "paragraph", "document"]
RULES: Mapping[SampleBy, RecordRule] = {"line": Lines(), "paragraph": Paragraphs(), "document": Whole()}


@dataclass(frozen=True, slots=True)
class Reading:
    """How files become documents: the keys of `data` that say so."""

    format: Literal["auto", "text", "jsonl", "parquet", "arrow"] = "auto"
    sample_by: SampleBy = "line"
    text_field: str = "text"


def file_format(file: SourceFile, reading: Reading) -> Literal["text", "jsonl", "parquet", "arrow"]:
    """How this file is read; `auto` goes by its name. Raises RequestError for a table in an archive."""
    kind: Literal["text", "jsonl", "parquet", "arrow"]
    if reading.format != "auto":
        kind = reading.format
    else:
        kind = TABLES.get(file.suffix, "jsonl" if file.suffix in JSON_LINES else "text")
    if kind in TABLES.values() and (file.compression or file.packed):
        outside = file.compression or "an archive"
        raise RequestError(
            f"{file.path}: {kind} cannot be read inside {outside}",
            hint="unpack it: it is read here and there, and compressed already",
        )
    return kind


def splittable(file: SourceFile, reading: Reading) -> bool:
    """Whether ranges of the file can be read apart."""
    kind = file_format(file, reading)
    whole = kind == "arrow" or (kind == "text" and reading.sample_by == "document")
    return file.ranges and file.compression is None and not whole


def batches(
    file: SourceFile,
    reading: Reading,
    start: int = 0,
    end: int | None = None,
    *,
    cuts: Cuts | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[DocumentBatch]:
    """The documents that start in bytes `[start, end)` of the decompressed file, in order.

    Of a parquet file, those in the row groups that start there. Empty documents are among them: whoever
    stores documents counts those and leaves them out. A file that is not splittable is read whole or not at
    all. With `cuts`, a document of more than LONG comes in parts.

    Raises DataError, with file and place, for text that is not UTF-8, an empty, damaged or truncated file, a
    line of jsonl or a row without its text, and a table without a column of that name and of strings.
    `on_bad` is given those instead, and what is good is read on; a file that cannot be read at all still
    raises.
    """
    kind = file_format(file, reading)
    report = on_bad or _raise
    if kind in TABLES.values():
        table = Table(file, reading.text_field, cuts, report)
        yield from table.parquet(start, end) if kind == "parquet" else table.arrow()
        return
    inside = False
    try:
        with opened(file, end) as stream:
            for batch in _Texts(file, reading, stream, start, end, cuts, report):
                inside = batch.more
                yield batch
    except DamagedFileError as error:
        report(error)
        if inside:
            yield forgotten()


def _raise(error: DataError) -> None:
    raise error


class _Texts:
    """The batches of one file of text or jsonl."""

    def __init__(
        self,
        file: SourceFile,
        reading: Reading,
        stream: BinaryIO,
        start: int,
        end: int | None,
        cuts: Cuts | None,
        on_bad: OnBad,
    ) -> None:
        self._file = file
        self._start = start
        self._end = end
        self._cuts = cuts
        self._on_bad = on_bad
        self._parse = LineParser(reading.text_field) if file_format(file, reading) == "jsonl" else None
        self._rule: RecordRule = RULES["line" if self._parse else reading.sample_by]
        self._records = Records(stream, self._rule, start, end)

    def __iter__(self) -> Iterator[DocumentBatch]:
        limit = LONGEST_LINE if self._parse else LONG if self._cuts else None
        while not self._records.done:
            for run in self._records.runs(limit):
                batch = self._batch(run)
                if self._cuts is None or len(run.data) <= LONG:  # and no text is longer than its record
                    yield batch
                else:
                    yield from in_parts(batch, self._cuts, self._file.path, self._on_bad)
            if not self._records.done:
                yield from self._long()
        if self._start == self._records.offset == 0:
            self._on_bad(empty(self._file))

    def _batch(self, run: Run) -> DocumentBatch:
        """The documents of a run. Those that start after the range belong to the next one."""
        starts, stops = self._rule.split(run.data)
        if self._end is not None:
            own = int(np.searchsorted(starts, self._end - run.offset))
            starts, stops = starts[:own], stops[:own]
        try:
            texts = self._texts(run.data, starts, stops)
        except (UnicodeDecodeError, BadLineError):
            texts, starts, stops = self._good(run, starts, stops)
        return DocumentBatch(texts, starts + run.offset, stops - starts)

    def _texts(self, data: bytes, starts: Places, stops: Places) -> list[str]:
        """The texts of the records there, the first ones in `data`."""
        if self._parse is None:
            return self._rule.decode(data, starts, stops)
        # Decoded together, one character of another script would make each line two or four times as large.
        return list(map(self._parse, data[: stops[-1]].split(b"\n"))) if len(starts) else []

    def _good(self, run: Run, starts: Places, stops: Places) -> tuple[list[str], Places, Places]:
        """The records of a run that are good. The others are reported."""
        texts, kept = [], []
        for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            try:
                record = run.data[start:stop]
                texts.append(record.decode("utf-8") if self._parse is None else self._parse(record))
                kept.append(number)
            except UnicodeDecodeError as error:
                bad = start + error.start
                self._report_bytes(error, run.offset + bad, run.lines + run.data.count(b"\n", 0, bad))
            except BadLineError as error:
                lines = run.lines + run.data.count(b"\n", 0, start)
                self._report(error.reason, run.offset + start, lines, error.hint)
        return texts, starts[kept], stops[kept]

    def _long(self) -> Iterator[DocumentBatch]:
        """The long record that comes next."""
        records = self._records
        begun, lines = records.offset, records.lines
        if self._cuts is None or self._parse is not None:
            hint = "break it up, or leave it out"
            self._report(f"a line of more than {LONGEST_LINE >> 20} MiB", begun, lines, hint)
            records.skip()
            return
        given = False
        try:
            for part in records.parts(self._cuts):
                given = part.more
                yield single(*part)
        except BadBytesError as error:
            bad = error.error.start
            newlines = error.lines + error.error.object.count(b"\n", 0, bad)
            self._report_bytes(error.error, error.offset + bad, newlines)
        except NoPlaceToCutError:
            self._on_bad(no_place_to_cut(self._file.path, begun))
        else:
            return
        if given:
            yield forgotten()
        if records.inside:
            records.skip()

    def _report_bytes(self, error: UnicodeDecodeError, offset: int, lines: int) -> None:
        reason = f"byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason})"
        self._report(reason, offset, lines, "convert the file to UTF-8, for instance with iconv")

    def _report(self, reason: str, offset: int, lines: int, hint: str) -> None:
        before = self._lines_before
        line = None if before is None else before + lines + 1
        self._on_bad(DataError(reason, file=self._file.path, line=line, offset=offset, hint=hint))

    @cached_property
    def _lines_before(self) -> int | None:
        """Newlines before the range, or None where counting them would mean to read too much again."""
        return None if self._start > COUNTED else newlines(self._file, max(self._start - 1, 0))


def empty(file: SourceFile) -> DataError:
    """What is wrong with a file that holds nothing: mostly it was not written to its end."""
    hint = (
        "leave it out of data.train; or, with data.mode: prepared, "
        "`launcher data prepare RUN --skip-bad` passes over all that is bad"
    )
    return DataError("the file is empty", file=file.path, offset=0, hint=hint)


def newlines(file: SourceFile, end: int) -> int:
    """How many newlines the first `end` bytes hold."""
    with opened(file) as stream:
        count, left = 0, end
        while left > 0 and (chunk := stream.read(min(left, CHUNK))):
            count += chunk.count(b"\n")
            left -= len(chunk)
        return count
