"""One rank's signs of life: its heartbeat file, and its stacks in its log when it no longer gets on.

The main thread says `beat` as it goes; a thread of its own writes the file once a second. faulthandler's
watchdog, which needs neither Python nor the interpreter's lock, is wound up each time. It writes the
stacks of all threads once nothing has moved for as long as the phase allows.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launcher.run.heartbeat import INTERVAL, Beat, Phase, limits, lowered, training_limit, write_beat

LOCATED_SECONDS = 2.0
"""Once the main thread has been quiet for so long, where it is is told too."""
STEPS_REMEMBERED = 20
GIVEN_UP_SECONDS = 30.0
"""So long, and two steps, a rank waits for the others once another supervisor waits for the run: they may be
on the far side of a network that is gone, and never come."""
PLACE_CHARACTERS = 200
WAITING = (
    "distributed/distributed_c10d.py",
    "torch/autograd/graph.py",
    "deepspeed/comm/comm.py",
    "launcher/worker/stop.py",
)
"""Where the main thread is while it waits for other ranks: in a collective, in a backward pass with one, or
until all have told their wishes."""


class Heart:
    """Beats while this process lives. `beat`, `step` and `during` are the main thread's.

    `checkpoint`: bytes of one, by which a phase that goes through it may last.
    """

    def __init__(
        self,
        file: Path,
        stacks_request: Path,
        rank: int,
        environment: Mapping[str, str],
        *,
        checkpoint: int | None = None,
        later: Path | None = None,
        handover: Path | None = None,
    ) -> None:
        """`later`: what is there once another attempt of the run has begun. None may train beside another:
        on a machine that was cut off, and given up, this process would go on where it was. `handover`: what
        is there while another supervisor waits to begin it."""
        self._file = file
        self._later = later
        self._handover = handover
        self._stacks_request = stacks_request
        self._rank = rank
        self._environment = environment
        self._limits = limits(checkpoint)
        self._phase: Phase = "starting"
        self._step = 0
        self._beats = 0
        self._beaten = time.time()
        self._steps: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._step_began = time.monotonic()
        self._save_seconds: float | None = None
        self._ended = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="heart", daemon=True)
        self._main = threading.main_thread().ident

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Be silent from now on: this rank has said its last word."""
        self._ended = True
        self._wake.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """The main thread gets on."""
        self._beats += 1
        self._beaten = time.time()

    def step(self, step: int) -> None:
        """A step of training has ended; the first ends the start."""
        now = time.monotonic()
        if self._phase == "training":
            self._steps.append(now - self._step_began)
        self._step_began = now
        self._step = step
        self._enter("training")

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The main thread is at something else than training."""
        before, began = self._phase, time.monotonic()
        self._enter(phase)
        yield
        self._step_began += time.monotonic() - began
        self._enter(before)

    def _enter(self, phase: Phase) -> None:
        """Tell of another phase at once."""
        if phase != self._phase:
            self._phase = phase
            self._wake.set()
        self.beat()

    def saved(self, seconds: float) -> None:
        """A checkpoint was committed, so many seconds after it was begun; rank 0 knows."""
        self._save_seconds = seconds

    def _limit(self) -> float:
        if self._phase == "training":
            return lowered(training_limit(max(self._steps, default=0.0)), self._environment)
        return self._limits[self._phase]

    def _tell(self) -> None:
        # Counted in ticks: time in which the whole process stood still is not the main thread's.
        quiet, seen, last = 0.0, -1, time.monotonic()
        stacks_told = False
        while not self._ended:
            now = time.monotonic()
            quiet += min(now - last, 2 * INTERVAL)
            last = now
            if seen != self._beats:
                seen, quiet = self._beats, 0.0
            limit = self._limit()
            if quiet < limit:
                faulthandler.dump_traceback_later(max(limit - quiet, INTERVAL), file=sys.stderr)
            # What the file system does not say now (ESTALE, EIO), it says in the next second.
            with contextlib.suppress(OSError):
                asked = self._stacks_request.exists()
                if asked and not stacks_told:
                    faulthandler.dump_traceback(file=sys.stderr)
                stacks_told = asked
            with contextlib.suppress(OSError):
                self._leave_if_given_up(quiet)
                write_beat(self._file, self._now(quiet, limit))
            self._wake.wait(INTERVAL)
            self._wake.clear()

    def _leave_if_given_up(self, quiet: float) -> None:
        """`quiet`: seconds in which the main thread has not got on."""
        why = None
        if self._later is not None and self._later.exists():
            why = f"another attempt has begun ({self._later})"
        elif self._waits_in_vain(quiet):
            why = f"another supervisor waits for this run, and nothing has moved for {quiet:.0f} s"
        if why is not None:
            print(f"{why}: leaving", file=sys.stderr, flush=True)
            os._exit(1)

    def _waits_in_vain(self, quiet: float) -> bool:
        if self._handover is None or self._phase in ("saving", "finishing"):
            return False
        patience = max(GIVEN_UP_SECONDS, 2 * max(self._steps, default=0.0))
        return quiet > patience and self._handover.exists()

    def _now(self, quiet: float, limit: float) -> Beat:
        at, waits = None, False
        if quiet > LOCATED_SECONDS and self._main is not None:
            frame = sys._current_frames().get(self._main)
            at, waits = _place(frame), _waits(frame)
        return Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=self._phase,
            step=self._step,
            time=self._beaten,
            alive=time.time(),
            quiet=round(quiet, 2),
            limit=round(limit, 2),
            at=at,
            waits=waits,
            step_seconds=round(self._steps[-1], 4) if self._steps else None,
            save_seconds=self._save_seconds and round(self._save_seconds, 3),
        )


def _place(frame: FrameType | None) -> str | None:
    """The innermost line of Python, short."""
    if frame is None:
        return None
    file = Path(frame.f_code.co_filename)
    return f"{file.parent.name}/{file.name}:{frame.f_lineno} {frame.f_code.co_name}"[-PLACE_CHARACTERS:]


def _waits(frame: FrameType | None) -> bool:
    """Whether any line on the stack is one that waits for other ranks."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(WAITING):
            return True
        frame = frame.f_back
    return False
