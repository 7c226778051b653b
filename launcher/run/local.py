"""Starting the ranks on this machine: one `accelerate launch`, in a session of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import MachineError
from launcher.render.command import launch_command
from launcher.run.directory import RunDirectory

PR_SET_PDEATHSIG = 1
KILL_SECONDS = 10
"""How long killed processes are waited for."""


def start(directory: RunDirectory, attempt: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start every rank of this node.

    The session is its own, so that Ctrl-C in a terminal reaches only the supervisor, which asks for
    a safe stop. A rank's standard output is ours, for rank 0's progress; what accelerate says on
    standard error, and a rank before it has a log, goes to the attempt's `launch.log`.
    """
    accelerate = Path(sys.executable).with_name("accelerate")
    if not accelerate.exists():
        raise MachineError(
            f"accelerate is not installed beside {sys.executable}",
            hint="install launcher with `pip install launcher`, in the environment you run it from",
        )
    log = directory.launch_log(attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            launch_command(str(directory.root), accelerate=str(accelerate)),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=stream,
            env={**os.environ, **environment, "LAUNCHER_ATTEMPT": str(attempt)},
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End every rank at once, and wait until they are gone.

    By descent, not by session: torch's launcher gives each rank a session of its own.
    """
    import psutil

    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=KILL_SECONDS)


def _stop_with_parent() -> None:
    """In the child, before it runs: be sent SIGTERM when the supervisor dies, however it dies (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
