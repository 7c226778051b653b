"""The nodes of a job, tried before there are ranks: what they answer, and what was found lately."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from launcher.run import journal
from launcher.run.directory import RunDirectory, write_text
from launcher.run.nodes import Findings, NodeReport, judge

PROVEN_SECONDS: Final = 3600.0
"""How long nodes that were sound together are taken to be."""
PATIENCE: Final = 3
"""So many times in a row the job is queued again without the nodes at fault; then it is not the nodes."""
ANSWER_SECONDS: Final = 600.0
"""How long the nodes may take to answer, torch's loading included."""


def findings(
    directory: RunDirectory,
    command: Sequence[str],
    word: str,
    hosts: Sequence[str],
    *,
    room: int,
    gpus: int,
    own_versions: bool,
) -> Findings:
    """What nodes `hosts` answer to `command`, which has them read `word`.

    `room`: bytes that a run needs; `gpus`: those that a node's ranks need; `own_versions`: they are to have
    the packages it was submitted with.
    """
    write_text(directory.node_check, word)
    log = directory.root / "logs" / "nodes.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        late = threading.Timer(ANSWER_SECONDS, process.kill)
        late.start()
        try:
            reports = list(_reports(process.stdout))
        finally:
            late.cancel()
            process.kill()
    submitted = json.loads(directory.environment.read_text(encoding="utf-8"))["versions"]
    return judge(reports, hosts, room, submitted if own_versions else None, gpus)


def _reports(said: Iterable[str]) -> Iterator[NodeReport]:
    """The reports among what nodes and their libraries say. One that cannot be read is none. Where the nodes
    cannot meet, nobody is waited for any more."""
    for line in said:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            report = NodeReport.from_line(line)
            yield report
            if report.taken is not None:
                return


def record(directory: RunDirectory, hosts: Sequence[str], found: Findings, now: float) -> None:
    """Write down what was found at `now`, in seconds since the epoch."""
    journal.record(
        directory.journal,
        "nodes_checked",
        nodes=list(hosts),
        until=now + PROVEN_SECONDS,
        faults=list(found.faults),
        culprits=list(found.culprits),
    )


def proven(directory: RunDirectory, now: float) -> set[str]:
    """The nodes that were sound together in the newest check, if that is not too long ago."""
    checks = journal.events(directory.journal, "nodes_checked")
    if not checks or checks[-1]["faults"] or checks[-1]["until"] < now:
        return set()
    return set(checks[-1]["nodes"])


def failures(directory: RunDirectory) -> int:
    """How many checks in a row have found a fault, the newest ones, since the run last ended."""
    count = 0
    for event in journal.read(directory.journal):
        if event["event"] == "nodes_checked":
            count = count + 1 if event["faults"] else 0
        elif event["event"] == "ended":
            count = 0
    return count
