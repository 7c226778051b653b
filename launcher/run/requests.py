"""Wishes to a run, as files: `requests/stop`. Any text is a person's wish, so `touch` does as well.

`requests/handover` is one supervisor's to another. Who looks for a wish looks again: what a file system does
not say for once (ESTALE, EIO) is taken not to be there yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from launcher.run.directory import RunDirectory, write_text

By = Literal["person", "signal", "scheduler"]
WORDS: Final[Mapping[By, str]] = {
    "person": "asked by a person\n",
    "signal": "asked by a signal to the supervisor\n",
    "scheduler": "asked because the scheduler takes the nodes\n",
}


def ask_to_stop(directory: RunDirectory, by: By) -> None:
    """Ask the ranks for a safe stop. A person's wish stands, whoever else asks."""
    if by == "person" or asked_by(directory) is None:
        write_text(directory.stop_request, WORDS[by])


def asked_by(directory: RunDirectory) -> By | None:
    """Who asked for a stop; None: nobody."""
    try:
        text = directory.stop_request.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for by in ("signal", "scheduler"):
        if text == WORDS[by]:
            return by
    return "person"


def is_overtaken(directory: RunDirectory, attempt: int) -> bool:
    """Whether another supervisor has begun another attempt beside this one: it may be on a file system whose
    locks only one machine sees. A wish written down from now on is heard by the ranks of that one."""
    return is_there(directory.logs(attempt + 1))


def is_replaced(directory: RunDirectory, attempt: int) -> bool:
    """Whether another supervisor wants the run, or has it already."""
    return is_there(directory.handover) or is_overtaken(directory, attempt)


def forget_all_but_persons(directory: RunDirectory) -> None:
    """Take back a wish that came from a signal or a scheduler: it was for an attempt that is over."""
    if asked_by(directory) not in (None, "person"):
        directory.stop_request.unlink(missing_ok=True)


def is_there(file: Path) -> bool:
    """Whether the file of a wish is there, as far as the file system says."""
    try:
        return file.exists()
    except OSError:
        return False
