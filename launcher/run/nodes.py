"""What each node of a job says of itself before training, and who is at fault. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

from launcher.sizes import size_in_words

SLOW: Final = 5.0
"""A pair of nodes is slow if it takes so many times as long as the fastest quarter: of three nodes, one that
is bad is in two pairs of the three."""
SLOW_SECONDS: Final = 0.5
"""And at least so long: below it, a busy switch is no fault."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two nodes that added up a tensor: the seconds it took, None where it failed."""

    nodes: tuple[str, str]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node: `sees` the run directory, has `free` bytes there; the `gpus` that torch finds; `versions` of
    what a run depends on. `taken`: the port on it at which all were to meet, where another program has it."""

    host: str
    sees: bool
    free: int
    gpus: int
    versions: Mapping[str, str | None]
    pairs: tuple[Pair, ...] = ()
    taken: int | None = None

    @classmethod
    def from_line(cls, line: str) -> NodeReport:
        """The report in a line of JSON. Raises ValueError, KeyError or TypeError on anything else."""
        said: dict[str, Any] = json.loads(line)
        pairs = tuple(Pair((said["host"], each["with"]), each["seconds"]) for each in said["pairs"])
        known = (said["host"], said["sees"], said["free"], said["gpus"], said["versions"])
        return cls(*known, pairs, said.get("taken"))


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong: `faults` in words, and the `culprits` that the run is better off without.

    Culprits are named only where the other nodes, the most of them, are sound.
    """

    faults: tuple[str, ...] = ()
    culprits: tuple[str, ...] = field(default=())


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` nodes once, in rounds in which each node has one partner at most.

    The circle method: the first stays, the others go round it (Kirkman 1847).
    """
    ring = list(range(count)) + ([-1] if count % 2 else [])
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def judge(
    reports: Sequence[NodeReport],
    hosts: Sequence[str],
    room: int,
    submitted: Mapping[str, str | None] | None = None,
    gpus: int = 0,
) -> Findings:
    """What is wrong with the nodes of a job, whose names are `hosts`.

    `room`: bytes that a run needs; `submitted`: the versions that it was submitted with, None where the ranks
    have others, as in a container: then most nodes are right, and of two the first. `gpus`: how many the
    ranks of a node need.
    """
    faults: list[str] = []
    culprits: list[str] = []
    heard = {report.host for report in reports}
    for words, host in _absent(reports, hosts):
        faults.append(words)
        culprits.append(host)
    for report in reports:
        if not report.sees:
            faults.append(
                f"{report.host} does not see the run directory: put output_dir on a shared file system"
            )
            culprits.append(report.host)
        if report.gpus < gpus:
            faults.append(f"torch finds {report.gpus} GPUs on {report.host}, and its ranks need {gpus}")
            culprits.append(report.host)
    faults += _room(reports, room)
    for host, words in _other_versions(reports, submitted):
        faults.append(words)
        culprits.append(host)
    for words, blamed in _pairs(reports, heard):
        faults.append(words)
        culprits += blamed
    named = tuple(dict.fromkeys(culprits))
    return Findings(tuple(faults), named if 2 * len(named) < len(hosts) + 1 else ())


def _absent(reports: Sequence[NodeReport], hosts: Sequence[str]) -> list[tuple[str, str]]:
    """Nodes that did not answer; where they had no port to meet at, the one that it is taken on."""
    taken = [
        (f"port {report.taken}, at which the nodes meet, is taken on {report.host}", report.host)
        for report in reports
        if report.taken is not None
    ]
    heard = {report.host for report in reports}
    return taken or [(f"{host} did not answer", host) for host in hosts if host not in heard]


def _room(reports: Sequence[NodeReport], room: int) -> list[str]:
    """It is one file system: no node is to blame."""
    seeing = [report for report in reports if report.sees]
    least = min((report.free for report in seeing), default=room)
    if least >= room:
        return []
    left, needed = size_in_words(least), size_in_words(room)
    return [f"there are {left} left for the run directory, and a checkpoint takes {needed}"]


def _other_versions(
    reports: Sequence[NodeReport], submitted: Mapping[str, str | None] | None
) -> list[tuple[str, str]]:
    """Nodes whose packages are not those of the run, or of most."""
    found = []
    for package in dict.fromkeys(name for report in reports for name in report.versions):
        count = Counter(report.versions.get(package) for report in reports)
        most = max(count, key=lambda version: count[version])  # the first node's, where it is even
        usual = most if submitted is None else submitted.get(package)
        found += [
            (report.host, f"{report.host} has {_named(package, version)}, and it should be {usual or 'none'}")
            for report in reports
            if (version := report.versions.get(package)) != usual
        ]
    return found


def _named(package: str, version: str | None) -> str:
    return f"no {package}" if version is None else f"{package} {version}"


def _pairs(reports: Sequence[NodeReport], heard: Set[str]) -> list[tuple[str, list[str]]]:
    """Pairs of nodes that were `heard` which failed or were slow, and who is in most of them."""
    told: dict[tuple[str, str], list[float | None]] = {}
    for report in reports:
        for pair in (each for each in report.pairs if set(each.nodes) <= heard):
            told.setdefault((min(pair.nodes), max(pair.nodes)), []).append(pair.seconds)
    times = sorted(seconds for each in told.values() for seconds in each if seconds is not None)
    usual = times[len(times) // 4] if times else 0.0
    limit = max(SLOW_SECONDS, SLOW * usual)
    bad: dict[tuple[str, str], str] = {}
    for nodes, each in told.items():
        slowest = max((seconds for seconds in each if seconds is not None), default=0.0)
        if None in each:
            bad[nodes] = f"{nodes[0]} and {nodes[1]} cannot reach each other"
        elif slowest > limit:
            bad[nodes] = f"{nodes[0]} and {nodes[1]} take {slowest:.1f} s, others {usual:.2f} s"
    partners = Counter(node for nodes in told for node in nodes)
    faulty = Counter(node for nodes in bad for node in nodes)
    # In every pair it was in, while there were others: the fault is its own.
    blamed = [node for node, count in faulty.items() if count == partners[node] and count > 1]
    return [(words, [node for node in nodes if node in blamed]) for nodes, words in bad.items()]
