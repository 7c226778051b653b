"""Files of text, wherever they are: list them, open them through any compression, notice when they change."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from zipfile import BadZipFile

from fsspec.implementations.local import LocalFileSystem

from launcher.config.addresses import is_url
from launcher.config.secrets import NO_SECRETS, secret_in
from launcher.data import remote
from launcher.data.data_sets import hub_files, is_on_the_hub, saved_files
from launcher.data.frames import Frame, FrameReader, ZstdDamageError, ZstdFrame
from launcher.data.readahead import RemoteStream
from launcher.errors import DataError, RequestError

SUFFIXES: Mapping[str, str] = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
CHUNK = 1 << 20
LOOKED_UP_AT_ONCE = 16  # remote files whose size is asked for at the same time
FILES = LocalFileSystem()

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class DamagedFileError(DataError):
    """A file whose bytes make no sense from some place on; what came before them is good."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of text: absolute path or URL, size in bytes as stored, and a tag that changes when it does.

    `ranges`: parts of it can be asked for.
    """

    path: str
    size: int
    etag: str
    ranges: bool = True

    @property
    def compression(self) -> str | None:
        """The compression its name says, or None."""
        return SUFFIXES.get(self._name.suffix.lower())

    @property
    def suffix(self) -> str:
        """The end of its name that says how it is read, in small letters: `.jsonl` of `a.JSONL.gz`."""
        name = self._name
        return (name.with_suffix("") if self.compression else name).suffix.lower()

    @property
    def packed(self) -> bool:
        """Whether it is a member of an archive."""
        return "::" in self.path

    @property
    def _name(self) -> Path:
        """A URL's path, or the member's in an archive, without what a web address says after it."""
        first = self.path.partition("::")[0]
        web = first.startswith(("http://", "https://"))
        return Path(re.split(r"[?#]", first)[0] if web else first)


def list_files(patterns: Sequence[str]) -> list[SourceFile]:
    """The files that paths, URLs and globs (`**` for any depth) name: sorted by path, each once.

    As in a shell, a wildcard does not match a leading dot. Raises DataError for a pattern that matches no
    file, for a file that may not be read and for a name that is not UTF-8, RequestError for a URL that nobody
    reads or that holds a secret, MachineError for a server that does not answer or an extra that is not
    installed.
    """
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        if is_url(pattern):
            found |= {file.path: file for file in _of_url(pattern)}
            continue
        for path in _matches(pattern):
            if path != path.encode(errors="ignore").decode():
                hint = "rename it: what is recorded of it is UTF-8"
                raise DataError("the name is not UTF-8", file=ascii(path), hint=hint)
            # Links are followed to tell the same file, but it is read by the name it was given.
            found.setdefault(str(Path(path).resolve()), SourceFile(path, *_mark(path)))
    return sorted(found.values(), key=lambda file: file.path)


def _matches(pattern: str) -> Iterator[str]:
    literal = Path(pattern).expanduser()
    if literal.is_dir() and (saved := saved_files(literal)) is not None:
        yield from (str(path.absolute()) for path in saved)
        return
    if literal.is_dir():
        raise DataError(f"{pattern} is a folder", hint=f"to read every file in it: {literal / '**'}")
    names = [str(literal)] if literal.is_file() else FILES.glob(str(literal))
    files = [str(Path(name).absolute()) for name in names if Path(name).is_file()]
    files = [file for file in files if not _hidden(file, pattern)]
    if not files:
        raise _no_match(pattern, f"check the path, from {Path.cwd()}")
    yield from files


def _of_url(pattern: str) -> list[SourceFile]:
    if secret := secret_in(pattern):
        raise RequestError(f"{remote.shown(pattern)}: {secret}", hint=NO_SECRETS)
    member, chained, archive = pattern.partition("::")
    if chained:
        if not member.startswith("zip://") or "::" in archive:
            hint = "only a member of a zip archive is read inside another file: zip://MEMBER::URL"
            raise RequestError(f"{pattern}: this chain of URLs is not read", hint=hint)
        return _of_archive(member.removeprefix("zip://"), archive)
    system = remote.file_system(pattern)
    infos = remote.persist(pattern, lambda: remote.listed(system, pattern))
    if is_on_the_hub(pattern):
        infos = hub_files(system, pattern)
    files = [info for info in infos if info["type"] == "file" and not _hidden_url(info["name"], pattern)]
    if not files and any(info["type"] == "directory" for info in infos):
        every = f"{pattern.rstrip('/')}/**"
        raise DataError(f"{pattern} is a folder", hint=f"to read every file in it: {every}")
    if not files:
        raise _no_match(pattern, "check the address")
    with ThreadPoolExecutor(LOOKED_UP_AT_ONCE) as pool:
        return list(pool.map(lambda info: _remote_file(system, info), files))


def _remote_file(system: AbstractFileSystem, info: Mapping[str, Any]) -> SourceFile:
    url = str(system.unstrip_protocol(info["name"]))
    if info.get("size") is None:
        info = remote.persist(url, lambda: system.info(url))
    size, etag = remote.mark_of(info, url)
    ranges = remote.persist(url, lambda: remote.gives_ranges(system, url, size))
    return SourceFile(url, size, etag, ranges)


def _no_match(pattern: str, hint: str) -> DataError:
    return DataError(f"no file matches {pattern}", hint=hint)


def _hidden(file: str, pattern: str) -> bool:
    """Whether the file is, or lies in, something with a leading dot that the pattern does not spell out."""
    root = Path(pattern.partition("*")[0]).expanduser().absolute()
    below = Path(file).relative_to(root) if Path(file).is_relative_to(root) else Path(Path(file).name)
    return _hides(below.parts, Path(pattern).parts)


def _hidden_url(name: str, pattern: str) -> bool:
    return _hides(name.split("/"), pattern.split("/"))


def _hides(parts: Sequence[str], spelt: Sequence[str]) -> bool:
    """Whether a part has a leading dot that none of the pattern's parts spells out."""
    dotted = [each for each in spelt if each.startswith(".")]
    return any(
        part.startswith(".") and part not in dotted and not any(fnmatchcase(part, each) for each in dotted)
        for part in parts
    )


