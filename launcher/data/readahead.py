"""Reading ahead: the bytes of a remote file, fetched in the background while the last ones are used."""

from __future__ import annotations

import io
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.data.remote import READING_SECONDS, Patience, file_system, mark, shown
from launcher.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FIRST = 256 << 10  # bytes asked for after a seek: there may be another soon
BLOCK = 8 << 20  # and later on, four times as many each time up to this
AHEAD = 2  # blocks that are fetched or wait to be read


class RemoteStream(io.RawIOBase):
    """A remote file that can be read and sought, as long as it is what was listed.

    Fetches no further than byte `until`, unless read beyond. What passes is waited out and the rest asked
    for from where it broke off. Raises DataError and MachineError as `Patience` does, and DataError for a
    file that is not the one of that size and etag.
    """

    def __init__(self, url: str, size: int, etag: str, until: int | None = None) -> None:
        self._size = size
        self._until = size if until is None else min(until, size)
        self._position = 0
        self._start = 0
        self._block = memoryview(b"")
        self._ahead: deque[_Asked] = deque()
        self._length = FIRST
        self._closing = threading.Event()
        self._fetch = _Fetcher(url, size, etag, self._closing)
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._position >= self._size:
            return 0
        if not self._start <= self._position < self._start + len(self._block):
            self._turn()
        target = memoryview(buffer).cast("B")
        begin = self._position - self._start
        count = min(len(target), len(self._block) - begin)
        target[:count] = self._block[begin : begin + count]
        self._position += count
        return count

    def close(self) -> None:
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _turn(self) -> None:
        """Hold the block that begins at the position."""
        if not self._ahead or self._ahead[0].start != self._position:
            for asked in self._ahead:
                asked.block.cancel()
            self._ahead.clear()
            self._length = FIRST
            self._ask(self._position)
        self._ask_ahead()
        self._block = memoryview(b"")  # not held while the next one comes
        asked = self._ahead.popleft()
        self._start, self._block = asked.start, memoryview(asked.block.result())
        self._ask_ahead()

    def _ask_ahead(self) -> None:
        while len(self._ahead) < AHEAD and (self._ahead and (end := self._ahead[-1].end) < self._until):
            self._ask(end)

    def _ask(self, start: int) -> None:
        end = min(start + self._length, self._until if start < self._until else self._size)
        self._length = min(4 * self._length, BLOCK) if start < self._until else FIRST
        self._ahead.append(_Asked(start, end, self._thread.submit(self._fetch, start, end)))


class _Asked(NamedTuple):
    """Bytes `[start, end)` on their way."""

    start: int
    end: int
    block: Future[bytes]


class _Fetcher:
    """Gets bytes of one file, in one thread."""

    def __init__(self, url: str, size: int, etag: str, closing: threading.Event) -> None:
        self._url = url
        self._listed = size, etag
        self._closing = closing
        self._opened: Any = None
        self._whole = False

    def __call__(self, start: int, end: int) -> bytes:
        """Bytes `[start, end)`, with patience."""
        patience = Patience(self._url, READING_SECONDS, self._closing.wait)
        pieces = []
        most = end - start
        while start < end and not self._closing.is_set():
            try:
                piece = self._some(start, min(most, end - start))
            except Exception as error:  # noqa: BLE001 - it is judged there, and raised
                self._let_go()
                patience.bear(error)
                most = FIRST  # a line that breaks may carry a little
            else:
                pieces.append(piece)
                start += len(piece)
                patience.renew()
        return b"".join(pieces)

    def _some(self, start: int, count: int) -> bytes:
        """At least one byte from `start` on."""
        if not self._whole:
            try:
                return self._of_a_range(start, count)
            except ValueError:  # fsspec's word for a server that gives no ranges
                self._let_go()
                self._whole = True
        return self._of_the_whole(start, count)

    def _of_a_range(self, start: int, count: int) -> bytes:
        opened = self._open(block_size=BLOCK, cache_type="none")
        opened.seek(start)
        return self._next(opened, count)

    def _of_the_whole(self, start: int, count: int) -> bytes:
        """The same from a stream that only goes forwards, begun again where need be."""
        if self._opened is not None and self._opened.tell() > start:
            self._let_go()
        opened = self._open(block_size=0)
        while opened.tell() < start:
            self._next(opened, start - opened.tell())
        return self._next(opened, count)

    def _next(self, opened: Any, count: int) -> bytes:
        piece: bytes = opened.read(min(count, BLOCK))
        if not piece:
            raise EOFError("the connection ended early")
        return piece

    def _open(self, **how: Any) -> Any:
        if self._opened is None:
            system = file_system(self._url)
            if mark(system, self._url) != self._listed:
                hint = "run again when nothing writes to it"
                raise DataError("changed since it was listed", file=shown(self._url), hint=hint)
            self._opened = system.open(self._url, "rb", **how)
        return self._opened

    def _let_go(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()
