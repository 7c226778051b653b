"""Nodes that did a run harm, and for how long it stays away from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from launcher.run import journal
from launcher.run.directory import RunDirectory

HOURS: Final = 6.0
"""How long a run stays away from a node that did it harm: long enough for somebody to look at it, and short
enough that a whole cluster is not given up for one bad night."""


def avoid(directory: RunDirectory, nodes: Sequence[str], why: str, now: float) -> None:
    """Stay away from these nodes, for HOURS from `now` (seconds since the epoch)."""
    journal.record(directory.journal, "nodes_avoided", nodes=list(nodes), until=now + HOURS * 3600, why=why)


def nodes_to_avoid(directory: RunDirectory, now: float) -> tuple[str, ...]:
    """The nodes to stay away from at `now`."""
    events = journal.read(directory.journal)
    told = [each for each in events if each["event"] == "nodes_avoided" and each["until"] > now]
    return tuple(dict.fromkeys(node for each in told for node in each["nodes"]))


def has_avoided(directory: RunDirectory) -> bool:
    """Whether the run ever stayed away from a node."""
    return any(event["event"] == "nodes_avoided" for event in journal.read(directory.journal))


def excludable(
    avoided: Sequence[str], never: Sequence[str], lent: Sequence[str], needed: int
) -> tuple[str, ...]:
    """Those of the nodes to avoid that a job of `needed` nodes can do without: all, or none where too few of
    the nodes `lent` would be left. SLURM would hold the job for ever (BadConstraints), and say nothing.

    `never`: nodes that the cluster file excludes.
    """
    return tuple(avoided) if len(set(lent) - set(avoided) - set(never)) >= needed else ()
