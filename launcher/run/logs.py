"""What the ranks of an attempt have printed: each rank's own, or all merged by time."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RequestError
from launcher.run.directory import RunDirectory

STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ")
"""How a line begins that a rank printed: the time, in UTC."""
LOOK_SECONDS = 0.25
LAUNCH = "launch"
"""Who is named for what `accelerate launch` prints, and a rank that has no log yet."""


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """`time` is that of the last line that had one: C libraries print without."""

    time: str
    source: str
    text: str


class Log:
    """One file of an attempt, read on from where it was left."""

    def __init__(self, file: Path, source: str) -> None:
        self._file = file
        self._source = source
        self._read = 0
        self._time = ""

    def new_lines(self, *, whole: bool) -> Iterator[Line]:
        """What has been added; with `whole` no line that has no end yet."""
        with self._file.open("rb") as stream:
            stream.seek(self._read)
            added = stream.read()
        if whole:
            added = added[: added.rfind(b"\n") + 1]
        self._read += len(added)
        for text in added.decode("utf-8", errors="replace").splitlines():
            if stamp := STAMPED.match(text):
                self._time = stamp[1]
            yield Line(self._time, self._source, text)


def attempts(directory: RunDirectory) -> list[int]:
    """The attempts that have logs, oldest first."""
    return list(range(1, directory.next_attempt()))


def read_logs(directory: RunDirectory, attempt: int | None, rank: int | None) -> Iterator[Line]:
    """The lines of one attempt, the newest unless it is given: of one rank, or of all by time.

    Raises RequestError for an attempt or a rank that has no log.
    """
    chosen = _chosen(directory, attempt)
    logs = [Log(file, source) for file, source in _files(directory, chosen, rank)]
    if not logs:
        there = ", ".join(source for _, source in _files(directory, chosen, None)) or "none"
        raise RequestError(
            f"attempt {chosen} has no log of {'any rank' if rank is None else f'rank {rank}'}",
            hint=f"there are: {there}",
        )
    yield from heapq.merge(*(log.new_lines(whole=False) for log in logs), key=lambda line: line.time)


def follow_logs(
    directory: RunDirectory, attempt: int | None, rank: int | None, alive: Callable[[], bool]
) -> Iterator[Line]:
    """The same, and what comes, for as long as the run is `alive`: of one attempt if it is given.

    Lines that come within LOOK_SECONDS of each other are by time.
    """
    wait = attempt is None and not attempts(directory) and alive()
    chosen = 1 if wait else _chosen(directory, attempt)
    logs: dict[Path, Log] = {}
    while True:
        # Asked before reading: then what was written until the end has been read at the end.
        going = alive()
        past = attempts(directory)[-1:] > [chosen]
        for file, source in _files(directory, chosen, rank):
            logs.setdefault(file, Log(file, source))
        yield from heapq.merge(
            *(log.new_lines(whole=going and not past) for log in logs.values()), key=lambda line: line.time
        )
        if past and attempt is None:
            chosen += 1
            logs.clear()
        elif past or not going:
            return
        else:
            time.sleep(LOOK_SECONDS)


def _chosen(directory: RunDirectory, attempt: int | None) -> int:
    there = attempts(directory)
    if not there or (attempt is not None and attempt not in there):
        asked = "attempt" if attempt is None else f"attempt {attempt}"
        raise RequestError(
            f"{directory.root} has no log of any {asked}",
            hint=f"there are attempts 1 to {there[-1]}" if there else "it has not been started yet",
        )
    return there[-1] if attempt is None else attempt


def _files(directory: RunDirectory, attempt: int, rank: int | None) -> list[tuple[Path, str]]:
    """The logs there are, and who wrote each."""
    folder = directory.logs(attempt)
    if rank is not None:
        file = directory.log(attempt, rank)
        return [(file, f"rank {rank}")] if file.is_file() else []
    numbers = sorted(int(file.stem.removeprefix("rank-")) for file in folder.glob("rank-*.log"))
    found = [(directory.log(attempt, number), f"rank {number}") for number in numbers]
    launch = directory.launch_log(attempt)
    return [*found, (launch, LAUNCH)] if launch.is_file() else found
