"""How a run stands, from files as the ranks and the supervisor leave them."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import RequestError, RunDirectoryError
from launcher.plan.orders import Orders, format_orders
from launcher.run import checkpoints as ledger
from launcher.run import journal, status
from launcher.run.directory import RunDirectory, hold, is_held
from launcher.run.heartbeat import Beat, write_beat
from launcher.run.status import Attempt, find_runs, read_status
from tests.conftest import small_plan

NOW = 10_000.0


def make(root: Path) -> RunDirectory:
    """A run directory as the control half leaves it: a plan of 20 steps, and nothing started."""
    root.mkdir(parents=True)
    directory = RunDirectory(root)
    directory.orders.write_text(format_orders(Orders("0", "0", small_plan(), {}, None, None, None)))
    return directory


def event(directory: RunDirectory, at: float, name: str, **facts: object) -> None:
    with directory.journal.open("a") as stream:
        stream.write(json.dumps({"time": at, "event": name, **facts}) + "\n")


def report(directory: RunDirectory, step: int, at: float, **numbers: object) -> None:
    with directory.metrics.open("a") as stream:
        stream.write(json.dumps({"step": step, "time": at, **numbers}) + "\n")


def save(directory: RunDirectory, step: int, created: float) -> Path:
    folder = ledger.begin(directory.checkpoints, step)
    (folder / "weights").write_bytes(b"w" * 100)
    return ledger.commit(folder, step=step, samples=8 * step, world_size=2, created=created).folder


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return make(tmp_path / "small")


def test_a_run_that_trains(directory: RunDirectory) -> None:
    event(directory, NOW - 5000, "attempt_started", attempt=1, world_size=2)
    report(directory, 7, NOW - 4000, loss=5.0)
    event(directory, NOW - 3900, "attempt_ended", attempt=1, outcome="CRASHED", step=8, reason="rank 1: gone")
    event(directory, NOW - 100, "attempt_started", attempt=2, world_size=4)
    report(directory, 8, NOW - 70, loss=4.5)
    report(directory, 8, NOW - 65, eval_loss=4.6)
    numbers = {"tokens_per_second": 12.5, "mfu": 0.4, "matmul_share": 0.5, "peak_memory_bytes": 9}
    spent = {"data_wait_seconds": 0.5, "host_seconds": 2.0}
    behind = {"slowest_rank": 3, "slowest_rank_lag_seconds": 0.25}
    report(directory, 10, NOW - 50, loss=4.25, tokens=640, **numbers, **spent, **behind)
    report(directory, 10, NOW - 45, save_seconds=1.0)
    save(directory, 5, NOW - 4200)
    save(directory, 9, NOW - 60)
    torn = save(directory, 10, NOW - 45)
    (torn / "weights").write_bytes(b"w")
    directory.logs(2).mkdir(parents=True)
    beat = Beat(0, "here", 1, "evaluating", 11, NOW - 2, NOW - 1, quiet=1.0, limit=600.0)
    write_beat(directory.heartbeat(2, 0), beat)
    with hold(directory.lock, directory, "us"):
        found = read_status(directory, None, NOW)
    assert (found.state, found.alive, found.phase) == ("running", "supervisor", "evaluating")
    assert (found.step, found.steps, found.loss, found.tokens) == (11, 20, 4.25, 640)
    assert {name: getattr(found, name) for name in numbers} == numbers
    assert (found.data_wait_seconds, found.host_seconds) == (0.5, 2.0)
    assert (found.slowest_rank, found.slowest_rank_lag_seconds) == (3, 0.25)
    assert (found.eval_loss, found.eval_step) == (4.6, 8)
    # 2 steps took 20 s with the evaluation between them, and the attempt before is no measure: 9 are left.
    assert found.seconds_left == pytest.approx(90.0)
    assert found.checkpoint == status.Saved(9, 100, 60.0), "the newest is not whole"
    assert found.attempts == [
        Attempt(1, 2, "CRASHED", 8, 1100.0, "rank 1: gone"),
        Attempt(2, 4, seconds=100.0),
    ]


def test_the_state_follows_the_locks_and_the_journal(directory: RunDirectory) -> None:
    def state() -> str:
        return read_status(directory, None, NOW).state

    assert state() == "not started"
    with hold(directory.lock, directory, "us"):
        assert state() == "starting"
        event(directory, 1.0, "attempt_started", attempt=1, world_size=2)
        assert state() == "running"
        directory.stop_request.parent.mkdir()
        directory.stop_request.touch()
        assert state() == "stopping"
        directory.stop_request.unlink()
    assert state() == "killed"
    with hold(directory.ranks_lock, directory, "us"):
        assert state() == "running without its supervisor"
    event(directory, 2.0, "attempt_ended", attempt=1, outcome="NODE_FAILED", step=3)
    assert state() == "node failed"
    event(directory, 3.0, "ended", outcome="NO_PROGRESS", reason="3 attempts in a row", step=3, exit_code=1)
    assert state() == "no progress"
    with hold(directory.lock, directory, "us"):
        assert state() == "restarting"


def test_looking_does_not_keep_the_supervisor_out(directory: RunDirectory) -> None:
    with directory.lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        with pytest.raises(RunDirectoryError, match="being trained by us"):
            hold(directory.lock, directory, "us")
    assert not is_held(directory.lock)
    assert not is_held(directory.ranks_lock)
    assert not directory.ranks_lock.exists(), "nothing is made by looking"
    hold(directory.lock, directory, "us").close()


def test_only_the_end_of_a_long_record_is_read(directory: RunDirectory) -> None:
    line = '{"step": 1, "time": 1.0, "loss": 9.0, "filler": "%s"}\n' % ("x" * 200)
    with directory.metrics.open("w") as stream:
        stream.write('{"step": 0, "time": 0.0, "eval_loss": 9.0}\n')
        stream.writelines([line] * 200_000)
    report(directory, 12, 5.0, loss="nan")
    with directory.metrics.open("a") as stream:
        stream.write('{"step": 13, "ti')
    begun = time.process_time()
    found = read_status(directory, None, NOW)
    assert time.process_time() - begun < 0.5
    assert (found.step, found.loss) == (12, "nan")
    assert found.eval_loss is None, "it is further back than is read"


@pytest.mark.parametrize("size", [1, 3, 64])
def test_lines_are_the_same_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(status, "BLOCK", size)
    file = tmp_path / "lines"
    file.write_text("".join(f'{{"step": {n}}}\n' for n in range(30)))
    assert [line["step"] for line in status._lines_backwards(file)] == list(reversed(range(30)))


def test_runs_are_found_by_their_plans(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "b")
    make(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "notes").mkdir()
    assert [each.root.name for each in find_runs(tmp_path / "runs")] == ["a", "b"]
    assert [each.root.name for each in find_runs(tmp_path / "runs" / "b")] == ["b"]
    with pytest.raises(RequestError, match="there is no run in"):
        find_runs(tmp_path)
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        read_status(RunDirectory(tmp_path), None, NOW)


def test_the_journal_is_read_as_it_is_written(directory: RunDirectory) -> None:
    journal.record(directory.journal, "attempt_started", attempt=1, world_size=2)
    journal.record(directory.journal, "attempt_ended", attempt=1, outcome="FINISHED", step=20)
    (attempt,) = read_status(directory, None, time.time()).attempts
    assert (attempt.outcome, attempt.step, attempt.reason) == ("FINISHED", 20, None)


def test_speed_is_shown_with_what_it_is_counted_by(directory: RunDirectory) -> None:
    shares = {"mfu": 0.4, "matmul_share": 0.625}
    behind = {"slowest_rank": 3, "slowest_rank_lag_seconds": 0.0125}
    report(directory, 10, NOW, loss=4.0, data_wait_seconds=0.25, host_seconds=1.5, **shares, **behind)
    shown = CliRunner().invoke(app, ["status", str(directory.root)]).stdout
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    for row in (
        "MFU, by PaLM's count 40.0% of the datasheet's peak",
        "62.5% of what a large matrix product reaches",
        "waited for data 0.25 s between the last two reports",
        "host in steps 1.50 s between the last two reports",
        "slowest rank 3, 12.5 ms a step behind the median",
    ):
        assert row in rows


def test_a_run_that_ended_before_its_first_attempt_is_told_by_its_end(directory: RunDirectory) -> None:
    """Stopped while its text was prepared, or given up because its nodes cannot train it."""
    event(directory, NOW - 5, "ended", outcome="NO_PROGRESS", reason="n1 has no GPU", step=0, exit_code=1)
    assert read_status(directory, None, NOW).state == "no progress"
    shown = CliRunner().invoke(app, ["status", str(directory.root)])
    assert "n1 has no GPU" in shown.output
