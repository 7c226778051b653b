"""Where the tokens of a block are, against the plainest way to say it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.packing import Plan, ShardSizes, plan_blocks
from launcher.errors import RequestError

shards_of_documents = st.lists(st.lists(st.integers(1, 30), max_size=8), max_size=6)


def tokens_of(shards: list[list[int]]) -> list[list[tuple[int, int, int]]]:
    """Every token of every shard as (shard, document, token in the document)."""
    return [
        [(shard, document, token) for document, length in enumerate(lengths) for token in range(length)]
        for shard, lengths in enumerate(shards)
    ]


def plan_of(shards: list[list[int]], block_size: int, packing: str) -> Plan:
    sizes = [ShardSizes(sum(lengths), np.array(lengths, dtype=np.int32)) for lengths in shards]
    return plan_blocks(sizes, block_size, packing)  # type: ignore[arg-type]


def contents(shards: list[list[int]], plan: Plan) -> list[list[tuple[int, int, int]]]:
    tokens = tokens_of(shards)
    return [
        [token for span in plan.locate(block) for token in tokens[span.shard][span.start : span.stop]]
        for block in range(plan.blocks)
    ]


@given(shards=shards_of_documents, block_size=st.integers(1, 40))
def test_concat_is_the_joined_tokens_cut(shards: list[list[int]], block_size: int) -> None:
    plan = plan_of(shards, block_size, "concat")
    joined = [token for shard in tokens_of(shards) for token in shard]
    whole = len(joined) // block_size
    assert contents(shards, plan) == [joined[i * block_size : (i + 1) * block_size] for i in range(whole)]
    assert plan.dropped == len(joined) - whole * block_size
    assert plan.padding == 0


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


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_a_block_that_is_not_there(packing: str) -> None:
    plan = plan_of([[5, 6]], 4, packing)
    for block in (-1, plan.blocks):
        with pytest.raises(IndexError):
            plan.locate(block)


def test_best_fit_is_refused() -> None:
    with pytest.raises(RequestError, match="best_fit"):
        plan_of([[5]], 4, "best_fit")
