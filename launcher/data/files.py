"""Files of text, wherever they are: list them, open them through any compression, notice when they change."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from launcher.data.zstd import ZstdDamageError, ZstdReader
from launcher.errors import DataError, RequestError

SUFFIXES: Mapping[str, str] = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
CHUNK = 1 << 20
FILES = LocalFileSystem()


class DamagedFileError(DataError):
    """A file whose bytes make no sense from some place on; what came before them is good."""


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

    @property
    def suffix(self) -> str:
        """The end of its name that says how it is read, in small letters: `.jsonl` of `a.JSONL.gz`."""
        name = Path(self.path)
        return (name.with_suffix("") if self.compression else name).suffix.lower()


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


@contextmanager
def opened(file: SourceFile) -> Iterator[BinaryIO]:
    """The decompressed stream; it can be sought where there is no compression.

    Raises DataError for a file that cannot be read, and DamagedFileError, with the place reached, for one
    that is damaged or cut off.
    """
    reached = 0
    try:
        with FILES.open(file.path, "rb") as stored, io.BufferedReader(stored, CHUNK) as raw:
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
        raise DamagedFileError(reason, file=file.path, offset=reached, hint=hint) from error


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
