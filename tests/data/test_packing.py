"""Where the tokens of a block are, against the plainest way to say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import packing as module
from launcher.data.packing import ConcatPlan, LaidOutPlan, Packing, PackingPlan, Span, best_fit, lay_out

shards_of_documents = st.lists(st.lists(st.integers(1, 30), max_size=12), max_size=6)
Token = tuple[int, int, int]
"""A shard, a document in it, and a token in that."""


def tokens_of(shards: Sequence[Sequence[int]]) -> list[list[Token]]:
    """Every token of every shard."""
    return [
        [(shard, document, token) for document, length in enumerate(lengths) for token in range(length)]
        for shard, lengths in enumerate(shards)
    ]


def plan_of(shards: Sequence[Sequence[int]], block_size: int, packing: Packing) -> PackingPlan:
    if packing == "concat":
        return ConcatPlan([sum(lengths) for lengths in shards], block_size)
    layouts = [lay_out(np.array(lengths, dtype=np.int32), block_size, packing) for lengths in shards]
    tokens = sum(map(sum, shards))
    return LaidOutPlan([each.blocks for each in layouts], tokens, block_size, layouts.__getitem__)


def contents(shards: Sequence[Sequence[int]], plan: PackingPlan) -> list[list[Token]]:
    tokens = tokens_of(shards)
    return [
        [token for span in plan.locate(block) for token in tokens[span.shard][span.start : span.stop]]
        for block in range(plan.blocks)
    ]


@settings(deadline=None)
@given(shards=shards_of_documents, block_size=st.integers(1, 40))
def test_concat_is_the_joined_tokens_cut(shards: list[list[int]], block_size: int) -> None:
    plan = plan_of(shards, block_size, "concat")
    joined = [token for shard in tokens_of(shards) for token in shard]
    whole = len(joined) // block_size
    assert contents(shards, plan) == [joined[i * block_size : (i + 1) * block_size] for i in range(whole)]
    assert all(span.start < span.stop for block in range(whole) for span in plan.locate(block))
    assert plan.dropped == len(joined) - whole * block_size
    assert plan.padding == 0


@settings(deadline=None)
@given(shards=shards_of_documents, block_size=st.integers(1, 40))
def test_pad_gives_each_document_rows_of_its_own(shards: list[list[int]], block_size: int) -> None:
    plan = plan_of(shards, block_size, "pad")
    rows = [
        [(shard, document, token) for token in range(start, min(start + block_size, length))]
        for shard, lengths in enumerate(shards)
        for document, length in enumerate(lengths)
        for start in range(0, length, block_size)
    ]
    assert contents(shards, plan) == rows
    assert plan.dropped == 0
    assert plan.padding == sum(block_size - len(row) for row in rows)


@pytest.mark.parametrize("window", [3, 1 << 17])
@settings(deadline=None)
@given(shards=shards_of_documents, block_size=st.integers(1, 40))
def test_best_fit_cuts_no_document_that_fits(window: int, shards: list[list[int]], block_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", window)
        plan = plan_of(shards, block_size, "best_fit")
    found = contents(shards, plan)
    assert sorted(token for block in found for token in block) == sorted(
        token for shard in tokens_of(shards) for token in shard
    )
    assert plan.dropped == 0
    assert plan.padding == sum(block_size - len(block) for block in found)
    for block in found:
        assert 0 < len(block) <= block_size
        assert len({shard for shard, _, _ in block}) == 1
        for (_, document, token), (_, after, next_token) in pairwise(block):
            assert (after, next_token) == (document, token + 1) or (
                after > document and next_token % block_size == 0
            )
    where: dict[tuple[int, int], set[int]] = {}
    for number, block in enumerate(found):
        for shard, document, _ in block:
            where.setdefault((shard, document), set()).add(number)
    for (shard, document), blocks in where.items():
        assert len(blocks) == -(-shards[shard][document] // block_size)


def one_by_one(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook has it."""
    blocks: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [block for block in blocks if sum(block) + size <= room]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            blocks.append([size])
    return blocks


@settings(deadline=None)
@given(data=st.data(), room=st.integers(1, 50))
def test_best_fit_is_the_textbook_s(data: st.DataObject, room: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, room), max_size=60))
    blocks = best_fit(np.array(sizes, dtype=np.int64), room)
    found: dict[int, list[int]] = {}
    for block, size in zip(blocks.tolist(), sizes, strict=True):
        found.setdefault(block, []).append(size)
    assert sorted(found) == list(range(len(found)))
    # Which of two blocks with the same room is taken is left open; how full blocks become is not.
    assert Counter(map(sum, found.values())) == Counter(map(sum, one_by_one(sizes, room)))


DRAWS = np.random.default_rng(7)
LENGTHS = {
    "lines": DRAWS.geometric(1 / 14, 60_000),
    "any length alike": DRAWS.integers(1, 1025, 20_000),
    "falling": np.clip(DRAWS.exponential(200, 20_000), 1, 1024),
    "prose": np.clip(DRAWS.lognormal(5.0, 1.0, 20_000), 1, 1024),
    "long ones too": np.clip(DRAWS.lognormal(6.2, 1.2, 20_000), 1, None),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_best_fit_leaves_less_than_a_hundredth_empty(name: str) -> None:
    lengths = LENGTHS[name].astype(np.int32)
    assert lengths.sum() / (lay_out(lengths, 1024, "best_fit").blocks * 1024) > 0.99


@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
@settings(deadline=None)
@given(shards=shards_of_documents, block_size=st.integers(1, 40))
def test_the_blocks_that_hold_a_document(packing: Packing, shards: list[list[int]], block_size: int) -> None:
    plan = plan_of(shards, block_size, packing)
    held = [{(shard, document) for shard, document, _ in block} for block in contents(shards, plan)]
    for shard, lengths in enumerate(shards):
        for document, length in enumerate(lengths):
            start = sum(lengths[:document])
            expected = [block for block, inside in enumerate(held) if (shard, document) in inside]
            assert plan.holding(Span(shard, start, start + length)).tolist() == expected


@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
def test_a_block_that_is_not_there(packing: Packing) -> None:
    plan = plan_of([[5, 6]], 4, packing)
    for block in (-1, plan.blocks):
        with pytest.raises(IndexError):
            plan.locate(block)
