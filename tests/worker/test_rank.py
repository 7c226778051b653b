"""What a rank says last."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from launcher.errors import DataError
from launcher.run.directory import RunDirectory
from launcher.run.outcome import Outcome, RankEnd, read_end
from launcher.worker.heart import Heart
from launcher.worker.rank import Rank, last_word, say_last, tells_failure
from tests.conftest import Workplace


def test_a_log_without_room_does_not_keep_a_rank_from_its_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    monkeypatch.setattr(sys, "stderr", full)
    end = last_word(1, 7, ArithmeticError("went wrong"))
    assert (end.outcome, end.step, end.error) == (Outcome.CRASHED, 7, "ArithmeticError: went wrong")


def test_what_launcher_refuses_is_in_the_log_with_what_to_do_and_without_a_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    end = last_word(1, 7, DataError("went wrong", file="a.txt", offset=3, hint="mend it"))
    assert (end.error, end.hint, end.retry) == ("a.txt, byte 3: went wrong", "mend it", False)
    assert capfd.readouterr().err == "error: a.txt, byte 3: went wrong\n  hint: mend it\n"


def test_a_rank_launched_by_hand_tells_of_its_failure(workplace: Workplace) -> None:
    workplace.run("plan", "run.yaml", "--write", "made")
    directory = RunDirectory(workplace.folder / "made")
    command = [sys.executable, "-m", "launcher.worker", str(directory.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: rank 0: this run's text is not prepared\n  hint: run `launcher train RUN`" in done.stderr
    assert "Traceback" not in directory.log(1, 0).read_text()


@pytest.mark.parametrize("by_hand", [True, False])
def test_of_ranks_that_fail_alike_the_first_tells_who_launched_them_by_hand(
    tmp_path: Path, by_hand: bool
) -> None:
    directory, told = RunDirectory(tmp_path), io.StringIO()
    directory.logs(1).mkdir(parents=True)
    for number in (1, 0):
        errors, heart = told if by_hand else None, cast(Heart, None)
        rank = Rank(number, 2, 1, io.StringIO(), errors, None, heart)
        end = RankEnd(number, Outcome.CRASHED, 3, 1.0, "ValueError: went wrong")
        say_last(end, directory, rank, tells=tells_failure(directory, rank))
        assert read_end(directory.record(1, number)) == end
    log = directory.log(1, 1)
    expected = f"error: rank 1: ValueError: went wrong\n  hint: the traceback is in {log}\n"
    assert told.getvalue() == (expected if by_hand else "")
