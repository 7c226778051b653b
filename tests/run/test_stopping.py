from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.run.directory import RunDirectory
from launcher.run.heartbeat import FILE_SPEED, Beat, write_beat
from launcher.run.stopping import MARGIN, need_of
from tests.conftest import small_plan

BEAT = Beat(0, "n1", 1, "training", 5, 0.0, 0.0, 0.0, 120.0)


def test_before_anything_is_measured_the_plan_is_asked(tmp_path: Path) -> None:
    large = replace(small_plan(), parameters=1_000_000_000)
    need = need_of(RunDirectory(tmp_path), large)
    assert not need.measured
    assert need.seconds == pytest.approx(MARGIN + 1.5 * 12e9 / FILE_SPEED)


def test_the_slowest_rank_and_save_of_the_attempt_count(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for rank, step, save in ((0, 2.0, 30.0), (1, 5.0, 20.0)):
        directory.logs(3).mkdir(parents=True, exist_ok=True)
        write_beat(
            directory.heartbeat(3, rank), replace(BEAT, rank=rank, step_seconds=step, save_seconds=save)
        )
    need = need_of(directory, small_plan())
    assert need.measured
    assert need.seconds == pytest.approx(MARGIN + 3 * 5.0 + 1.5 * 30.0)
    assert need_of(directory, small_plan(), attempt=4).measured is False