def _mark(path: str) -> tuple[int, str]:
    """Size in bytes, and what changes when the file does."""
    status: dict[str, Any] = FILES.info(path)
    return int(status["size"]), repr(status["mtime"])


def changed(file: SourceFile) -> bool:
    """Whether the file is no longer the one that was listed, or no longer there."""
    try:
        return _marked(file.path) != (file.size, file.etag)
    except FileNotFoundError:
        return True


def _marked(path: str) -> tuple[int, str]:
    """Size and tag of what is there now."""
    member, chained, archive = path.partition("::")
    if chained:
        with _archive(archive) as (system, tag):
            return _mark_of_member(system.info(member), tag)
    if is_url(path):
        system = remote.file_system(path)
        return remote.persist(path, lambda: remote.mark(system, path))
    return _mark(path)


# Archives


def _of_archive(pattern: str, archive: str) -> list[SourceFile]:
    archive = archive if is_url(archive) else str(Path(archive).expanduser().absolute())
    with _archive(archive) as (system, tag):
        found = system.glob(pattern, detail=True)
        files = [
            SourceFile(f"zip://{name}::{archive}", *_mark_of_member(info, tag), ranges=False)
            for name, info in found.items()
            if info["type"] == "file" and not _hidden_url(name, pattern)
        ]
    if not files:
        raise _no_match(f"zip://{pattern}::{archive}", "check the names in the archive, with unzip -l")
    return files


def _mark_of_member(info: Mapping[str, Any], tag: str) -> tuple[int, str]:
    return int(info["size"]), f"{tag} {info['CRC']:08x}"


@contextmanager
def _archive(path: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """The files in a zip archive, and the archive's own tag."""
    from fsspec.implementations.zip import ZipFileSystem

    try:
        size, tag = _marked(path)
    except FileNotFoundError:
        raise _no_match(path, f"check the path, from {Path.cwd()}") from None
    with _stored(SourceFile(path, size, tag)) as raw:
        try:
            system = ZipFileSystem(fo=raw)
        except BadZipFile as error:
            hint = "get the file again, or leave it out of data.train"
            raise DataError(f"damaged zip archive ({error})", file=path, hint=hint) from None
        yield system, tag


# Opening


@contextmanager
def opened(file: SourceFile, until: int | None = None) -> Iterator[BinaryIO]:
    """The decompressed stream; it can be sought where there is no compression.

    Nothing far beyond byte `until` is fetched unless read. Raises DataError for a file that cannot be read,
    or is remote and not the one that was listed, MachineError where a server stops answering, and
    DamagedFileError, with the place reached, for a file that is damaged or cut off.
    """
    reached = 0
    try:
        with _stored(file, until) as raw:
            if file.compression and not file.size:
                raise EOFError("the file is empty")
            stream = _decompressed(raw, file.compression)
            try:
                yield stream
            finally:
                reached = stream.tell()
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ZstdDamageError, BadZipFile) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot be read: {error.strerror}", file=file.path) from error
        damage = "truncated" if isinstance(error, EOFError) else "damaged"
        kind = file.compression or "zip"
        reason = f"{damage} {kind} file ({error})"
        hint = "get the file again, or leave it out of data.train"
        raise DamagedFileError(reason, file=file.path, offset=reached, hint=hint) from error


@contextmanager
def _stored(file: SourceFile, until: int | None = None) -> Iterator[BinaryIO]:
    """The bytes as they are stored, wherever that is."""
    member, chained, archive = file.path.partition("::")
    if chained:
        with _archive(archive) as (system, tag):
            if _mark_of_member(system.info(member), tag) != (file.size, file.etag):
                hint = "run again when nothing writes to it"
                raise DataError("changed since it was listed", file=file.path, hint=hint)
            with system.open(member, "rb") as raw:
                yield cast(BinaryIO, raw)
    elif is_url(file.path):
        with io.BufferedReader(RemoteStream(file.path, file.size, file.etag, until), CHUNK) as raw:
            yield raw
    else:
        with FILES.open(file.path, "rb") as raw, io.BufferedReader(raw, CHUNK) as buffered:
            yield buffered


def _decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    match compression:
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case "bz2":
            return _by_frames(raw, bz2.BZ2Decompressor)
        case "xz":
            return _by_frames(raw, lzma.LZMADecompressor, padding=4)
        case "zstd":
            return _by_frames(raw, ZstdFrame)
        case _:
            return raw


def _by_frames(raw: BinaryIO, begin: Callable[[], Frame], padding: int = 0) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(FrameReader(raw, begin, padding), CHUNK))
