"""Machines that a test lends to a run."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.run.launching import Ranks
from launcher.run.local import Local
from launcher.run.outcome import Facts, Outcome


class Machines:
    """Machines on which nothing is to be started (`run.launching.Launching`), of which `known` is known; a
    queue that takes a run back where it `requeues`."""

    asking = Local.asking
    takes_over = False
    told_seconds = 0.0

    def __init__(self, *, requeues: bool = False) -> None:
        self.known = Facts()
        self.requeues = requeues
        self.handed: list[Outcome] = []

    def ends_at(self) -> float | None:
        return None

    def check_nodes(self) -> None:
        pass

    def start(self, attempt: int) -> Ranks:
        raise AssertionError("nothing is to be started")

    def facts(self, signals: Sequence[int]) -> Facts:
        return self.known

    def past(self, attempt: int) -> Facts:
        return self.known

    def hands_over(self, outcome: Outcome, why: str) -> bool:
        self.handed.append(outcome)
        return self.requeues and outcome is not Outcome.STOPPED
