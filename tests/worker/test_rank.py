"""What a rank says last."""

from __future__ import annotations

import io
import sys

import pytest

from launcher.run.outcome import Outcome
from launcher.worker.rank import last_word


def test_a_log_without_room_does_not_keep_a_rank_from_its_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    monkeypatch.setattr(sys, "stderr", full)
    end = last_word(1, 7, ArithmeticError("went wrong"))
    assert (end.outcome, end.step, end.error) == (Outcome.CRASHED, 7, "ArithmeticError: went wrong")
