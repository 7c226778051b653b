"""Files that a crash leaves whole or not there at all, and what tells one from another."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mark:
    """What a file must be: its size in bytes and the sha256 of its content."""

    size: int
    sha256: str


def mark_of(path: Path) -> Mark:
    """Reads the whole file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return Mark(stream.tell(), digest.hexdigest())


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, survive a crash. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Output:
    """A file being written, marked as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, part: bytes | memoryview) -> None:
        """Append; raises OSError."""
        self._stream.write(part)
        self._digest.update(part)
        self._size += len(part)

    def finish(self) -> Mark:
        """Have it on disk, whole. Raises OSError."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return Mark(self._size, self._digest.hexdigest())

    def discard(self) -> None:
        """Remove it."""
        # Closing writes what is buffered, and fails where writing did: there is nothing to save.
        with contextlib.suppress(OSError):
            self._stream.close()
        self.path.unlink(missing_ok=True)


def write_whole(path: Path, parts: Iterable[bytes]) -> Mark:
    """Write a file that is either not there, or as it was, or whole: under a temporary name, seen to disk,
    then renamed. Raises OSError."""
    output = Output(path.with_name(f".{path.name}.{os.getpid()}"))
    try:
        for part in parts:
            output.write(part)
        mark = output.finish()
    except BaseException:
        output.discard()
        raise
    output.path.replace(path)
    return mark
