"""How ranks meet."""

from __future__ import annotations

from datetime import timedelta

from launcher.run.heartbeat import limits
from launcher.worker.engine import patience


def test_a_collective_waits_longer_than_whatever_a_rank_may_do_alone() -> None:
    for checkpoint in (None, 12 * 124_000_000, 12 * 70_000_000_000):
        assert patience(None, checkpoint) > timedelta(seconds=max(limits(checkpoint).values()))
    assert patience(5.0, None) == timedelta(seconds=5), "train.extra.ddp_timeout"
