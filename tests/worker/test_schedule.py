"""The place in a schedule against its definition, and the stock schedules at that place."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from launcher.data.phases import Phase, Phases, Skip
from launcher.worker.schedule import follow_samples, place

STEPS = 40
CHANGES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 64)), min_size=1, max_size=4)


def phases_of(changes: list[tuple[int, int]]) -> Phases:
    """Phases of (steps, batch size), the last without end."""
    phases: list[Phase] = []
    step = sample = 0
    for steps, batch_size in changes:
        phases.append(Phase(step, sample, batch_size, Skip()))
        step, sample = step + steps, sample + steps * batch_size
    return Phases(phases, lambda skip, before: np.empty(0, dtype=np.int64))


def scheduler_of(kind: str, warmup: int) -> LRScheduler:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    assert isinstance(made, LRScheduler)
    return made


def rates(scheduler: LRScheduler) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


@settings(deadline=None)
@given(changes=CHANGES, warmup=st.integers(0, STEPS))
def test_what_follows_warmup_goes_by_the_samples(changes: list[tuple[int, int]], warmup: int) -> None:
    phases = phases_of(changes)
    places = [place(phases, step, warmup=warmup, steps=STEPS) for step in range(STEPS + 1)]
    assert places[: warmup + 1] == list(range(warmup + 1))
    assert places[-1] == STEPS
    assert places == sorted(places)
    if warmup < STEPS:
        begun, end = phases.consumed(warmup), phases.consumed(STEPS)
        for step in range(warmup, STEPS + 1):
            share = Fraction(phases.consumed(step) - begun, end - begun)
            assert places[step] == pytest.approx(float(warmup + (STEPS - warmup) * share))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
@settings(max_examples=20, deadline=None)
@given(batch_size=st.integers(1, 10**6), warmup=st.integers(0, STEPS))
def test_where_all_steps_are_alike_it_is_the_stock_schedule_to_the_bit(
    kind: str, batch_size: int, warmup: int
) -> None:
    followed = scheduler_of(kind, warmup)
    follow_samples(followed, phases_of([(1, batch_size)]), warmup=warmup, steps=STEPS)
    assert rates(followed) == rates(scheduler_of(kind, warmup))


def test_a_larger_batch_does_not_make_the_rate_jump_and_no_phase_comes_back_from_a_checkpoint() -> None:
    before = scheduler_of("linear", 0)
    follow_samples(before, phases_of([(20, 8)]), warmup=0, steps=STEPS)
    for _ in range(20):
        before.optimizer.step()
        before.step()
    saved = copy.deepcopy(before.state_dict())
    # 160 samples are left, which at 16 a step are 10 steps: 30 in all.
    after = scheduler_of("linear", 0)
    follow_samples(after, phases_of([(20, 8), (1, 16)]), warmup=0, steps=30)
    after.load_state_dict(saved)
    after.optimizer.step()
    after.step()
    assert before.get_last_lr() == [0.5]
    assert after.get_last_lr() == [pytest.approx(0.5 * 144 / 160 * 30 / STEPS + 1 - 30 / STEPS)]
