"""Starting the ranks on this machine: one `accelerate launch`, in a session of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from launcher.errors import MachineError
from launcher.render.command import launch_command
from launcher.run.directory import RunDirectory
from launcher.run.launching import RANK_ENVIRONMENT
from launcher.run.machine import oom_kills
from launcher.run.outcome import Facts, Outcome

PR_SET_PDEATHSIG = 1


class Local:
    """Every rank on this machine (`run.launching.Launching`)."""

    asking: ClassVar = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    takes_over: ClassVar = False
    told_seconds: ClassVar = 0.0

    def __init__(self, directory: RunDirectory, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self._oom_kills_before = 0

    def ends_at(self) -> float | None:
        return None

    def check_nodes(self) -> None:
        """The ranks find out themselves what this machine lacks."""

    def start(self, attempt: int) -> LocalRanks:
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
        log = self._directory.launch_log(attempt)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._oom_kills_before = oom_kills()
        with log.open("ab") as stream:
            process = subprocess.Popen(
                launch_command(str(self._directory.root), accelerate=str(accelerate)),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                stderr=stream,
                env={
                    **os.environ,
                    **RANK_ENVIRONMENT,
                    **self._environment,
                    "LAUNCHER_ATTEMPT": str(attempt),
                },
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )
        return LocalRanks(process)

    def facts(self, signals: Sequence[int]) -> Facts:
        """Whether the kernel has killed something here for its memory; nobody lends this machine."""
        return Facts(out_of_memory=oom_kills() > self._oom_kills_before)

    def past(self, attempt: int) -> Facts:
        return Facts()

    def hands_over(self, outcome: Outcome, why: str) -> bool:
        return False


class LocalRanks:
    """The ranks under one `accelerate launch` (`run.launching.Ranks`)."""

    leave_seconds = 0.0
    """Its own end takes more than half a second, and nothing is left for it to do."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        """Kill every rank, and wait until they are gone."""
        from launcher.run import processes

        processes.end(self._process)


def _stop_with_parent() -> None:
    """In the child, before it runs: be sent SIGTERM when the supervisor dies, however it dies (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
