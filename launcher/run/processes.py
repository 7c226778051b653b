"""Processes that others started: whether they live, and how they are ended.

One that has ended stays until whoever started it has asked how (a zombie); where that is gone and a
container's first process asks for nobody, it stays for good. Here it lives no more.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterable

import psutil

POLL_SECONDS = 0.01
KILL_SECONDS = 10
"""How long killed processes are waited for."""


def lives(process: psutil.Process) -> bool:
    """Whether it has not ended: it holds what it has open until its last thread has."""
    try:
        if not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.Error:
        return False  # or another user's, that has its number by now


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was started here and all that are below it now, and wait for them like `kill`.

    By descent, not by session: torch's launcher gives each rank a session of its own.
    """
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(process.pid)
            kill([top, *top.children(recursive=True)])
    process.wait()


def kill(processes: Iterable[psutil.Process], seconds: float = KILL_SECONDS) -> None:
    """Kill them, and return once none lives, or after so many seconds: one may be stuck in the kernel."""
    left = [process for process in processes if lives(process)]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    until = time.monotonic() + seconds
    while any(map(lives, left)) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
