"""The journal: the supervisor's append-only record, one fsynced JSON line an event.

What a full disk does not take is kept here, read with the rest, and written before the next event.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, Final

from launcher.run.saying import warn

_kept: Final[defaultdict[Path, list[str]]] = defaultdict(list)
"""Events that could not be written, oldest first."""


def record(journal: Path, event: str, **facts: Any) -> None:
    """Append one event with its facts and the time, and see it on disk before returning."""
    _write(journal, _line(event, facts))


def note(journal: Path, event: str, **facts: Any) -> None:
    """`record` an event that is no reason to stop where the disk takes nothing: it is said then, and kept."""
    line = _line(event, facts)
    try:
        _write(journal, line)
    except OSError as error:
        _kept[journal].append(line)
        warn(f"{journal}: {error.strerror}: {line}")


def _line(event: str, facts: dict[str, Any]) -> str:
    return json.dumps({"time": time.time(), "event": event, **facts}, ensure_ascii=False)


def _write(journal: Path, line: str) -> None:
    """Append what was kept, and a line."""
    kept = _kept[journal]
    while kept:
        _append(journal, kept[0])
        del kept[0]
    _append(journal, line)


def _append(journal: Path, line: str) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab+") as stream:
        if stream.tell() and not _ends_whole(stream):
            stream.write(b"\n")
        stream.write(f"{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(journal: Path) -> list[dict[str, Any]]:
    """Every whole event, oldest first. A line cut short by a crash is left out."""
    found: list[dict[str, Any]] = []
    written = journal.read_bytes() if journal.exists() else b""
    for line in [*written.split(b"\n"), *(kept.encode() for kept in _kept[journal])]:
        # One that ends in a brace may still be cut: a reason may hold braces, and a crash leave zeros.
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def events(journal: Path, *names: str) -> list[dict[str, Any]]:
    """Every whole event of these names, oldest first."""
    return [event for event in read(journal) if event["event"] in names]


def _ends_whole(stream: BinaryIO) -> bool:
    """Whether the last line was written to its end: a crash may have cut it."""
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"
