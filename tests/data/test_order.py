"""The order of samples: every block once an epoch, quotas exact, and the two forms alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.order import CYCLE, Order, Sample, cycle_quotas

KNOWN = [Sample(0, 0, 148), Sample(1, 0, 38), Sample(0, 0, 195), Sample(0, 666671, 381)]
KNOWN_CERTIFICATE = "eea1c7f76e7325068482f1c0f8576bbf"

mixtures = st.lists(
    st.tuples(st.integers(1, 500), st.floats(0.001, 1000, allow_nan=False)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 5000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_is_every_block_once(blocks: int, seed: int, epoch: int) -> None:
    taken = Order([(blocks, 1.0)], seed).map(np.arange(epoch * blocks, (epoch + 1) * blocks))
    assert set(taken[:, 1].tolist()) == {epoch}
    assert sorted(taken[:, 2].tolist()) == list(range(blocks))


@settings(max_examples=40, deadline=None)
@given(sources=mixtures, seed=st.integers(0, 2**32 - 1), start=st.integers(0, 2**40))
def test_the_vector_form_is_the_scalar_form(sources: list[tuple[int, float]], seed: int, start: int) -> None:
    order = Order(sources, seed)
    rows = order.map(np.arange(start, start + 50)).tolist()
    assert rows == [list(order[p]) for p in range(start, start + 50)]


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1000, allow_nan=False), min_size=1, max_size=6),
    cycle=st.integers(0, 10**6),
    cycles=st.integers(1, 3),
    offset=st.integers(0, CYCLE),
)
def test_cycles_hold_exactly_the_quotas_wherever_they_are_begun(
    weights: list[float], cycle: int, cycles: int, offset: int
) -> None:
    sources = [(5000 + 77 * number, weight) for number, weight in enumerate(weights)]
    order = Order(sources, 7)
    start = cycle * order.cycle + offset % order.cycle
    taken = order.map(np.arange(start, start + cycles * order.cycle))
    counted = Counter(taken[:, 0].tolist())
    assert [counted[i] for i in range(len(sources))] == [cycles * quota for quota in order.quotas]


@settings(max_examples=40, deadline=None)
@given(sources=mixtures, seed=st.integers(0, 2**32 - 1), before=st.integers(0, 4000), data=st.data())
def test_the_samples_of_blocks_are_found_backwards(
    sources: list[tuple[int, float]], seed: int, before: int, data: st.DataObject
) -> None:
    order = Order(sources, seed)
    source = data.draw(st.integers(0, len(sources) - 1))
    blocks = data.draw(st.sets(st.integers(0, sources[source][0] - 1), max_size=5))
    taken = order.map(np.arange(before))
    expected = np.flatnonzero((taken[:, 0] == source) & np.isin(taken[:, 2], sorted(blocks)))
    assert order.samples_of(source, sorted(blocks), before).tolist() == expected.tolist()


def test_the_samples_of_a_block_after_many_epochs_and_in_a_large_source() -> None:
    many = Order([(3, 1.0), (5, 2.0)], 9)
    found = many.samples_of(1, [4], 60_000)
    assert len(found) == 60_000 * 2 // 3 // 5
    assert all(many[p].block == 4 for p in found.tolist())
    large = Order([(10**9 + 7, 1.0)], 9)
    assert int(large.samples_of(0, [large[123_456_789].block], 10**9)[0]) == 123_456_789


@given(weights=st.lists(st.floats(1e-6, 1e6, allow_nan=False), min_size=1, max_size=20))
def test_quotas_are_the_shares_to_within_rounding(weights: list[float]) -> None:
    quotas = cycle_quotas(weights)
    assert sum(quotas) == CYCLE
    for quota, weight in zip(quotas, weights, strict=True):
        share = CYCLE * weight / sum(weights)
        assert quota >= 1
        assert abs(quota - share) < 1.001 or quota == 1 or share > CYCLE / len(weights) - 1


def test_sources_are_spread_evenly_and_epochs_of_one_do_not_overlap() -> None:
    order = Order([(40, 3.0), (7, 1.0)], 11)
    taken = order.map(np.arange(4000))
    for start in range(0, 4000, 4):
        assert Counter(taken[start : start + 4, 0].tolist()) == {0: 3, 1: 1}
    for source, blocks in ((0, 40), (1, 7)):
        own = taken[taken[:, 0] == source]
        whole = own[: len(own) // blocks * blocks].reshape(-1, blocks, 3)
        assert all(sorted(epoch[:, 2].tolist()) == list(range(blocks)) for epoch in whole)


def test_epochs_seeds_and_sources_are_permuted_apart() -> None:
    def epoch(seed: int, source: int, number: int) -> list[int]:
        order = Order([(100, 1.0), (100, 1.0)], seed)
        taken = order.map(np.arange(200 * number, 200 * (number + 1)))
        return [int(row[2]) for row in taken if row[0] == source]

    seen = {
        tuple(epoch(seed, source, number)) for seed in (1, 2) for source in (0, 1) for number in (0, 1, 2)
    }
    assert len(seen) == 12
    assert tuple(range(100)) not in seen


def test_every_block_lands_everywhere_about_equally() -> None:
    """Chi-squared over 2000 epochs of 10 blocks: 81 degrees of freedom, 99.99 % below 135."""
    order = Order([(10, 1.0)], 3)
    taken = order.map(np.arange(20_000))[:, 2].reshape(2000, 10)
    counts = np.stack([np.bincount(taken[:, place], minlength=10) for place in range(10)])
    assert ((counts - 200) ** 2 / 200).sum() < 135


def test_a_known_order_stays_as_it_is() -> None:
    """A run that is resumed under a later version must go on in the same order."""
    order = Order([(1000, 2.0), (50, 1.0)], 1337)
    assert [order[p] for p in (0, 1, 2, 10**9)] == KNOWN
    assert order.certificate([np.arange(1000)]) == KNOWN_CERTIFICATE


def test_a_certificate_tells_samples_apart_and_not_how_they_are_parted() -> None:
    order = Order([(100_000, 1.0)], 5)
    samples = np.arange(70_000)
    whole = order.certificate([samples])
    assert order.certificate(np.array_split(samples, 13)) == whole
    others = {
        order.certificate([samples[1:]]),
        order.certificate([samples[:-1]]),
        order.certificate([samples[::-1]]),
        Order([(100_000, 1.0)], 6).certificate([samples]),
        whole,
    }
    assert len(others) == 5


@pytest.mark.parametrize("sources", [[], [(0, 1.0)], [(5, 0.0)], [(5, float("nan"))]])
def test_sources_that_cannot_be_sampled_are_refused(sources: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        Order(sources, 1)


def test_samples_start_at_zero() -> None:
    with pytest.raises(IndexError):
        Order([(5, 1.0)], 1)[-1]
