"""Phases against the definition itself: take the next samples that are not banned, one at a time."""

from __future__ import annotations

import json
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import phases as module
from launcher.data.phases import Phase, Phases, Samples, Skip

Change = tuple[int, int, set[int]]
"""Steps until the next change, batch size, banned samples."""

changes = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 9), st.sets(st.integers(0, 300), max_size=60)),
    min_size=1,
    max_size=5,
)


def banned(skip: Skip, before: int) -> Samples:
    """A document `n` here is the samples that are multiples of n, without end."""
    held = {sample for ranges in skip.steps.values() for a, b in ranges for sample in range(a, b)}
    held |= {sample for name in skip.documents for sample in range(0, before, int(name))}
    return np.array(sorted(sample for sample in held if sample < before), dtype=np.int64)


def as_skip(samples: set[int]) -> Skip:
    return Skip({1: tuple((each, each + 1) for each in sorted(samples))})


def built(made: list[Change]) -> Phases:
    phases: list[Phase] = []
    step = 0
    for steps, batch_size, samples in made:
        first = Phases(phases, banned).position(step)
        phases.append(Phase(step, first, batch_size, as_skip(samples)))
        step += steps
    return Phases(phases, banned)


def by_hand(made: list[Change]) -> list[list[int]]:
    """The samples of each step, walking the order from its start."""
    found: list[list[int]] = []
    at = 0
    for steps, batch_size, samples in made:
        for _ in range(steps):
            found.append(list(islice((p for p in count(at) if p not in samples), batch_size)))
            at = found[-1][-1] + 1
    return found


@settings(max_examples=200, deadline=None)
@given(made=changes)
def test_each_step_takes_the_next_samples_that_are_not_banned(made: list[Change]) -> None:
    phases, expected = built(made), by_hand(made)
    order = np.random.default_rng(len(expected)).permutation(len(expected))
    assert {int(s): phases.samples_of_step(int(s)).tolist() for s in order} == dict(enumerate(expected))
    taken = [sample for step in expected for sample in step]
    assert len(taken) == len(set(taken))
    for step in range(len(expected) + 1):
        assert phases.consumed(step) == sum(map(len, expected[:step]))
        assert phases.position(step) == (expected[step - 1][-1] + 1 if step else 0)


@settings(max_examples=60, deadline=None)
@given(made=changes, chunk=st.integers(1, 9), data=st.data())
def test_a_span_of_steps_is_its_steps_joined(made: list[Change], chunk: int, data: st.DataObject) -> None:
    expected = by_hand(made)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        parts = list(built(made).samples(start, stop))
    assert [p for part in parts for p in part.tolist()] == [p for s in expected[start:stop] for p in s]
    assert all(len(part) <= chunk for part in parts)


@settings(max_examples=60, deadline=None)
@given(made=changes)
def test_they_come_back_from_json(made: list[Change]) -> None:
    phases = built(made)
    text = json.dumps([phase.as_dict() for phase in phases.phases])
    assert tuple(Phase.from_dict(each) for each in json.loads(text)) == phases.phases


def start(batch_size: int = 8) -> Phases:
    return Phases([], banned).going_on(0, batch_size=batch_size, steps=(), documents=())


def test_a_run_without_changes_is_one_phase_by_multiplication() -> None:
    phases = start()
    assert phases.samples_of_step(10**9).tolist() == list(range(8 * 10**9, 8 * 10**9 + 8))
    again = phases.going_on(500, batch_size=8, steps=(), documents=())
    assert again.phases == phases.phases == (Phase(0, 0, 8, Skip()),)


def test_another_batch_size_begins_a_phase_where_the_last_ended() -> None:
    phases = start().going_on(10, batch_size=12, steps=(), documents=())
    assert phases.phases[1] == Phase(10, 80, 12, Skip())
    assert phases.samples_of_step(9).tolist() == list(range(72, 80))
    assert phases.samples_of_step(10).tolist() == list(range(80, 92))
    # Back before the change: it begins there instead.
    back = phases.going_on(4, batch_size=12, steps=(), documents=())
    assert back.phases == (Phase(0, 0, 8, Skip()), Phase(4, 32, 12, Skip()))


def test_a_banned_step_is_what_it_was_when_it_was_named() -> None:
    trained = start()
    once = trained.going_on(10, batch_size=8, steps=[13], documents=(), in_force=trained)
    assert once.phases[-1].skip.steps == {13: ((96, 104),)}
    assert once.samples_of_step(12).tolist() == list(range(104, 112))
    # Named with it later: 14 is what it held in the run that left out 13; 13 stays what it was.
    twice = once.going_on(10, batch_size=8, steps=[13, 14], documents=(), in_force=once)
    assert twice.phases[-1].skip.steps == {13: ((96, 104),), 14: ((112, 120),)}
    assert twice.samples_of_step(12).tolist() == list(range(104, 112))
    assert twice.samples_of_step(13).tolist() == list(range(120, 128))
    # The checkpoint that it goes on from knows nothing of either: what is in force does.
    assert trained.going_on(10, batch_size=8, steps=[14, 13], documents=(), in_force=twice).phases == (
        twice.phases
    )
    # And once more: nothing changes, so no phase begins.
    assert twice.going_on(20, batch_size=8, steps=[13, 14], documents=(), in_force=twice).phases == (
        twice.phases
    )


def test_what_is_trained_stays_trained_and_a_lifted_ban_takes_nothing_twice() -> None:
    trained = start()
    late = trained.going_on(20, batch_size=8, steps=[13], documents=(), in_force=trained)
    assert late.samples_of_step(20).tolist() == list(range(160, 168))
    once = trained.going_on(10, batch_size=8, steps=[11, 13], documents=(), in_force=trained)
    lifted = once.going_on(11, batch_size=8, steps=(), documents=(), in_force=once)
    taken = [sample for step in range(14) for sample in lifted.samples_of_step(step).tolist()]
    assert taken == [*range(80), *range(88, 96), *range(96, 120)]


def test_a_ban_without_end_is_kept_up_at_any_step() -> None:
    phases = start().going_on(5, batch_size=8, steps=(), documents=["3"])
    taken = [sample for step in range(5, 300) for sample in phases.samples_of_step(step).tolist()]
    assert taken == list(islice((p for p in count(40) if p % 3), 295 * 8))
    first, *_, last = phases.samples_of_step(100_000).tolist()
    not_banned_below = [end - (end + 2) // 3 for end in (40, first, last + 1)]
    assert [n - not_banned_below[0] for n in not_banned_below[1:]] == [99_995 * 8, 99_996 * 8]


def test_a_step_that_a_ban_has_scattered_can_be_banned_too() -> None:
    phases = start(4).going_on(0, batch_size=4, steps=(), documents=["3"])
    again = phases.going_on(0, batch_size=4, steps=[2], documents=["3"], in_force=phases)
    assert again.phases[-1].skip.steps == {2: ((7, 9), (10, 12))}
    assert again.samples_of_step(1).tolist() == [13, 14, 16, 17]


def test_steps_are_counted_from_zero() -> None:
    with pytest.raises(IndexError):
        start().samples_of_step(-1)
