"""How an attempt ended: decided from the ranks' own last words and from signals, never an exit code alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path


class Outcome(StrEnum):
    """The typed ways an attempt can end."""

    FINISHED = "FINISHED"
    STOPPED = "STOPPED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    CRASHED = "CRASHED"


@dataclass(frozen=True, slots=True)
class RankEnd:
    """One rank's last word. `time` is seconds since the epoch; `error` is None unless it failed."""

    rank: int
    outcome: Outcome
    step: int
    time: float
    error: str | None = None
    hint: str | None = None
    exit_code: int = 1

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")


def read_end(file: Path) -> RankEnd | None:
    """The last word in `file`; None where the rank was killed before it could say one."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return RankEnd(**{**fields, "outcome": Outcome(fields["outcome"])})


def first_failure(ends: Sequence[RankEnd]) -> RankEnd | None:
    """The failure that came first: the others are usually only its echo."""
    failed = [end for end in ends if end.outcome in (Outcome.CRASHED, Outcome.OUT_OF_MEMORY)]
    return min(failed, key=lambda end: end.time, default=None)
