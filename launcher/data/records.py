"""Where records begin and end in a stream of bytes, which is never held whole: lines, paragraphs, files.

A range `[start, end)` owns the records that start in it, so the ranges of a file can be read apart, by
anyone, and together give the file's records.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.data.batches import BATCH, UNCUT, Cuts

NEWLINE, RETURN = 10, 13
LOOK_BACK = 4096
TAIL = 64 << 10  # bytes read at once after the end of a range, at least
MOST = 16 << 20  # bytes read at once where more than that is held
WHITE = b" \t\n\r\x0b\x0c"
_BLANKS = re.compile(rb"(?:[ \t\r\x0b\x0c]*+\n)*+")
_GAP = re.compile(rb"\n(?:[ \t\r\x0b\x0c]*+\n)++")
_BREAK = re.compile(rb"\n[ \t\r\x0b\x0c]*+\n")
_LAST_BREAK = re.compile(rb"\n[ \t\r\x0b\x0c]*+\Z")

Places = NDArray[np.int64]


class Run(NamedTuple):
    """Whole records with what ends them: the bytes, where they begin, and the newlines before them."""

    data: bytes
    offset: int
    lines: int


class Part(NamedTuple):
    """A part of a long record: its text, where its bytes begin, and how many they are."""

    text: str
    offset: int
    length: int
    more: bool


class BadBytesError(Exception):
    """Bytes of a long record that are not UTF-8: those decoded begin at `offset`, after `lines` newlines."""

    def __init__(self, error: UnicodeDecodeError, offset: int, lines: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.offset = offset
        self.lines = lines


class NoPlaceToCutError(Exception):
    """A long record without a place to cut it."""


class RecordRule(Protocol):
    """How the bytes of a file fall into records."""

    def leading(self, held: bytes) -> int:
        """How many bytes before the first record belong to none."""

    def some_end(self, held: bytes) -> int:
        """The end of a record in `held`, the later the better, with all that ends it; 0 where none ends."""

    def first_end(self, held: bytes) -> int:
        """The end of the first record in `held`, with all that ends it; 0 where none ends."""

    def split(self, data: bytes) -> tuple[Places, Places]:
        """Where each record in `data` starts and stops, without what ends it."""

    def decode(self, data: bytes, starts: Places, stops: Places) -> list[str]:
        """The texts of the records there, the first ones in `data`. Raises UnicodeDecodeError."""

    def body(self, data: bytes) -> bytes:
        """`data`, which ends one record, without what ends it."""

    def breaks_before(self, stream: BinaryIO, position: int) -> bool:
        """Whether a newline that only white space parts from byte `position` would end a record."""


class Lines:
    """A record is a line; it ends with a newline, and a carriage return before it."""

    def leading(self, held: bytes) -> int:
        return 0

    def some_end(self, held: bytes) -> int:
        return held.rfind(b"\n") + 1

    def first_end(self, held: bytes) -> int:
        return held.find(b"\n") + 1

    def split(self, data: bytes) -> tuple[Places, Places]:
        stops = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == NEWLINE)
        starts = np.concatenate(([0], stops + 1))
        stops = stops - _returns(data, starts[:-1], stops)
        if data.endswith(b"\n"):
            return starts[:-1], stops
        return starts, np.append(stops, len(data))

    def decode(self, data: bytes, starts: Places, stops: Places) -> list[str]:
        if not len(starts):
            return []
        # Once for all: several times as fast as line by line.
        text = data[: stops[-1]].decode("utf-8")
        return (text.replace("\r\n", "\n") if "\r" in text else text).split("\n")

    def body(self, data: bytes) -> bytes:
        return _without_ending(data)

    def breaks_before(self, stream: BinaryIO, position: int) -> bool:
        return False


class Paragraphs:
    """A record is a run of lines between blank ones, without the ending of its last line."""

    def leading(self, held: bytes) -> int:
        return _end(_BLANKS.match(held))

    def some_end(self, held: bytes) -> int:
        for ending in (b"\n\n", b"\n\r\n"):
            if (place := held.rfind(ending)) >= 0:
                return place + len(ending)
        return max((found.end() for found in _BREAK.finditer(held)), default=0)

    def first_end(self, held: bytes) -> int:
        return _end(_BREAK.search(held))

    def split(self, data: bytes) -> tuple[Places, Places]:
        start = self.leading(data)
        gaps = np.array([gap.span() for gap in _GAP.finditer(data, start)], dtype=np.int64).reshape(-1, 2)
        starts, stops = np.concatenate(([start], gaps[:, 1])), gaps[:, 0]
        stops = stops - _returns(data, starts[:-1], stops)
        last = self.body(data[starts[-1] :])
        if not last.strip(WHITE):
            return starts[:-1], stops
        return starts, np.append(stops, starts[-1] + len(last))

    def decode(self, data: bytes, starts: Places, stops: Places) -> list[str]:
        text = data.decode("utf-8") if data.isascii() else None
        places = zip(starts.tolist(), stops.tolist(), strict=True)
        if text is None:
            return [data[start:stop].decode("utf-8") for start, stop in places]
        return [text[start:stop] for start, stop in places]

    def body(self, data: bytes) -> bytes:
        found = _BREAK.search(data) or _LAST_BREAK.search(data)
        return _without_ending(data[: found.start() + 1] if found else data)

    def breaks_before(self, stream: BinaryIO, position: int) -> bool:
        """Whether the line that holds byte `position` is blank up to there. Reads no further than needed."""
        while position > 0:
            size = min(position, LOOK_BACK)
            stream.seek(position - size)
            before = stream.read(size)
            line = before[before.rfind(b"\n") + 1 :]
            if line.strip():
                return False
            if len(line) < size:
                return True
            position -= size
        return True


class Whole:
    """The one record is the file."""

    def leading(self, held: bytes) -> int:
        return 0

    some_end = first_end = leading

    def split(self, data: bytes) -> tuple[Places, Places]:
        return np.zeros(1, dtype=np.int64), np.array([len(data)], dtype=np.int64)

    def decode(self, data: bytes, starts: Places, stops: Places) -> list[str]:
        return [data.decode("utf-8")]

    def body(self, data: bytes) -> bytes:
        return data

    def breaks_before(self, stream: BinaryIO, position: int) -> bool:
        return False


class Records:
    """The records of a stream that start in bytes `[start, end)`. Holds a few MiB of them at most.

    `held` is what is read and not yet given out; it begins at byte `offset`. `lines`: newlines given out.
    `inside`: a record was given out in part.
    """

    def __init__(self, stream: BinaryIO, rule: RecordRule, start: int, end: int | None) -> None:
        self._stream = stream
        self._rule = rule
        self._end = end
        self._failure: Exception | None = None
        self._ended = False
        self.held = b""
        self.offset = self.lines = 0
        self.inside = False
        if start > 0:
            self._begin(start - 1)

    def _begin(self, position: int) -> None:
        """Go on after the record that byte `position` lies in, or that ends with it."""
        self.offset = position
        if self._rule.breaks_before(self._stream, position):
            self.held, self.offset, self.lines = b"\n", position - 1, -1
        self._stream.seek(position)
        self.skip(self._end)

    @property
    def done(self) -> bool:
        """Whether no record is left."""
        return (self._ended and not self.held) or (self._end is not None and self.offset >= self._end)

    def runs(self, limit: int | None) -> Iterator[Run]:
        """Runs of whole records, up to the end or to a record of more than `limit` bytes.

        Then `held` begins with that one. The last run may hold records that start after the end. Without a
        limit, a record is held however long it is.
        """
        while not self.done:
            if cut := len(self.held) if self._ended else self._rule.some_end(self.held):
                yield self._take(cut)
            elif limit is None:
                self._read(max(BATCH, len(self.held)))
            elif len(self.held) <= limit:
                self._read(max(BATCH, min(len(self.held), MOST)))
            elif leading := self._rule.leading(self.held):
                self._take(leading)
            else:
                return

    def parts(self, cuts: Cuts) -> Iterator[Part]:
        """The record that `held` begins with, in parts. Raises BadBytesError and NoPlaceToCutError."""
        pending, rest, given, enough = "", b"", self.offset, BATCH
        self.inside = True
        while self.inside:
            ending = self._rule.first_end(self.held) or (len(self.held) if self._ended else 0)
            self.inside = not (ending or self._ended)
            at, lines = self.offset - len(rest), self.lines
            # White space may turn out to end the record.
            taken = self._take(ending or len(self.held.rstrip(WHITE))).data
            data = rest + (taken if self.inside else self._rule.body(taken))
            try:
                text, used = codecs.utf_8_decode(data, "strict", not self.inside)
            except UnicodeDecodeError as error:
                raise BadBytesError(error, at, lines) from None
            pending, rest = pending + text, data[used:]
            if self.inside and len(pending) >= enough:
                if place := cuts.last(pending):
                    yield (part := _part(pending[:place], given, more=True))
                    pending, given, enough = pending[place:], given + part.length, BATCH
                else:
                    enough = 2 * len(pending)
            if len(pending) + len(self.held) > UNCUT:
                raise NoPlaceToCutError
            if self.inside:
                self._read(BATCH)
        yield _part(pending, given, more=False)

    def skip(self, end: int | None = None) -> None:
        """Give up bytes up to where a record ends, or to byte `end`."""
        self.inside = False
        while not (ending := self._rule.first_end(self.held)):
            self._take(len(self.held) if self._ended else len(self.held.rstrip(WHITE)))
            if self._ended or (end is not None and self.offset >= end):
                return
            self._read(BATCH)
        self._take(ending)

    def _read(self, size: int) -> None:
        """Hold about `size` more bytes. What was read before a failure is held before it is raised."""
        if self._failure is not None:
            raise self._failure
        if (
            self._end is not None
        ):  # there may be far to fetch it from: only what is left, then its last record
            size = min(size, max(self._end - self.offset - len(self.held), len(self.held), TAIL))
        pieces, left = [self.held], size
        try:
            while left > 0 and (piece := self._stream.read1(left)):  # type: ignore[attr-defined]
                pieces.append(piece)
                left -= len(piece)
        except Exception as error:
            if left == size:
                raise
            self._failure = error
        self._ended = left > 0 and self._failure is None
        self.held = b"".join(pieces)

    def _take(self, count: int) -> Run:
        """Give out the first `count` bytes."""
        run = Run(self.held[:count], self.offset, self.lines)
        self.held = self.held[count:]
        self.offset += count
        self.lines += run.data.count(b"\n")
        return run


def _part(text: str, offset: int, more: bool) -> Part:
    return Part(text, offset, len(text) if text.isascii() else len(text.encode("utf-8")), more)


def _returns(data: bytes, starts: Places, newlines: Places) -> NDArray[np.bool_]:
    """Which of the lines that these newlines end have a carriage return before it."""
    codes: NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8)
    found: NDArray[np.bool_] = (newlines > starts) & (codes[newlines - 1] == RETURN)
    return found


def _end(found: re.Match[bytes] | None) -> int:
    return found.end() if found else 0


def _without_ending(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
