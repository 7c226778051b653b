"""Following one attempt by its files: heartbeats and last words, wherever its ranks run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.run import journal
from launcher.run.directory import RunDirectory, write_text
from launcher.run.heartbeat import LIMITS, Beat, Watch, read_beat
from launcher.run.outcome import FAILURES, Hang, RankEnd, named, read_end

if TYPE_CHECKING:
    import psutil

ECHO_SECONDS = 5.0
"""How long the other ranks may still speak once one has failed or is gone; then they are ended."""
LEAVE_SECONDS = 60.0
"""How long a process may take to end after its last word."""
WORDS_SECONDS = 60.0
"""How long a network file system may hide a file that another machine has made: NFS's `acdirmax`."""
LOOK_SECONDS = 0.5
MOVING_SECONDS = 10.0
"""A heartbeat that has not changed for so long is of no rank that lives and can reach the run directory."""
STACKS_SECONDS = 3.0
"""How long ranks are given to write their stacks before they are ended."""


@dataclass(frozen=True, slots=True)
class Followed:
    """How far an attempt is. `trains`: a rank is past its first step. `is_over`: nothing more is to come of
    it, so that it is to be ended."""

    ends: tuple[RankEnd, ...]
    step: int
    trains: bool
    hang: Hang | None
    is_over: bool


