from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.run.outcome import (
    FAILURES,
    FINAL,
    UNLIMITED,
    Attempt,
    End,
    Evidence,
    Facts,
    Hang,
    Outcome,
    Patience,
    RankEnd,
    Restart,
    decide,
    first_failure,
    read_end,
    what_next,
)
from tests.conftest import stale

WORDS = (Outcome.FINISHED, Outcome.STOPPED, *sorted(FAILURES))
"""What a rank may say of itself."""
ENDS = st.builds(
    RankEnd,
    rank=st.integers(0, 7),
    outcome=st.sampled_from(WORDS),
    step=st.integers(0, 100),
    time=st.floats(0, 2e9),
    error=st.none() | st.text(),
    hint=st.none() | st.text(),
    exit_code=st.integers(1, 3),
    retry=st.booleans(),
)
FACTS = st.builds(
    Facts,
    preempted=st.booleans(),
    time_limit=st.booleans(),
    cancelled=st.booleans(),
    out_of_memory=st.booleans(),
    failed_nodes=st.sampled_from([(), ("n3",), ("n1", "n2")]),
)
HANGS = st.builds(
    Hang,
    ranks=st.just((1,)),
    step=st.integers(0, 9),
    seconds=st.floats(0, 9),
    how=st.just("rank 1 hung"),
    time=st.floats(0, 2e9),
)
EVIDENCE = st.builds(
    lambda ends, missing, **more: Evidence(world_size=len(ends) + missing, ends=tuple(ends), **more),
    st.lists(ENDS, max_size=4),
    st.integers(0, 2),
    facts=FACTS,
    by_person=st.booleans(),
    at_once=st.booleans(),
    hang=st.none() | HANGS,
    dead=st.sampled_from([(), (1,), (0, 1)]),
    orphaned=st.booleans(),
)
ATTEMPTS = st.builds(
    Attempt,
    outcome=st.sampled_from([each for each in Outcome if each is not Outcome.NO_PROGRESS]),
    began=st.integers(0, 5),
    step=st.integers(0, 9),
    retry=st.booleans(),
    orphaned=st.booleans(),
    reason=st.text(max_size=3),
)


def ends(*outcomes: Outcome) -> tuple[RankEnd, ...]:
    """One last word for each rank, in the order they came."""
    return tuple(RankEnd(rank, outcome, 5, 100.0 + rank) for rank, outcome in enumerate(outcomes))


@given(said=st.lists(ENDS))
def test_the_first_failure_is_the_one_nothing_failed_before(said: list[RankEnd]) -> None:
    first = first_failure(said)
    failed = [end for end in said if end.outcome in FAILURES]
    assert (first is None) == (not failed)
    if first is not None:
        assert first in failed
        assert not any(end.time < first.time for end in failed)


@pytest.mark.parametrize("outcome", Outcome)
def test_a_last_word_is_read_as_it_was_said(tmp_path: Path, outcome: Outcome) -> None:
    end = RankEnd(3, outcome, 17, 1763858761.25, "naïve: 你好\nand more", 'say "stop"', 2, retry=False)
    end.write(tmp_path / "rank-3.end.json")
    read = read_end(tmp_path / "rank-3.end.json")
    assert read == end
    assert read is not None
    assert read.outcome is outcome


def test_a_rank_that_could_not_say_anything(tmp_path: Path) -> None:
    assert read_end(tmp_path / "nothing.json") is None
    RankEnd(0, Outcome.CRASHED, 1, 1.0, "hälf").write(tmp_path / "half.json")
    whole = (tmp_path / "half.json").read_bytes()
    for cut in range(len(whole) - 1):
        (tmp_path / "half.json").write_bytes(whole[:cut])
        assert read_end(tmp_path / "half.json") is None


def test_a_file_system_that_does_not_say_for_once_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RankEnd(0, Outcome.FINISHED, 1, 1.0).write(tmp_path / "end.json")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        assert read_end(tmp_path / "end.json") is None
    assert read_end(tmp_path / "end.json") is not None


F, S, C, M, D = (
    Outcome.FINISHED,
    Outcome.STOPPED,
    Outcome.CRASHED,
    Outcome.OUT_OF_MEMORY,
    Outcome.DIVERGED,
)


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
        ((D, C), 2, D),
    ],
)
def test_by_the_ranks_words_alone(said: tuple[Outcome, ...], world_size: int, outcome: Outcome) -> None:
    assert decide(Evidence(world_size, ends(*said))).outcome == outcome


PREEMPTED, LATE, LOST = Facts(preempted=True), Facts(time_limit=True), Facts(failed_nodes=("n3",))
HANG = Hang((1,), 5, 130.0, "rank 1 did not run at all", 90.0)


