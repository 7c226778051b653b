"""Text files as documents: list them, open them through any compression, read any byte range.

Offsets count bytes of the decompressed stream. A range `[start, end)` owns the records that start in
it, so the ranges of a file can be read apart, by anyone, and together give the file's documents.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from fsspec.implementations.local import LocalFileSystem

from launcher.data.zstd import ZstdDamageError, ZstdReader
from launcher.errors import DataError, RequestError

SUFFIXES: Mapping[str, str] = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
JSON_LINES = frozenset({".jsonl", ".json", ".ndjson"})
CHUNK = 1 << 20
FILES = LocalFileSystem()
"""Every listing and every byte of text comes through here: fsspec's interface, whatever lies behind it."""

SampleBy = Literal["line", "paragraph", "document"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of text: absolute path, size in bytes as stored, and a tag that changes when it does."""

    path: str
    size: int
    etag: str

    @property
    def compression(self) -> str | None:
        """The compression its name says, or None."""
        return SUFFIXES.get(Path(self.path).suffix.lower())


@dataclass(frozen=True, slots=True)
class Reading:
    """How files become documents: the keys of `data` that say so."""

    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    sample_by: SampleBy = "line"
    text_field: str = "text"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, and where its record lies in the decompressed file, in bytes."""

    text: str
    offset: int
    length: int

    @property
    def empty(self) -> bool:
        """Nothing but white space: counted, never stored."""
        return not self.text or self.text.isspace()


def list_files(patterns: Sequence[str]) -> list[SourceFile]:
    """The files that paths and globs (`**` for any depth) name: sorted by path, each once.

    As in a shell, a wildcard does not match a leading dot. Raises DataError for a pattern that
    matches no file, and RequestError for a URL.
    """
    found: dict[Path, SourceFile] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            # Links are followed to tell the same file, but it is read by the name it was given.
            found.setdefault(Path(path).resolve(), SourceFile(path, *_mark(path)))
    return sorted(found.values(), key=lambda file: file.path)


def _matches(pattern: str) -> Iterator[str]:
    if "://" in pattern:
        raise RequestError(f"{pattern}: this version reads local files only", hint="copy the files here")
    literal = Path(pattern).expanduser()
    if literal.is_dir():
        raise DataError(f"{pattern} is a folder", hint=f"to read every file in it: {literal / '**'}")
    names = [str(literal)] if literal.is_file() else FILES.glob(str(literal))
    files = [str(Path(name).absolute()) for name in names if Path(name).is_file()]
    files = [file for file in files if not _hidden(file, pattern)]
    if not files:
        hint = f"check the path, from {Path.cwd()}"
        raise DataError(f"no file matches {pattern}", hint=hint, key="data.train")
    yield from files


def _hidden(file: str, pattern: str) -> bool:
    """Whether the file is, or lies in, something with a leading dot that the pattern does not spell out."""
    root = Path(pattern.partition("*")[0]).expanduser().absolute()
    below = Path(file).relative_to(root) if Path(file).is_relative_to(root) else Path(Path(file).name)
    return any(part.startswith(".") and part not in Path(pattern).parts for part in below.parts)


def _mark(path: str) -> tuple[int, str]:
    """Size in bytes, and what changes when the file does."""
    status: dict[str, Any] = FILES.info(path)
    return int(status["size"]), repr(status["mtime"])


def changed(file: SourceFile) -> bool:
    """Whether the file on disk is no longer the one that was listed."""
    return _mark(file.path) != (file.size, file.etag)


def file_format(file: SourceFile, reading: Reading) -> Literal["text", "jsonl"]:
    """How this file is read; `auto` goes by its name. Raises RequestError for parquet."""
    kind = reading.format
    if kind == "auto":
        name = Path(file.path)
        suffix = (name.with_suffix("") if file.compression else name).suffix.lower()
        kind = "jsonl" if suffix in JSON_LINES else "parquet" if suffix == ".parquet" else "text"
    if kind == "parquet":
        raise RequestError(f"{file.path}: parquet is not read in this version", hint="convert it to jsonl")
    return kind


def splittable(file: SourceFile, reading: Reading) -> bool:
    """Whether ranges of the file can be read apart."""
    whole = reading.sample_by == "document" and file_format(file, reading) == "text"
    return file.compression is None and not whole


def documents(
    file: SourceFile, reading: Reading, start: int = 0, end: int | None = None
) -> Iterator[Document]:
    """The documents that start in bytes `[start, end)` of the decompressed file, in order.

    Empty ones are among them: whoever stores documents counts those and leaves them out. A file that is
    not splittable is read whole or not at all. Raises DataError, with file and place, for text that is
    not UTF-8, a damaged or truncated compressed file, and a line of jsonl without its text.
    """
    if file_format(file, reading) == "jsonl":
        records, parse = _lines(file, start, end), _json_text(reading.text_field)
    elif reading.sample_by == "line":
        records, parse = _lines(file, start, end), _plain_text
    elif reading.sample_by == "paragraph":
        records, parse = _paragraphs(file, start, end), _plain_text
    else:
        records, parse = _whole(file), _plain_text
    for offset, record in records:
        try:
            text = parse(record)
        except UnicodeDecodeError as error:
            bad = offset + error.start
            reason = f"byte 0x{record[error.start]:02x} is not UTF-8 ({error.reason})"
            hint = "convert the file to UTF-8, for instance with iconv"
            line = line_number(file, bad)
            raise DataError(reason, file=file.path, line=line, offset=bad, hint=hint) from None
        except _BadLineError as error:
            line = line_number(file, offset)
            raise DataError(error.reason, file=file.path, line=line, hint=error.hint) from None
        yield Document(text, offset, len(record))


def line_number(file: SourceFile, offset: int) -> int:
    """The line, from 1, that byte `offset` lies in. Reads the file up to there: for messages only."""
    with _opened(file) as stream:
        newlines, left = 0, offset
        while left > 0 and (chunk := stream.read(min(left, CHUNK))):
            newlines += chunk.count(b"\n")
            left -= len(chunk)
        return newlines + 1


class _BadLineError(Exception):
    """A line of jsonl that holds no text."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def _plain_text(record: bytes) -> str:
    return record.decode("utf-8")


def _json_text(field: str) -> Callable[[bytes], str]:
    expected = f'jsonl has one object a line: {{"{field}": "..."}}'

    def parse(record: bytes) -> str:
        line = record.decode("utf-8")
        if not line or line.isspace():
            return ""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadLineError(f"not JSON: {error}", expected) from None
        if not isinstance(value, dict):
            raise _BadLineError(f"a JSON {_json_type(value)}, not an object", expected)
        if field not in value:
            fields = ", ".join(map(repr, value)) or "none"
            raise _BadLineError(f"no field {field!r} among {fields}", "set data.text_field to one of them")
        text = value[field]
        if not isinstance(text, str):
            reason = f"field {field!r} is of type {_json_type(text)}, not string"
            raise _BadLineError(reason, "set data.text_field to the text's field")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _BadLineError(f"field {field!r} holds half a surrogate pair", "repair the escape") from None
        return text

    return parse


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "boolean", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "number")


def _lines(file: SourceFile, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    for offset, line in _raw_lines(file, start, end):
        if offset >= start:
            yield offset, _without_ending(line)


def _paragraphs(file: SourceFile, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Runs of lines between blank ones. A run begun before `start` belongs to the range before."""
    lines = _raw_lines(file, start, None)
    after_blank = True
    if start > 0:
        _, rest = next(lines, (start, b""))
        after_blank = not rest.strip() and _blank_before(file, start - 1)
    begun = start
    run: list[bytes] = []
    for offset, line in lines:
        if not line.strip():
            if run:
                yield begun, _without_ending(b"".join(run))
            after_blank, run = True, []
        elif run:
            run.append(line)
        elif after_blank and (end is None or offset < end):
            begun, run = offset, [line]
        if not run and end is not None and offset + len(line) >= end:
            return
    if run:
        yield begun, _without_ending(b"".join(run))


def _blank_before(file: SourceFile, position: int) -> bool:
    """Whether the line that holds byte `position` is blank up to there; reads back no further than needed."""
    with _opened(file) as stream:
        while position > 0:
            size = min(position, 4096)
            stream.seek(position - size)
            before = stream.read(size)
            line = before[before.rfind(b"\n") + 1 :]
            if line.strip():
                return False
            if len(line) < size:
                return True
            position -= size
        return True


def _whole(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    with _opened(file) as stream:
        yield 0, stream.read()


def _raw_lines(file: SourceFile, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its ending) from the line that holds byte `start - 1`, cut to begin there."""
    offset = max(start - 1, 0)
    with _opened(file) as stream:
        if offset:
            stream.seek(offset)
        while end is None or offset < end:
            line = stream.readline()
            if not line:
                return
            yield offset, line
            offset += len(line)


def _without_ending(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line


@contextmanager
def _opened(file: SourceFile) -> Iterator[BinaryIO]:
    """The decompressed stream. What goes wrong in reading it becomes a DataError with the place reached."""
    reached = 0
    try:
        with FILES.open(file.path, "rb") as opened, io.BufferedReader(opened, CHUNK) as raw:
            if file.compression and not file.size:
                raise EOFError("the file is empty")
            stream = _decompressed(raw, file.compression)
            try:
                yield stream
            finally:
                reached = stream.tell()
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ZstdDamageError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot be read: {error.strerror}", file=file.path) from error
        damage = "truncated" if isinstance(error, EOFError) else "damaged"
        reason = f"{damage} {file.compression} file ({error})"
        hint = "get the file again, or leave it out of data.train"
        raise DataError(reason, file=file.path, offset=reached, hint=hint) from error


def _decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    match compression:
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case "bz2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case "xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case "zstd":
            return cast(BinaryIO, io.BufferedReader(ZstdReader(raw), CHUNK))
        case _:
            return raw