class Following:
    """The files of attempt `number`, read as they change."""

    def __init__(
        self, directory: RunDirectory, number: int, world_size: int, *, starter_seconds: float = 0.0
    ) -> None:
        """`starter_seconds`: how long what started the ranks may take to end after all of them have."""
        self._directory = directory
        self.number = number
        self._ranks = range(world_size)
        self._watch = Watch()
        self._begun = time.monotonic()
        self._looked: tuple[float, Followed] | None = None
        self._failed: float | None = None
        self._said: float | None = None
        self._gone: float | None = None
        self._starter_seconds = starter_seconds
        self._asked: set[int] = set()
        self._ended_well: float | None = None
        self.dead: tuple[int, ...] = ()
        """The ranks that were gone first, without a last word: the others followed."""
        self.hang: Hang | None = None

    def look(self) -> Followed:
        """How far it is; while ranks live, the files are read at most every LOOK_SECONDS."""
        now = time.monotonic()
        if self._looked is None or now - self._looked[0] >= LOOK_SECONDS or self._are_gone():
            self._looked = now, self.read(now)
        return self._looked[1]

    def read(self, now: float) -> Followed:
        """Read every file again; `now` is the monotonic clock's."""
        if self._ended_well is not None:
            with contextlib.suppress(OSError):  # by which a network file system looks again
                list(self._directory.logs(self.number).iterdir())
        ends = {rank: end for rank in self._ranks if (end := self._end(rank)) is not None}
        self._watch.see(self._read(), now)
        dead = tuple(
            rank for rank, beat in self._watch.beats.items() if rank not in ends and not _lives(beat)
        )
        failed = dead or any(end.outcome in FAILURES for end in ends.values())
        self._failed = None if not failed else now if self._failed is None else self._failed
        if not set(self.dead) <= set(dead):
            self.dead = ()  # it was only slow to be read: its last word has come
        self.dead = self.dead or dead
        if self.hang is None and self._failed is None:
            self.hang = self._watch.hang(time.time(), frozenset(ends)) or self._missing(now, ends)
            if self.hang is not None:
                self._tell(self.hang)
        return Followed(
            ends=tuple(ends.values()),
            step=max([self._watch.step, *(end.step for end in ends.values())]),
            trains=any(beat.phase != "starting" for beat in self._watch.beats.values()),
            hang=self.hang,
            is_over=self.hang is not None
            or (self._failed is not None and now - self._failed > ECHO_SECONDS)
            or self._have_left(ends, now),
        )

    def collect_stacks(self) -> None:
        """Have every rank that can write the stacks of its threads to its log. One of this machine that was
        stopped by a signal is let go on for that."""
        with contextlib.suppress(OSError):  # a full disk: what is over is to be ended all the same
            write_text(self._directory.stacks_request, "")
        for beat in self._watch.beats.values():
            if _is_here(beat):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGCONT)
        time.sleep(STACKS_SECONDS)
        self._directory.stacks_request.unlink(missing_ok=True)

    def _have_left(self, ends: Mapping[int, RankEnd], now: float) -> bool:
        """Whether every rank has said its last word and is gone, or was to be: a process may hang as it ends,
        and whatever started them may take long to notice."""
        if len(ends) < len(self._ranks):
            return False
        self._said = self._said or now
        if self._are_gone():
            self._gone = self._gone or now
            return now - self._gone >= self._starter_seconds
        return now - self._said > LEAVE_SECONDS

    def _are_gone(self) -> bool:
        """Whether every rank was on this machine and has ended."""
        beats = self._watch.beats
        return len(beats) == len(self._ranks) and not any(_lives(beat) for beat in beats.values())

    def living_here(self) -> list[psutil.Process]:
        """The ranks on this machine that have not ended: what is left of an attempt."""
        here = (self._process(beat.pid) for beat in self._watch.beats.values() if _is_here(beat))
        return [process for process in here if process is not None]

    def without_word_elsewhere(self) -> frozenset[int]:
        """The ranks of other machines that have not said their last word: they live, or were killed."""
        return frozenset(
            rank for rank, beat in self._watch.beats.items() if not _is_here(beat) and self._end(rank) is None
        )

    def awaits_words(self) -> bool:
        """Whether words of other machines, where all ranks have ended well, may be there but not seen yet."""
        self._ended_well = self._ended_well or time.monotonic()
        said = {end.rank for end in self.look().ends}
        missing = any(rank not in said and not _is_here(beat) for rank, beat in self._watch.beats.items())
        return missing and time.monotonic() - self._ended_well < WORDS_SECONDS

    def living_elsewhere(self) -> frozenset[int]:
        """Those of them that are seen to live, by heartbeats that changed since this began to look."""
        return self.without_word_elsewhere() & self._watch.moving(MOVING_SECONDS)

    def ask_here(self) -> None:
        """Ask the ranks on this machine for a safe stop, each once: the wish of one is that of all."""
        import psutil

        for process in self.living_here():
            if process.pid not in self._asked:
                self._asked.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()

    def kill_here(self) -> None:
        """Kill what is left of it on this machine, and wait until that is gone."""
        from launcher.run.processes import kill

        kill(self.living_here())

    def _process(self, pid: int) -> psutil.Process | None:
        """That process, if it is a rank of this run, and not another one that has its number by now."""
        import psutil

        try:
            process = psutil.Process(pid)
            words = process.cmdline()
        except psutil.Error:
            return None
        is_ours = "launcher.worker" in words and str(self._directory.root) in words
        return process if is_ours else None

    def _missing(self, now: float, ends: Mapping[int, RankEnd]) -> Hang | None:
        """Ranks that never came up; None while there is time, or there are none."""
        seconds = now - self._begun
        missing = tuple(rank for rank in self._ranks if rank not in self._watch.beats and rank not in ends)
        if not missing or seconds <= LIMITS["starting"]:
            return None
        how = f"{named(missing)} never came up, for {seconds:.0f} s"
        return Hang(missing, 0, seconds, how, time.time())

    def _tell(self, hang: Hang) -> None:
        journal.note(
            self._directory.journal,
            "hung",
            attempt=self.number,
            rank=hang.ranks[0],
            ranks=list(hang.ranks),
            step=hang.step,
            seconds=round(hang.seconds, 1),
            how=hang.how,
        )

    def _end(self, rank: int) -> RankEnd | None:
        return read_end(self._directory.record(self.number, rank))

    def _read(self) -> dict[int, Beat]:
        found = ((rank, read_beat(self._directory.heartbeat(self.number, rank))) for rank in self._ranks)
        return {rank: beat for rank, beat in found if beat is not None}


def _is_here(beat: Beat) -> bool:
    return beat.host == socket.gethostname()


def _lives(beat: Beat) -> bool:
    """Whether the process that wrote it is there; one on another machine is taken to be."""
    if not _is_here(beat):
        return True
    import psutil

    from launcher.run.processes import lives

    try:
        return lives(psutil.Process(beat.pid))
    except psutil.NoSuchProcess:
        return False
