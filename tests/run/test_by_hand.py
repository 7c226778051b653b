"""Attempts that were started by hand, told by what their ranks have left."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.plan.orders import Orders, format_orders
from launcher.run import journal
from launcher.run.directory import RunDirectory, hold
from launcher.run.outcome import Outcome, RankEnd
from launcher.run.status import Attempt, read_status
from launcher.run.supervise import is_finished
from tests.conftest import small_plan

NOW = 100.0


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path)
    directory.orders.write_text(format_orders(Orders("0", "0", small_plan(), {}, None, None, None)))
    return directory


def start(directory: RunDirectory, number: int) -> None:
    directory.logs(number).mkdir(parents=True)
    for rank in (0, 1):
        directory.log(number, rank).touch()


def say(directory: RunDirectory, number: int, rank: int, outcome: Outcome, **more: object) -> None:
    end = RankEnd(rank, outcome, 20, NOW, **more)  # type: ignore[arg-type]
    end.write(directory.record(number, rank))


def test_one_that_finished_is_finished(directory: RunDirectory) -> None:
    start(directory, 1)
    assert read_status(directory, None, NOW).state == "killed", "nobody lives"
    with hold(directory.ranks_lock, directory, "us"):
        assert read_status(directory, None, NOW).state == "running without its supervisor"
    directory.model.mkdir()
    say(directory, 1, 0, Outcome.FINISHED, planned_steps=20)
    assert not is_finished(directory, 20), "rank 1 has not said so"
    say(directory, 1, 1, Outcome.FINISHED, planned_steps=20)
    found = read_status(directory, None, NOW)
    assert (found.state, found.attempts) == (
        "finished",
        [Attempt(1, 2, "FINISHED", 20, reason="every rank finished")],
    )
    assert is_finished(directory, 20)
    assert not is_finished(directory, 30), "it was asked to grow"
    assert not directory.journal.exists(), "nothing is written by looking"


def test_what_a_supervisor_saw_before_no_longer_counts(directory: RunDirectory) -> None:
    journal.record(directory.journal, "attempt_started", attempt=1, world_size=2)
    seen = {"outcome": "FINISHED", "step": 10, "planned_steps": 10, "reason": "every rank finished"}
    journal.record(directory.journal, "attempt_ended", attempt=1, **seen)
    journal.record(directory.journal, "ended", outcome="FINISHED", reason="every rank finished", step=10)
    start(directory, 1)
    directory.model.mkdir()
    assert is_finished(directory, 10)
    start(directory, 2)
    say(directory, 2, 1, Outcome.CRASHED, error="OSError: gone")
    found = read_status(directory, None, NOW)
    assert (found.state, found.reason) == ("crashed", None)
    assert found.attempts[-1].reason == "rank 1: OSError: gone"
    assert not is_finished(directory, 10)
    start(directory, 3)
    assert read_status(directory, None, NOW).state == "killed", "before its ranks have said anything"
