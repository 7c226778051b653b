"""What one rank is: its number, its log, and its last word."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

import torch

from launcher.config.schema import RunConfig
from launcher.errors import LauncherError
from launcher.plan.choose import Plan
from launcher.run.directory import RunDirectory, hold
from launcher.run.outcome import Outcome, RankEnd
from launcher.worker.engine import meet
from launcher.worker.fast import keep_freed_memory
from launcher.worker.heart import Heart
from launcher.worker.together import as_rank_0_has_it


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among the ranks. `terminal` is where the person who launched it looks; `errors`, where
    that was done by hand, the same for errors: a supervisor tells the last words itself. `lock`, on rank 0,
    is the hold on the run directory."""

    number: int
    world_size: int
    attempt: int
    terminal: TextIO
    errors: TextIO | None
    lock: TextIO | None
    heart: Heart


def join(directory: RunDirectory, run: RunConfig, plan: Plan, environment: MutableMapping[str, str]) -> Rank:
    """Meet the other ranks, then send everything this one prints to its own log.

    The attempt's number comes from the supervisor; where the ranks were launched by hand, rank 0
    takes the next free one.
    """
    if plan.threads_per_rank is not None:
        torch.set_num_threads(plan.threads_per_rank)
    if plan.device == "cpu":
        keep_freed_memory()
    state = meet(plan, run.train.extra.get("ddp_timeout"), environment)
    number, world_size = int(state.process_index), int(state.num_processes)
    # For as long as this process lives: ranks that outlived their supervisor still train.
    lock = hold(directory.ranks_lock, directory, "other ranks") if number == 0 else None
    supervised = int(environment.get("LAUNCHER_ATTEMPT", 0))
    attempt = as_rank_0_has_it(supervised or directory.next_attempt())
    log = directory.log(attempt, number)
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal, errors = (
        os.fdopen(os.dup(stream.fileno()), "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr)
    )
    _redirect(log)
    heart = Heart(
        directory.heartbeat(attempt, number),
        directory.stacks_request,
        number,
        environment,
        checkpoint=plan.checkpoint_bytes,
        later=directory.logs(attempt + 1),
        handover=directory.handover,
    )
    heart.start()
    return Rank(number, world_size, attempt, terminal, None if supervised else errors, lock, heart)


def _redirect(log: os.PathLike[str]) -> None:
    """File descriptors, not sys.stdout alone: what libraries write in C belongs in the log too."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = TimestampedText(1), TimestampedText(2)


class TimestampedText(io.TextIOWrapper):
    """Text to a file descriptor, each line beginning with the time in UTC, by which logs are merged.

    In this process, so that nothing is lost with it; what C libraries print goes past it, without a time.
    """

    def __init__(self, descriptor: int) -> None:
        raw = io.FileIO(descriptor, "w", closefd=False)
        super().__init__(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
        self._begins = True

    def write(self, text: str) -> int:
        time = f"{datetime.now(UTC).isoformat(timespec='milliseconds').removesuffix('+00:00')}Z "
        begins, self._begins = self._begins, text.endswith("\n") if text else self._begins
        whole = text.removesuffix("\n").replace("\n", f"\n{time}")
        super().write((time if begins and text else "") + whole + "\n" * text.endswith("\n"))
        return len(text)


def tells_failure(directory: RunDirectory, rank: Rank) -> bool:
    """Whether it is this rank that tells who launched the ranks by hand of a failure: the first one to fail
    does. What comes later is the same, or its echo."""
    if rank.errors is None:
        return False
    with contextlib.suppress(OSError):
        try:
            directory.failed(rank.attempt).touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def last_word(rank: int, step: int, error: BaseException) -> RankEnd:
    """The record of a failure. Prints it to the rank's log, where that has room: with the traceback, unless
    it is launcher itself that refuses."""
    now = time.time()
    if isinstance(error, LauncherError):
        with contextlib.suppress(OSError):
            print(f"error: {error.told}", file=sys.stderr)
        return RankEnd(
            rank, Outcome.CRASHED, step, now, error.message, error.hint, error.exit_code, retry=False
        )
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return RankEnd(rank, Outcome.CRASHED, step, now, f"{type(error).__name__}: {error}")


def say_last(end: RankEnd, directory: RunDirectory, rank: Rank, *, tells: bool) -> None:
    """Write the last word, and where this rank `tells` of a failure, do so. Where it cannot be written, on a
    full disk say, tell the person at least."""
    try:
        end.write(directory.record(rank.attempt, rank.number))
    except OSError as error:
        said = f"rank {end.rank} cannot write its end ({error.strerror}): {end.error}"
        print(said, file=rank.terminal, flush=True)
        return
    if tells:
        hint = end.remedy(directory.log(rank.attempt, rank.number))
        print(f"error: rank {end.rank}: {end.error}\n  hint: {hint}", file=rank.errors, flush=True)