@pytest.mark.parametrize(
    ("evidence", "outcome"),
    [
        (Evidence(2, ends(S, S), PREEMPTED), Outcome.PREEMPTED),
        (Evidence(2, ends(S, S), PREEMPTED, by_person=True), S),
        (Evidence(2, ends(S, S), LATE), Outcome.TIME_LIMIT),
        (Evidence(2, ends(F, F), LATE), F),
        (Evidence(2, (), PREEMPTED), Outcome.PREEMPTED),
        (Evidence(2, ends(C), LOST, dead=(1,)), Outcome.NODE_FAILED),
        (Evidence(2, ends(M), LOST), M),
        (Evidence(2, ends(C), Facts(out_of_memory=True), dead=(1,)), M),
        (Evidence(2, ends(C, C), Facts(out_of_memory=True)), C),
        (Evidence(2, ends(C), hang=HANG), Outcome.HUNG),
        (Evidence(2, ends(C), hang=replace(HANG, time=200.0)), C),
        (Evidence(2, ends(C), at_once=True), S),
        (Evidence(2, (), PREEMPTED, at_once=True), Outcome.PREEMPTED),
        (Evidence(2, ends(S, S), orphaned=True), C),
        (Evidence(2, (), Facts(cancelled=True)), S),
    ],
)
def test_by_all_that_is_known(evidence: Evidence, outcome: Outcome) -> None:
    assert decide(evidence).outcome == outcome


def test_who_was_killed_is_named_rather_than_who_tells_of_it() -> None:
    echo = RankEnd(0, C, 4, 20.0, "DistBackendError: connection closed by peer")
    for facts, hang in ((Facts(), None), (Facts(out_of_memory=True), None), (Facts(), HANG)):
        verdict = decide(Evidence(2, (replace(echo, time=95.0),), facts, hang=hang, dead=(1,)))
        assert (verdict.reason.startswith("rank 1 "), verdict.rank) == (True, 1)
    assert decide(Evidence(2, (echo,))).rank == 0
    assert decide(Evidence(2, (echo,), PREEMPTED)).rank is None


@given(evidence=EVIDENCE)
def test_an_attempt_has_finished_only_if_every_rank_says_so(evidence: Evidence) -> None:
    verdict = decide(evidence)
    whole = len(evidence.ends) == evidence.world_size
    assert (verdict.outcome is F) == (whole and all(end.outcome is F for end in evidence.ends))
    assert verdict.outcome is not Outcome.NO_PROGRESS
    if verdict.outcome in UNLIMITED:
        assert evidence.facts != Facts(), "only the scheduler knows of those"
    if verdict.outcome is Outcome.HUNG:
        assert evidence.hang is not None
    if not verdict.retry:
        assert any(not end.retry for end in evidence.ends)


@given(evidence=EVIDENCE, order=st.randoms())
def test_the_order_in_which_ranks_are_read_does_not_matter(evidence: Evidence, order: st.DataObject) -> None:
    told = {end.time for end in evidence.ends}
    if len(told) == len(evidence.ends):
        mixed = list(evidence.ends)
        order.shuffle(mixed)  # type: ignore[attr-defined]
        assert decide(replace(evidence, ends=tuple(mixed))) == decide(evidence)


@given(history=st.lists(ATTEMPTS, min_size=1, max_size=12))
def test_what_is_final_ends_and_what_is_nobodys_doing_goes_on(history: list[Attempt]) -> None:
    last, following = history[-1], what_next(history, Patience())
    if last.outcome in FINAL or not last.retry:
        assert following == End(last.outcome, last.reason)
    elif last.outcome in UNLIMITED - {Outcome.TIME_LIMIT}:
        assert isinstance(following, Restart)
    elif isinstance(following, End):
        assert following.outcome is Outcome.NO_PROGRESS
        assert len(history) >= Patience().attempts


@given(
    steps=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    patience=st.integers(1, 5),
)
def test_crashes_are_bounded_by_progress(steps: list[int], patience: int) -> None:
    """By simulation: a run that only crashes ends, and not before it had its chances."""
    history: list[Attempt] = []
    without = 0
    for step in steps:
        gained = step > max((each.step for each in history), default=0)
        history.append(Attempt(C, 0, step))
        without = 0 if gained else without + 1
        following = what_next(history, Patience(attempts=patience))
        assert isinstance(following, End) == (without >= patience)
        if isinstance(following, End):
            break
        assert following.seconds == Patience().pause(without)
    assert len(history) <= (max(steps) + 1) * patience + 1


def test_pauses_grow_to_a_limit() -> None:
    assert [Patience().pause(count) for count in range(5)] == [2.0, 10.0, 50.0, 250.0, 600.0]


def test_where_it_began_is_no_progress() -> None:
    history = [Attempt(C, 500, 500)] * 3
    assert isinstance(what_next(history, Patience()), End)
    assert isinstance(what_next([Attempt(C, 500, 501), *history[1:]], Patience()), Restart)


def test_a_time_limit_too_short_for_a_single_step_does_not_queue_for_ever() -> None:
    long_enough = [Attempt(Outcome.TIME_LIMIT, step, step + 1) for step in range(20)]
    assert what_next(long_enough, Patience()) == Restart(0.0, "")
    too_short = [Attempt(Outcome.TIME_LIMIT, 5, 5)] * 3
    assert isinstance(what_next(too_short[:2], Patience()), Restart)
    assert isinstance(what_next(too_short, Patience()), End)


def test_who_restarts_a_run_whose_supervisor_was_killed_wants_it_tried() -> None:
    history = [Attempt(C, 0, 0, orphaned=True)] * 9 + [Attempt(C, 0, 0)]
    assert isinstance(what_next(history, Patience()), Restart)
