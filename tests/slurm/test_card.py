"""The card that the drill keeps, and how it tells attempts that ran beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.run import journal
from launcher.run.directory import RunDirectory
from launcher.run.heartbeat import Beat, write_beat
from scripts.slurm_cluster import Cluster
from scripts.slurm_drill import PAGE, Drilled, card, with_card


def test_a_card_takes_the_place_of_the_last_one_between_the_prose() -> None:
    page = "# A run\n\nBefore.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- After.\n"
    assert with_card(page, "| c |\n|---|") == "# A run\n\nBefore.\n\n| c |\n|---|\n\n- After.\n"
    kept = PAGE.read_text(encoding="utf-8")
    assert with_card(kept, card([])).count("\n|") == card([]).count("\n|") + 1


@pytest.mark.parametrize(("alive", "apart"), [(99.0, True), (101.0, False)])
def test_a_rank_that_lives_beside_a_later_attempt_is_told(tmp_path: Path, alive: float, apart: bool) -> None:
    directory = RunDirectory(tmp_path)
    for attempt, began in ((1, 50.0), (2, 100.0)):
        directory.logs(attempt).mkdir(parents=True)
        journal.record(directory.journal, "attempt_started", attempt=attempt, from_step=0)
        lines = directory.journal.read_text().splitlines()
        lines[-1] = json.dumps({**json.loads(lines[-1]), "time": began})
        directory.journal.write_text("\n".join(lines) + "\n")
    write_beat(directory.heartbeat(1, 0), Beat(0, "n1", 1, "training", 5, 0.0, alive, 0.0, 120.0))
    write_beat(directory.heartbeat(2, 0), Beat(0, "n2", 1, "training", 5, 0.0, 500.0, 0.0, 120.0))
    assert Drilled(Cluster(tmp_path, "", {}), tmp_path, "1").one_at_a_time() is apart
