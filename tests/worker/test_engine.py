"""How ranks meet."""

from __future__ import annotations

from datetime import timedelta

from launcher.run.heartbeat import LIMITS
from launcher.worker.engine import patience


def test_a_collective_waits_longer_than_whatever_a_rank_may_do_alone() -> None:
    assert patience(None) > timedelta(seconds=max(LIMITS.values()))
    assert patience(5.0) == timedelta(seconds=5), "train.extra.ddp_timeout"
