"""What the supervisor needs of whatever starts the ranks: this machine (`run.local`), or a scheduler."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from launcher.run.outcome import Facts, Outcome

RANK_ENVIRONMENT: Mapping[str, str] = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
"""For whatever starts the ranks. torch's launcher, told to end, kills its ranks after so many seconds: enough
to save a checkpoint, where the supervisor is gone. Where it lives, it does not wait so long."""

ASK_SECONDS = 0.05


class Ranks(Protocol):
    """The ranks of one attempt, once started.

    `leave_seconds`: how long what started them may take to end by itself after all of them have.
    """

    leave_seconds: float

    def poll(self) -> int | None:
        """The exit code of what started them; None while it runs."""

    def end(self) -> None:
        """Kill every rank on every node, and return once they are gone. May be called again."""


class Launching(Protocol):
    """One way to start ranks and to learn what became of them. While there are ranks, no call takes longer
    than a second or so, except `end`: the supervisor asks several times a second."""

    @property
    def asking(self) -> Sequence[signal.Signals]:
        """The signals that ask for a safe stop."""

    @property
    def takes_over(self) -> bool:
        """Whether who runs here is the only one that the scheduler means to train the run."""

    @property
    def told_seconds(self) -> float:
        """Within how many seconds of a signal it is known whether the machines are taken back."""

    def ends_at(self) -> float | None:
        """When the machines are taken back, in seconds since the epoch; None: never, or nobody says."""

    def check_nodes(self) -> None:
        """Have every node answer for itself, before there are ranks. Raises Interrupted where the run is
        queued again without those at fault, and MachineError where that would not help."""

    def start(self, attempt: int) -> Ranks:
        """Start every rank of every node, with LAUNCHER_ATTEMPT set to `attempt`."""

    def facts(self, signals: Sequence[int]) -> Facts:
        """What is known of the attempt now, given the signals that the supervisor got during it."""

    def past(self, attempt: int) -> Facts:
        """What is known of an earlier attempt, whose supervisor did not live to see it end."""

    def hands_over(self, outcome: Outcome, why: str) -> bool:
        """Whether the scheduler itself starts the run again after `outcome`, once asked here (a requeue): the
        supervisor then ends, and the next one goes on by the journal."""


def facts_in_time(launching: Launching, received: Sequence[int]) -> Facts:
    """What is known of the machines, once it can be, where no ranks run: whoever takes them may send a signal
    first."""
    until = time.monotonic() + launching.told_seconds
    while True:
        facts = launching.facts(received)
        if facts.asks_to_stop or facts.failed_nodes or time.monotonic() > until:
            return facts
        time.sleep(ASK_SECONDS)
