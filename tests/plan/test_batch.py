from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.plan.batch import Done, count_steps, splits, warmup_steps

SMALL = st.integers(1, 64)


@given(micro=SMALL, accumulation=SMALL, world=SMALL, largest=SMALL)
def test_a_batch_always_multiplies_out(micro: int, accumulation: int, world: int, largest: int) -> None:
    size = micro * accumulation * world
    batch = splits(size, world, None, largest)[0]
    assert batch.micro_batch * batch.accumulation * batch.world_size == size
    assert batch.micro_batch <= largest
    share = size // world
    better = [m for m in range(batch.micro_batch + 1, largest + 1) if share % m == 0]
    assert better == [], "a larger micro-batch would have done"
    assert splits(size, world, micro, 1)[0].micro_batch == micro


@given(size=st.integers(1, 4096), world=SMALL, micro=st.none() | SMALL)
def test_a_refusal_names_sizes_and_worlds_that_work(size: int, world: int, micro: int | None) -> None:
    if size % (world * (micro or 1)) == 0:
        return
    with pytest.raises(RequestError) as refused:
        splits(size, world, micro, 8)
    wrong = "train.micro_batch" if micro and size % world == 0 else "train.batch_size"
    assert refused.value.key == wrong
    assert refused.value.message.startswith(f"{wrong}=")
    hint = refused.value.hint
    assert hint is not None
    parts = hint.split("; or ")
    ways = {re.split(r" (?=to |[0-9])", part)[0]: re.findall(r"\d+", part) for part in parts}
    smaller_too, worlds_too = wrong == "train.micro_batch", size % (micro or 1) == 0
    expected = ["set train.micro_batch"] * smaller_too + ["set train.batch_size"] + ["use"] * worlds_too
    assert list(ways) == expected
    for smaller in map(int, ways.get("set train.micro_batch", [])):
        assert smaller < (micro or 1)
        splits(size, world, smaller, 8)
    for number in map(int, ways["set train.batch_size"]):
        splits(number, world, micro, 8)
    for number in map(int, ways.get("use", [])):
        splits(size, number, micro, 8)


@pytest.mark.parametrize(
    ("size", "world", "says", "hint"),
    [
        (
            8,
            1,
            "=3 does not divide train.batch_size=8",
            "micro_batch to 2; or set train.batch_size to 6 or 9",
        ),
        (8, 2, "=3 does not divide 4, the share of", "micro_batch to 2; or set train.batch_size to 6 or 12"),
        (100, 32, "=100 does not divide over 32 ranks with train.micro_batch=3", "batch_size to 96 or 192"),
        (8, 4, "=3 does not divide 2, ", "micro_batch to 2; or set train.batch_size to 12"),
    ],
)
def test_a_micro_batch_that_divides_no_batch_here(size: int, world: int, says: str, hint: str) -> None:
    with pytest.raises(RequestError) as refused:
        splits(size, world, 3, 8)
    assert says in refused.value.message
    assert str(refused.value.hint) == f"set train.{hint}"


def test_the_nearest_batch_sizes_are_the_nearest() -> None:
    with pytest.raises(RequestError) as refused:
        splits(100, 8, 4, 8)
    assert "set train.batch_size to 96 or 128" in str(refused.value.hint)


@given(batch=SMALL, block=SMALL, tokens=st.integers(1, 10**12))
def test_tokens_are_rounded_up_to_a_whole_step(batch: int, block: int, tokens: int) -> None:
    steps = count_steps(
        batch_size=batch, block_size=block, steps=None, tokens=tokens, epochs=None, blocks=None
    )
    assert steps is not None
    assert (steps - 1) * batch * block < tokens <= steps * batch * block


@given(batch=SMALL, block=SMALL, tokens=st.integers(1, 10**9), steps=SMALL, before=SMALL)
def test_what_is_done_counts_with_the_batch_size_it_was_done_in(
    batch: int, block: int, tokens: int, steps: int, before: int
) -> None:
    done = Done(steps, steps * before)
    found = count_steps(
        batch_size=batch, block_size=block, steps=None, tokens=tokens, epochs=None, blocks=None, done=done
    )
    in_blocks = count_steps(
        batch_size=batch, block_size=1, steps=None, tokens=None, epochs=tokens / 64, blocks=64, done=done
    )
    assert found is not None
    assert in_blocks is not None
    assert in_blocks >= found >= steps
    for last, size in ((found, block), (in_blocks, 1)):
        trained = (done.samples + (last - steps) * batch) * size
        assert trained >= tokens
        assert last == steps or trained - batch * size < tokens


def test_epochs_need_prepared_text() -> None:
    for blocks, expected in ((None, None), (10, math.ceil(3 * 10 / 8)), (1, 1)):
        found = count_steps(batch_size=8, block_size=4, steps=None, tokens=None, epochs=3, blocks=blocks)
        assert found == expected


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(0.0, 100, 0), (0.02, 100, 2), (1, 100, 1), (7, 100, 7), (7, 7, 7)]
)
def test_warmup_is_a_fraction_below_one_and_steps_from_one_on(
    warmup: float, steps: int, expected: int
) -> None:
    assert warmup_steps(warmup, steps) == expected


def test_more_steps_of_warmup_than_there_are_of_training_are_refused() -> None:
    """Whatever the length is given in: a shorter ramp would be a steeper one."""
    with pytest.raises(RequestError, match="8 steps of warmup do not fit in 7 steps of training") as refused:
        warmup_steps(8, 7)
    assert refused.value.key == "train.warmup"


@given(tenths=st.integers(1, 500), blocks=st.integers(1, 5000), batch_size=st.integers(1, 64))
def test_epochs_are_taken_as_they_are_written(tenths: int, blocks: int, batch_size: int) -> None:
    found = count_steps(
        batch_size=batch_size, block_size=4, steps=None, tokens=None, epochs=tenths / 10, blocks=blocks
    )
    assert found == -(-tenths * blocks // (10 * batch_size)), "1.1 x 100 is 110, in floats a hair more"
