"""bz2, xz and zstd as streams that notice a missing end, and what does not belong there.

Such a file is one frame after another. Python's readers of bz2 and xz take a damaged frame after the first
for the end of the file; that of the `zstandard` package, and so fsspec's, ends after the first frame, and
where a file was cut off. Either way text would be lost without a word.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Protocol

from launcher.errors import MachineError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 1 << 18
LARGEST_WINDOW = 1 << 31  # of zstd --long=31: as much memory as the file was made with, and only then


class ZstdDamageError(Exception):
    """The compressed bytes make no sense."""


class Frame(Protocol):
    """What decompresses one frame, as `bz2.BZ2Decompressor` and `lzma.LZMADecompressor` do."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


class FrameReader(io.RawIOBase):
    """The decompressed bytes of a file of one or more frames, forwards only. `padding`: between and after
    them there may be zero bytes, in groups of so many.

    Raises EOFError where the file ends inside a frame, and what the frame raises where it is damaged.
    """

    def __init__(self, source: BinaryIO, begin: Callable[[], Frame], padding: int = 0) -> None:
        self._source = source
        self._begin = begin
        self._padding = padding
        self._frame = begin()
        self._ready = memoryview(b"")
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
        data = b""
        if self._frame.eof:
            if not (data := self._after_frame()):
                return False
            self._frame = self._begin()
        elif self._frame.needs_input and not (data := self._source.read(CHUNK)):
            raise EOFError("it ends inside a frame")
        self._ready = memoryview(self._frame.decompress(data, CHUNK))
        return True

    def _after_frame(self) -> bytes:
        """What follows a frame, without padding; nothing at the end of the file."""
        data = self._frame.unused_data or self._source.read(CHUNK)
        while self._padding and data.startswith(b"\0" * self._padding):
            zeros = len(data) - len(data.lstrip(b"\0"))
            data = data[zeros - zeros % self._padding :] or self._source.read(CHUNK)
        return data


class ZstdFrame:
    """A frame of zstd. Raises ZstdDamageError where it is damaged, MachineError when the `zstandard` package
    is missing."""

    needs_input = True

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise MachineError(
                "reading zstd files needs the zstandard package", hint="pip install zstandard"
            ) from None
        self._error = zstandard.ZstdError
        self._frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, _max_length: int = -1, /) -> bytes:
        """All that the data gives: the package has no other way to see where a frame ends."""
        try:
            return self._frame.decompress(data)
        except self._error as error:
            raise ZstdDamageError(str(error)) from None
