"""Nodes that did a run harm, and for how long it stays away from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from launcher.config.schema import SlurmSection
from launcher.run import journal, slurm
from launcher.run.directory import RunDirectory

HOURS: Final = 6.0
"""How long a run stays away from a node that did it harm: long enough for somebody to look at it, and short
enough that a whole cluster is not given up for one bad night."""


def avoid(directory: RunDirectory, nodes: Sequence[str], why: str, now: float) -> None:
    """Stay away from these nodes, for HOURS from `now` (seconds since the epoch)."""
    journal.note(directory.journal, "nodes_avoided", nodes=list(nodes), until=now + HOURS * 3600, why=why)


def nodes_to_avoid(directory: RunDirectory, now: float) -> tuple[str, ...]:
    """The nodes to stay away from at `now`."""
    told = [each for each in journal.events(directory.journal, "nodes_avoided") if each["until"] > now]
    return tuple(dict.fromkeys(node for each in told for node in each["nodes"]))


def why_avoided(directory: RunDirectory, nodes: Collection[str]) -> str:
    """What was said last of one of these nodes, as the run began to stay away from it."""
    events = journal.events(directory.journal, "nodes_avoided")
    return str([each for each in events if set(each["nodes"]) & set(nodes)][-1]["why"])


def has_avoided(directory: RunDirectory) -> bool:
    """Whether the run ever stayed away from a node."""
    return bool(journal.events(directory.journal, "nodes_avoided"))


def excludable(
    avoided: Sequence[str], never: Sequence[str], lent: Sequence[str], needed: int
) -> tuple[str, ...]:
    """Those of the nodes to avoid that a job of `needed` nodes can do without: all, or none where too few of
    the nodes `lent` would be left. SLURM would hold the job for ever (BadConstraints), and say nothing.

    `never`: nodes that the cluster file excludes.
    """
    return tuple(avoided) if len(set(lent) - set(avoided) - set(never)) >= needed else ()


def excluded_now(
    directory: RunDirectory, asked: SlurmSection, partitions: Collection[str], needed: int, now: float
) -> tuple[str, ...]:
    """The nodes that a job of `needed` nodes in one of `partitions` is to stay away from at `now`, besides
    those that its cluster file excludes; no partition: the one that is taken where none is named.

    Raises what `slurm.said` does.
    """
    avoided = nodes_to_avoid(directory, now)
    if not avoided:
        return ()
    wanted = [
        each
        for each, default in slurm.partitions()
        if each.name in partitions or (default and not partitions)
    ]
    lent = [node for each in wanted for node in each.nodes]
    return excludable(avoided, slurm.hosts(",".join(asked.exclude)), lent, needed)


def exclude_list(asked: SlurmSection, excluded: Sequence[str]) -> str:
    """What SLURM is told: those nodes, and those that the cluster file excludes."""
    return ",".join([*asked.exclude, *excluded])
