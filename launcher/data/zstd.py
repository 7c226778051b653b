"""Zstandard as a stream that notices a missing end.

The reader of the `zstandard` package, and so fsspec's, ends quietly both after the first frame of a file
made of several and where a file was cut off; either way text would be lost without a word.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

from launcher.errors import MachineError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 1 << 18


class ZstdDamageError(Exception):
    """The compressed bytes make no sense."""


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of a file of one or more zstd frames, forwards only.

    Raises EOFError where the file ends inside a frame, ZstdDamageError where it is damaged, MachineError
    when the `zstandard` package is missing.
    """

    def __init__(self, source: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise MachineError(
                "reading zstd files needs the zstandard package", hint="pip install zstandard"
            ) from None
        self._zstd = zstandard
        self._source = source
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(b"")
        self._frames = 0
        self._inside = False
        self._position = 0

    def tell(self) -> int:
        """Decompressed bytes handed out."""
        return self._position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._advance():
                return 0
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self._position += count
        return count

    def _advance(self) -> bool:
        """Decompress some more; False at the end of the last frame."""
        data = self._frame.unused_data if self._frame.eof else b""
        data = data or self._source.read(CHUNK)
        if not data:
            if self._inside or not self._frames:
                raise EOFError("the file ends inside a zstd frame")
            return False
        if self._frame.eof:
            self._frame = self._zstd.ZstdDecompressor().decompressobj()
        self._inside = True
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except self._zstd.ZstdError as error:
            raise ZstdDamageError(str(error)) from None
        if self._frame.eof:
            self._inside = False
            self._frames += 1
        return True
