"""How a run stands, read from its files alone: what `launcher status` shows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import RequestError
from launcher.run import journal
from launcher.run.by_hand import ByHand, newest_by_hand
from launcher.run.checkpoints import committed
from launcher.run.directory import RunDirectory, is_held
from launcher.run.heartbeat import read_beat
from launcher.run.queue import QueuedJob

BLOCK = 1 << 16
MOST_READ = 1 << 22
"""Bytes of metrics.jsonl that are read at most, from its end."""
REPORTS = 20
"""Reports of training that the speed is taken from."""

Alive = Literal["supervisor", "ranks"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the ranks. `outcome` is None until it has ended; `seconds`: how long it took, where
    a supervisor saw that."""

    number: int
    world_size: int
    outcome: str | None = None
    step: int | None = None
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint, all of whose files have the size they were written with."""

    step: int
    bytes: int
    age: float


@dataclass(frozen=True, slots=True)
class Status:
    """How a run stands. Times are in seconds, sizes in bytes; None: not known (yet).

    `alive`: who lives to carry it on, by the locks they hold. `ended`: how the run itself came to its end;
    `reason`: why, in words.
    `phase`: what rank 0 did by its last heartbeat. `tokens_per_second` to `peak_memory_bytes` are of the last
    report, as docs/concepts/runs.md has them; `seconds_left` is by the pace of the last REPORTS of them,
    evaluations and saving included. `job`: the newest one, on a SLURM cluster.
    """

    name: str
    folder: Path
    alive: Alive | None
    stop_requested: bool
    attempts: Sequence[Attempt]
    ended: str | None
    phase: str | None
    step: int
    steps: int | None
    loss: float | str | None
    tokens: int | None
    tokens_per_second: float | None
    mfu: float | None
    matmul_share: float | None
    data_wait_seconds: float | None
    host_seconds: float | None
    slowest_rank: int | None
    slowest_rank_lag_seconds: float | None
    peak_memory_bytes: int | None
    seconds_left: float | None
    eval_loss: float | str | None
    eval_step: int | None
    checkpoint: Saved | None
    job: QueuedJob | None
    reason: str | None

    @property
    def state(self) -> str:
        """One word or two: running, stopping, restarting, or how the last attempt ended."""
        last = self.attempts[-1] if self.attempts else None
        waits = self.job is not None and self.job.state == "PENDING"
        if self.alive is None and waits:
            return "queued"
        if self.alive is None and self.job is not None and self.job.state == "RUNNING":
            return "starting"
        if self.alive is not None:
            if self.stop_requested:
                return "stopping"
            if self.alive == "ranks":
                return "running without its supervisor"
            if last is None:
                return "starting"
            return "running" if last.outcome is None else "restarting"
        if last is None and self.ended is None:
            return "not started"
        return (self.ended or (last and last.outcome) or "killed").lower().replace("_", " ")


def find_runs(folder: Path) -> list[RunDirectory]:
    """The run in `folder`, or else every run directly under it, by name. Raises RequestError for none."""
    here = RunDirectory(folder.absolute())
    if here.orders.is_file():
        return [here]
    found = sorted(file.parent for file in here.root.glob("*/plan.json"))
    if not found:
        raise RequestError(
            f"there is no run in {folder}", hint="give a folder that `launcher train` made, such as runs/NAME"
        )
    return [RunDirectory(each) for each in found]


def read_status(directory: RunDirectory, job: QueuedJob | None, now: float) -> Status:
    """How the run in `directory`, whose newest job is `job`, stands at `now`, in seconds since the epoch.

    Raises RunDirectoryError if it is no run directory.
    """
    directory.require(directory.orders)
    plan: dict[str, Any] = json.loads(directory.orders.read_text(encoding="utf-8"))["plan"]
    events = journal.read(directory.journal)
    attempts, by_hand = _attempts(events, now), newest_by_hand(directory)
    ended = events[-1] if events and events[-1]["event"] == "ended" and by_hand is None else {}
    if by_hand is not None:
        attempts.append(_of_hand(by_hand))
    begun = max((each["time"] for each in events if each["event"] == "attempt_started"), default=0.0)
    training, evaluation = _newest_reports(directory.metrics, begun)
    newest = training[0] if training else {}
    saved = _newest_whole(directory.checkpoints, now)
    beat = read_beat(directory.heartbeat(attempts[-1].number, rank=0)) if attempts else None
    step: int = max(
        newest.get("step", 0), 0 if beat is None else beat.step, 0 if saved is None else saved.step
    )
    return Status(
        name=directory.root.name,
        folder=directory.root,
        alive=alive(directory),
        stop_requested=directory.stop_request.exists(),
        attempts=attempts,
        ended=ended.get("outcome"),
        phase=None if beat is None else beat.phase,
        step=step,
        steps=plan["steps"],
        loss=newest.get("loss"),
        tokens=newest.get("tokens"),
        tokens_per_second=newest.get("tokens_per_second"),
        mfu=newest.get("mfu"),
        matmul_share=newest.get("matmul_share"),
        data_wait_seconds=newest.get("data_wait_seconds"),
        host_seconds=newest.get("host_seconds"),
        slowest_rank=newest.get("slowest_rank"),
        slowest_rank_lag_seconds=newest.get("slowest_rank_lag_seconds"),
        peak_memory_bytes=newest.get("peak_memory_bytes"),
        seconds_left=_seconds_left(training, step, plan["steps"]),
        eval_loss=evaluation.get("eval_loss"),
        eval_step=evaluation.get("step"),
        checkpoint=saved,
        job=job,
        reason=ended.get("reason"),
    )


def alive(directory: RunDirectory) -> Alive | None:
    """Who lives to carry the run on."""
    if is_held(directory.lock):
        return "supervisor"
    return "ranks" if is_held(directory.ranks_lock) else None


def _attempts(events: Sequence[dict[str, Any]], now: float) -> list[Attempt]:
    found: dict[int, Attempt] = {}
    begun: dict[int, float] = {}
    for event in events:
        number = event.get("attempt", 0)
        if event["event"] == "attempt_started":
            begun[number] = event["time"]
            found[number] = Attempt(number, event["world_size"], seconds=now - event["time"])
        elif event["event"] == "attempt_ended" and number in found:
            found[number] = Attempt(
                number,
                found[number].world_size,
                event["outcome"],
                event["step"],
                event["time"] - begun[number],
                event.get("reason"),
            )
    return list(found.values())


def _of_hand(found: ByHand) -> Attempt:
    verdict = found.verdict
    outcome, reason = (None, None) if verdict is None else (verdict.outcome, verdict.reason)
    return Attempt(found.number, found.world_size, outcome, found.step, reason=reason)


def _newest_reports(metrics: Path, since: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The last reports of training, newest first, and the last evaluation.

    One report at least; more only of what was trained after `since`.
    """
    training: list[dict[str, Any]] = []
    evaluation: dict[str, Any] = {}
    for line in _lines_backwards(metrics):
        if "eval_loss" in line:
            evaluation = evaluation or line
        elif "loss" in line and len(training) < REPORTS and (not training or line["time"] >= since):
            training.append(line)
        if evaluation and len(training) == REPORTS:
            break
    return training, evaluation


def _lines_backwards(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON Lines file, last first, as far as MOST_READ; one cut short is left out."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return
    with stream:
        end = stream.seek(0, os.SEEK_END)
        start, rest = end, b""
        while start > max(0, end - MOST_READ):
            size = min(BLOCK, start)
            start -= size
            stream.seek(start)
            first, *lines = (stream.read(size) + rest).split(b"\n")
            yield from (json.loads(line) for line in reversed(lines) if line.endswith(b"}"))
            rest = first
        if start == 0 and rest.endswith(b"}"):
            yield json.loads(rest)


def _seconds_left(training: Sequence[dict[str, Any]], step: int, steps: int | None) -> float | None:
    if steps is None or len(training) < 2:
        return None
    newest, oldest = training[0], training[-1]
    trained = newest["step"] - oldest["step"]
    if trained <= 0:
        return None
    return float((newest["time"] - oldest["time"]) / trained * (steps - step))


def _newest_whole(checkpoints: Path, now: float) -> Saved | None:
    """The newest checkpoint by its files' sizes: to hash them would take as long as to read them."""
    for each in reversed(committed(checkpoints)):
        if not each.misfits():
            return Saved(each.step, each.bytes, now - each.created)
    return None
