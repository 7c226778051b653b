"""Signs of life of the ranks, as files, and who among them has stopped getting on.

Each rank overwrites `logs/attempt-NNN/rank-R.heartbeat` in place, once a second, from a thread of its own:
one line of JSON, padded so that it never grows. Ages are told by the rank's own monotonic clock (`quiet`)
and by the reader's (how long a file has not changed), so that no two clocks are compared and none may jump.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from launcher.run.outcome import Hang, named

Phase = Literal["starting", "training", "evaluating", "saving", "finishing"]
LIMITS: Mapping[Phase, float] = {
    "starting": 1800.0,
    "training": 240.0,
    "evaluating": 600.0,
    "saving": 1800.0,
    "finishing": 3600.0,
}
"""Seconds that a rank may go without a beat: `limits` has more for a large model, and less for the save of a
small one. `starting` holds the first step, and so what compiles it; `training` is longer than a fault of the
network in the middle of remote text is waited out (`data.remote`), and a step may take longer, see
`training_limit`; `finishing` makes the final model and uploads it."""
STEPS = 10
"""A training step may take so many times as long as the longest lately."""
FROZEN_SECONDS = 120.0
"""A heartbeat file that has not changed for so long, in a step of training or a forward pass of an
evaluation, is of a process that does not run at all. In other phases it may be one long call that lets no
other thread run, or a file system that all ranks write to at once: such a phase's own limit counts."""
BRIEF: frozenset[Phase] = frozenset({"training", "evaluating"})
"""Phases in which nothing takes long at a stretch."""
FILE_SPEED = 200e6
"""Bytes/s at which a checkpoint is read or written, where none was measured: an allowance for a busy file
system."""
PASSES: Mapping[Phase, int] = {"starting": 5, "saving": 2, "finishing": 4}
"""How often a phase may go through a checkpoint's bytes without a beat. `starting`: verify it, convert it for
another number of ranks (read, written), read that, and once for luck; `saving`: write and hash it;
`finishing`: verify and convert it, and read what came of it."""
SMALL_SPEED = 20e6
"""The same on the slowest file system, Bytes/s: how long a small model's save may take."""
LEAST_SAVING = 300.0
"""Seconds that the save of a model of any size is given: longer than a step of training."""
INTERVAL = 1.0
"""Seconds between two writings."""
STALE_SECONDS = 3.0
"""What tells, once something hangs, a process that does not run from one that waits."""
LIMIT_VARIABLE = "LAUNCHER_HANG_SECONDS"
"""An environment variable that lowers the limit of a training step to so many seconds: to try it out."""
BYTES = 1536
"""Of a heartbeat: 200 characters of `at` take 800 bytes at most, a host's name 64, all others 400."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself.

    `time` and `alive`: when the main thread got on last, and when this was written, in seconds since the
    epoch, for people. `quiet`: seconds between the two in which the process ran; `limit`: how many may be.
    `at`: where the main thread is, once it is quiet a few seconds; `waits`: in a call that waits for other
    ranks. `step_seconds`, `save_seconds`: the last measured, None before.
    """

    rank: int
    host: str
    pid: int
    phase: Phase
    step: int
    time: float
    alive: float
    quiet: float
    limit: float
    at: str | None = None
    waits: bool = False
    step_seconds: float | None = None
    save_seconds: float | None = None


def write_beat(file: Path, beat: Beat) -> None:
    """Overwrite `file` in place, closing it: no block is allocated, so a full disk does not look like a
    frozen rank, and a network file system passes it on. A beat too long for it goes without its `at`."""
    text = _as_json(beat)
    if len(text) >= BYTES:
        text = _as_json(replace(beat, at=None))
    text = text.ljust(BYTES - 1) + b"\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, text, 0)
    finally:
        os.close(descriptor)


def _as_json(beat: Beat) -> bytes:
    return json.dumps(asdict(beat), ensure_ascii=False).encode(errors="replace")


