from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.run.outcome import Outcome, RankEnd, first_failure, read_end

FAILURES = (Outcome.CRASHED, Outcome.OUT_OF_MEMORY)
ENDS = st.builds(
    RankEnd,
    rank=st.integers(0, 7),
    outcome=st.sampled_from(Outcome),
    step=st.integers(0, 100),
    time=st.floats(0, 2e9),
    error=st.none() | st.text(),
    hint=st.none() | st.text(),
    exit_code=st.integers(1, 3),
)


@given(ends=st.lists(ENDS))
def test_the_first_failure_is_the_one_nothing_failed_before(ends: list[RankEnd]) -> None:
    first = first_failure(ends)
    failed = [end for end in ends if end.outcome in FAILURES]
    assert (first is None) == (not failed)
    if first is not None:
        assert first in failed
        assert not any(end.time < first.time for end in failed)


@pytest.mark.parametrize("outcome", Outcome)
def test_a_last_word_is_read_as_it_was_said(tmp_path: Path, outcome: Outcome) -> None:
    end = RankEnd(3, outcome, 17, 1763858761.25, "naïve: 你好\nand more", 'say "stop"', exit_code=2)
    end.write(tmp_path / "rank-3.end.json")
    read = read_end(tmp_path / "rank-3.end.json")
    assert read == end
    assert read is not None
    assert read.outcome is outcome


def test_a_rank_that_could_not_say_anything(tmp_path: Path) -> None:
    assert read_end(tmp_path / "nothing.json") is None
    RankEnd(0, Outcome.CRASHED, 1, 1.0, "half").write(tmp_path / "half.json")
    whole = (tmp_path / "half.json").read_bytes()
    for cut in (0, 1, len(whole) // 2):
        (tmp_path / "half.json").write_bytes(whole[:cut])
        assert read_end(tmp_path / "half.json") is None
