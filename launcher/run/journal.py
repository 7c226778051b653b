"""The journal: the supervisor's append-only record, one fsynced JSON line an event."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO


def record(journal: Path, event: str, **facts: Any) -> None:
    """Append one event with its facts and the time, and see it on disk before returning."""
    line = json.dumps({"time": time.time(), "event": event, **facts}, ensure_ascii=False) + "\n"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab+") as stream:
        if stream.tell() and not _ends_whole(stream):
            stream.write(b"\n")
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(journal: Path) -> list[dict[str, Any]]:
    """Every whole event, oldest first. A line cut short by a crash is left out."""
    if not journal.exists():
        return []
    found: list[dict[str, Any]] = []
    for line in journal.read_bytes().split(b"\n"):
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