def read_beat(file: Path) -> Beat | None:
    """The newest beat in `file`; None where there is none, or it is just being written."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return Beat(**{field.name: said[field.name] for field in fields(Beat)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def training_limit(longest_step: float) -> float:
    """Seconds that a step may take before its rank is taken to hang; `longest_step` is of those lately."""
    return max(LIMITS["training"], STEPS * longest_step)


def limits(checkpoint: int | None) -> dict[Phase, float]:
    """LIMITS, longer where a checkpoint of so many bytes takes longer, and `saving` shorter where it
    takes little time on the slowest file system; None: how many is not known."""
    size = checkpoint or 0
    least = dict(LIMITS)
    if checkpoint is not None:
        slow = max(LEAST_SAVING, PASSES["saving"] * size / SMALL_SPEED)
        least["saving"] = min(least["saving"], slow)
    return {phase: max(least[phase], PASSES.get(phase, 0) * size / FILE_SPEED) for phase in least}


def frozen_limit(beat: Beat) -> float:
    """Seconds that a rank's file may stay as it is, once `beat` stands in it."""
    return min(beat.limit, FROZEN_SECONDS) if beat.phase in BRIEF else beat.limit


def lowered(limit: float, environment: Mapping[str, str]) -> float:
    """`limit`, or what LIMIT_VARIABLE in `environment` lowers it to."""
    return min(limit, float(environment.get(LIMIT_VARIABLE, limit)))


class Watch:
    """Follows the heartbeats of an attempt; `now` is a monotonic clock's, in seconds."""

    def __init__(self) -> None:
        self._beats: dict[int, Beat] = {}
        self._first: dict[int, Beat] = {}
        self._stale: dict[int, float] = {}
        self._seen: float | None = None

    def see(self, beats: Mapping[int, Beat], now: float) -> None:
        """Take in what was read just now, rank by rank; call it every second or so."""
        # If the reader stood still, so may all have: that is no rank's fault.
        passed = 0.0 if self._seen is None else min(now - self._seen, 2 * INTERVAL)
        self._seen = now
        for rank in {*self._beats, *beats}:
            beat = beats.get(rank)
            if beat is None or self._beats.get(rank) == beat:
                self._stale[rank] = self._stale.get(rank, 0.0) + passed
            else:
                self._beats[rank], self._stale[rank] = beat, 0.0
                self._first.setdefault(rank, beat)

    @property
    def step(self) -> int:
        """The furthest step any rank has told of."""
        return max((beat.step for beat in self._beats.values()), default=0)

    @property
    def beats(self) -> Mapping[int, Beat]:
        return self._beats

    def moving(self, seconds: float) -> frozenset[int]:
        """The ranks whose heartbeat has changed before the reader's eyes, `seconds` ago at most."""
        return frozenset(
            rank
            for rank, beat in self._beats.items()
            if beat != self._first[rank] and self._stale[rank] <= seconds
        )

    def hang(self, time: float, gone: frozenset[int] = frozenset()) -> Hang | None:
        """Who does not get on, at `time` (since the epoch); None: all do. Some are `gone`: they ended."""
        beats = {rank: beat for rank, beat in self._beats.items() if rank not in gone}
        stale = {rank: self._stale[rank] for rank in beats}
        late = any(
            beat.quiet > beat.limit or stale[rank] > frozen_limit(beat) for rank, beat in beats.items()
        )
        if not late:
            return None
        ranks, why = _culprits(beats, stale)
        worst = max(ranks, key=lambda rank: beats[rank].quiet + stale[rank])
        seconds = beats[worst].quiet + stale[worst]
        at = f", in {beats[worst].at}" if beats[worst].at else ""
        how = f"{named(ranks)} {why} for {seconds:.0f} s, {_doing(beats[worst])}{at}"
        return Hang(ranks, beats[worst].step, seconds, how, time)


def _culprits(beats: Mapping[int, Beat], stale: Mapping[int, float]) -> tuple[tuple[int, ...], str]:
    """The ranks at fault, and what they do: the others only wait for them."""
    frozen = tuple(sorted(rank for rank, seconds in stale.items() if seconds > STALE_SECONDS))
    if frozen and len(frozen) < len(beats):
        return frozen, "did not run at all"
    busy = tuple(sorted(rank for rank, beat in beats.items() if not beat.waits))
    if busy and len(busy) < len(beats):
        return busy, "did not get on while the others waited"
    behind = min(beat.step for beat in beats.values())
    last = tuple(sorted(rank for rank, beat in beats.items() if beat.step == behind))
    return last, "did not get on"


def _doing(beat: Beat) -> str:
    return f"{beat.phase} at step {beat.step} on {beat.host} (process {beat.pid})"
