"""What an attempt came to, from the ranks' last words. Attempts themselves: tests/test_train.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import TrainingError
from launcher.run import checkpoints as ledger
from launcher.run import journal
from launcher.run.directory import RunDirectory
from launcher.run.outcome import Outcome, RankEnd
from launcher.run.supervise import _failure, _outcome, is_finished


def ends(*outcomes: Outcome) -> list[RankEnd]:
    """One last word for each rank, in the order they came."""
    return [RankEnd(rank, outcome, 5, 100.0 + rank) for rank, outcome in enumerate(outcomes)]


F, S, C, M = Outcome.FINISHED, Outcome.STOPPED, Outcome.CRASHED, Outcome.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("said", "world_size", "outcome"),
    [
        ((F, F), 2, F),
        ((S, S), 2, S),
        ((F, S), 2, S),
        ((F,), 2, C),
        ((S,), 2, C),
        ((), 1, C),
        ((C, F), 2, C),
        ((M, C), 2, M),
        ((C, M), 2, C),
        ((S, M), 2, M),
        ((M,), 2, M),
    ],
)
def test_the_outcome_of_an_attempt(said: tuple[Outcome, ...], world_size: int, outcome: Outcome) -> None:
    assert _outcome(ends(*said), world_size) == outcome


@given(said=st.lists(st.sampled_from(Outcome), max_size=4), missing=st.integers(0, 2))
def test_an_attempt_has_finished_only_if_every_rank_says_so(said: list[Outcome], missing: int) -> None:
    found = _outcome(ends(*said), len(said) + missing)
    assert (found == F) == (not missing and all(each == F for each in said))
    assert found != S or not missing


def test_the_rank_that_failed_first_is_named_with_its_own_code(tmp_path: Path) -> None:
    said = [
        RankEnd(0, C, 4, 20.0, "DistBackendError: connection closed by peer"),
        RankEnd(1, C, 4, 10.0, "data.train: gone", hint="put it back", exit_code=2),
    ]
    failure = _failure(RunDirectory(tmp_path), 1, said)
    assert (failure.message, failure.hint) == ("rank 1: data.train: gone", "put it back")
    assert failure.exit_code == 2
    own = _failure(RunDirectory(tmp_path), 1, [RankEnd(0, C, 4, 20.0, "ArithmeticError: x")])
    assert own.exit_code == TrainingError.exit_code
    assert str(RunDirectory(tmp_path).log(1, 0)) in (own.hint or "")


def test_where_no_rank_lived_to_say_it_the_end_of_the_launch_log_is_shown(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.logs(1).mkdir(parents=True)
    directory.launch_log(1).write_bytes(b"\n".join(b"line %d \xff" % n for n in range(100)))
    failure = _failure(directory, 1, ends(F))
    assert isinstance(failure, TrainingError)
    assert "killed or never started" in failure.message
    assert "line 99" in failure.message
    assert "line 10 " not in failure.message


def test_finished_is_the_last_attempt_at_this_length_with_its_model(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert not is_finished(directory, 20)

    def attempt(outcome: Outcome, steps: int) -> None:
        journal.record(directory.journal, "attempt_started", attempt=1)
        journal.record(directory.journal, "attempt_ended", outcome=outcome, planned_steps=steps, step=steps)

    attempt(S, 20)
    directory.model.mkdir()
    assert not is_finished(directory, 20)
    attempt(F, 20)
    assert is_finished(directory, 20)
    assert not is_finished(directory, 30), "it was asked to grow"
    attempt(C, 30)
    assert not is_finished(directory, 30)
    assert not is_finished(directory, 20), "what it made then may be gone by now"
    attempt(F, 30)
    assert is_finished(directory, 30)
    ledger.commit(ledger.begin(directory.checkpoints, 30), step=30, samples=240, world_size=1, created=0.0)
    assert is_finished(directory, 30)
    ledger.commit(ledger.begin(directory.checkpoints, 20), step=20, samples=160, world_size=1, created=0.0)
    assert is_finished(directory, 30)
    (directory.checkpoints / "step-00000030").rename(tmp_path / "aside")
    assert not is_finished(directory, 30), "whoever moves it away goes back to step 20"
    directory.model.rmdir()
    assert not is_finished(directory, 30)
