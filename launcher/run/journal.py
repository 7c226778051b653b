"""The journal: the supervisor's append-only record, one fsynced JSON line an event."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from launcher.run.saying import warn

Event: TypeAlias = dict[str, Any]
"""Its `time`, in seconds since the epoch, the name of the `event`, and its facts."""


def record(journal: Path, event: str, **facts: Any) -> None:
    """Append one event with its facts and the time, and see it on disk before returning."""
    _append(journal, {"time": time.time(), "event": event, **facts})


def note(journal: Path, event: str, **facts: Any) -> Event:
    """`record` an event that is no reason to stop where the disk takes nothing more: it is said then, and
    lost. Returns it."""
    told = {"time": time.time(), "event": event, **facts}
    try:
        _append(journal, told)
    except OSError as error:
        warn(f"{journal}: {error.strerror}: {json.dumps(told, ensure_ascii=False)}")
    return told


def _append(journal: Path, event: Event) -> None:
    line = json.dumps(event, ensure_ascii=False) + "\n"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab+") as stream:
        if stream.tell() and not _ends_whole(stream):
            stream.write(b"\n")
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(journal: Path) -> list[Event]:
    """Every whole event, oldest first. A line cut short by a crash is left out."""
    if not journal.exists():
        return []
    found: list[Event] = []
    for line in journal.read_bytes().split(b"\n"):
        # One that ends in a brace may still be cut: a reason may hold braces, and a crash leave zeros.
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def events(journal: Path, *names: str) -> list[Event]:
    """Every whole event of these names, oldest first."""
    return [event for event in read(journal) if event["event"] in names]


def _ends_whole(stream: BinaryIO) -> bool:
    """Whether the last line was written to its end: a crash may have cut it."""
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"
