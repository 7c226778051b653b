from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.run.heartbeat import LIMIT_VARIABLE, LIMITS, Beat, limits, read_beat
from launcher.worker.heart import GIVEN_UP_SECONDS, Heart
from tests.conftest import stale


@pytest.fixture
def heart(tmp_path: Path) -> Iterator[Heart]:
    found = Heart(tmp_path / "rank-1.heartbeat", tmp_path / "stacks", 1, {LIMIT_VARIABLE: "3"})
    found.start()
    yield found
    found.stop()


@pytest.fixture
def told(tmp_path: Path) -> Callable[[Callable[[Beat], bool]], Beat]:
    """The first beat of which something holds."""

    def wait(holds: Callable[[Beat], bool]) -> Beat:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            beat = read_beat(tmp_path / "rank-1.heartbeat")
            if beat is not None and holds(beat):
                return beat
            time.sleep(0.05)
        raise AssertionError("it was never told")

    return wait


def test_it_tells_how_far_it_is_and_where_it_is_stuck(
    heart: Heart,
    told: Callable[[Callable[[Beat], bool]], Beat],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    begun = told(lambda beat: True)
    assert (begun.rank, begun.phase, begun.step, begun.limit) == (1, "starting", 0, LIMITS["starting"])
    heart.step(1)
    heart.step(2)
    heart.saved(1.5)
    with heart.during("saving"):
        assert told(lambda beat: beat.phase == "saving").limit == LIMITS["saving"]
    trains = told(lambda beat: beat.phase == "training")
    assert (trains.step, trains.limit) == (2, 3.0)
    assert trains.step_seconds is not None
    assert trains.save_seconds == 1.5
    stuck = told(lambda beat: beat.quiet > beat.limit)
    assert stuck.at is not None
    assert "worker/test_heart.py" in stuck.at
    assert not stuck.waits
    time.sleep(1.2)
    said = capfd.readouterr().err
    assert said.count("Timeout (") == 1, "all stacks, by themselves, once"
    assert "in test_it_tells_how_far_it_is_and_where_it_is_stuck" in said
    (tmp_path / "stacks").touch()
    time.sleep(2.2)
    assert capfd.readouterr().err.count("in test_it_tells_how_far_it_is_and_where_it_is_stuck") == 1
    heart.beat()
    assert told(lambda beat: beat.quiet < 1).at is None


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock of a heart by so many seconds."""
    now = [1000.0]
    monkeypatch.setattr(
        "launcher.worker.heart.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    )

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def test_what_is_no_training_is_none_of_a_step_s_time(tmp_path: Path, moved: Callable[[float], None]) -> None:
    """Or one long evaluation would let every later step take ten times as long before it is a hang."""
    heart = Heart(tmp_path / "beat", tmp_path / "stacks", 0, {})
    heart.step(1)
    moved(2.0)
    with heart.during("evaluating"):
        moved(500.0)
    moved(1.0)
    heart.step(2)
    told = heart._now(quiet=0.0, limit=1.0)
    assert (told.phase, told.step_seconds) == ("training", 3.0)


def test_a_rank_waits_two_of_its_own_steps_before_it_waits_in_vain(
    tmp_path: Path, moved: Callable[[float], None]
) -> None:
    heart = Heart(tmp_path / "beat", tmp_path / "stacks", 0, {}, handover=tmp_path / "handover")
    (tmp_path / "handover").touch()
    heart.step(1)
    assert heart._waits_in_vain(GIVEN_UP_SECONDS + 1)
    moved(2 * GIVEN_UP_SECONDS)
    heart.step(2)
    assert not heart._waits_in_vain(4 * GIVEN_UP_SECONDS - 1)
    assert heart._waits_in_vain(4 * GIVEN_UP_SECONDS + 1)
    (tmp_path / "handover").unlink()
    assert not heart._waits_in_vain(4 * GIVEN_UP_SECONDS + 1)


def test_it_ends_with_its_rank(tmp_path: Path, told: Callable[[Callable[[Beat], bool]], Beat]) -> None:
    heart = Heart(tmp_path / "rank-1.heartbeat", tmp_path / "stacks", 1, {}, checkpoint=12 * 70_000_000_000)
    heart.start()
    assert told(lambda beat: True).limit == limits(12 * 70_000_000_000)["starting"] > LIMITS["starting"]
    heart.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "heart"]


def test_it_beats_on_after_a_fault_of_the_file_system_that_passes(
    heart: Heart, told: Callable[[Callable[[Beat], bool]], Beat], monkeypatch: pytest.MonkeyPatch
) -> None:
    told(lambda beat: True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stale)
        time.sleep(1.5)
    heart.step(7)
    told(lambda beat: beat.step == 7)


def test_a_process_leaves_once_another_attempt_has_begun(tmp_path: Path) -> None:
    """One that was frozen with its machine, say: it must not go on beside the others."""
    words = """
import pathlib, sys, time
from launcher.worker.heart import Heart
folder = pathlib.Path(sys.argv[1])
Heart(folder / "beat", folder / "stacks", 0, {}, later=folder / "attempt-002").start()
time.sleep(1.5)
(folder / "attempt-002").mkdir()
time.sleep(30)
"""
    done = subprocess.run(
        [sys.executable, "-c", words, str(tmp_path)], capture_output=True, text=True, timeout=25, check=False
    )
    assert done.returncode == 1
    assert "another attempt has begun" in done.stderr
    assert (tmp_path / "beat").exists()


@pytest.mark.parametrize(("phase", "code"), [("training", 1), ("saving", 0)])
def test_a_rank_that_waits_in_vain_leaves_the_run_to_who_waits_for_it(
    tmp_path: Path, phase: str, code: int
) -> None:
    words = """
import pathlib, sys, time
from launcher.worker import heart
heart.GIVEN_UP_SECONDS = 3
folder = pathlib.Path(sys.argv[1])
own = heart.Heart(folder / "beat", folder / "stacks", 0, {}, handover=folder / "handover")
own.step(1)
own.start()
with own.during(sys.argv[2]):
    time.sleep(0.5)
    (folder / "handover").touch()
    time.sleep(8)
"""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", words, str(tmp_path), phase],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert ("another supervisor waits for this run" in done.stderr) is bool(code)
    assert time.monotonic() - begun > 3
