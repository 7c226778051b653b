from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.schema import DataSection, Source
from launcher.data.blocks import Blocks
from launcher.data.order import Order
from launcher.data.phases import Phase, Phases, Samples, Skip
from launcher.data.prepare import prepare
from launcher.data.store import open_store
from launcher.data.tokenizers import train_tokenizer
from launcher.plan.batch import Batch
from launcher.worker.collate import IGNORED, PadToLongest, stack
from launcher.worker.dataset import RankBatches, StoredValidationRows, by_length
from tests.conftest import sentences

SMALL = st.integers(1, 6)


def lengths(samples: Sequence[int]) -> npt.NDArray[np.int64]:
    """Some length for every sample, many of them twice."""
    return np.array([1 + sample * 7 % 11 for sample in samples])


def deal(samples: list[int], batch: Batch) -> list[int]:
    return by_length(samples, lengths)


def without_changes(batch_size: int) -> Phases:
    return Phases([Phase(0, 0, batch_size, Skip())], lambda skip, before: np.empty(0, dtype=np.int64))


@given(micro=SMALL, accumulation=SMALL, world=SMALL, start=st.integers(0, 5), steps=st.integers(1, 5))
def test_each_step_s_samples_are_the_same_however_they_are_split(
    micro: int, accumulation: int, world: int, start: int, steps: int
) -> None:
    batch = Batch(micro * accumulation * world, micro, accumulation, world)
    phases = without_changes(batch.batch_size)
    per_rank = [
        list(RankBatches(phases, batch, rank, deal, start=start, steps=start + steps))
        for rank in range(world)
    ]
    for step in range(steps):
        turns = slice(step * accumulation, (step + 1) * accumulation)
        taken = sorted(sample for batches in per_rank for turn in batches[turns] for sample in turn)
        first = (start + step) * batch.batch_size
        assert taken == list(range(first, first + batch.batch_size))
    assert all(len(batches) == steps * accumulation for batches in per_rank)


@given(micro=SMALL, accumulation=SMALL, world=SMALL)
def test_a_step_is_dealt_out_by_length_alone(micro: int, accumulation: int, world: int) -> None:
    batch = Batch(micro * accumulation * world, micro, accumulation, world)
    phases = without_changes(batch.batch_size)
    per_rank = [list(RankBatches(phases, batch, rank, deal, start=2, steps=3)) for rank in range(world)]
    dealt = [sample for turn in range(accumulation) for own in per_rank for sample in own[turn]]
    first = 2 * batch.batch_size
    whole = Batch(batch.batch_size, batch.batch_size, 1, 1)
    one = RankBatches(phases, whole, 0, deal, start=2, steps=3)
    assert [dealt] == list(one), "one rank takes in one turn what others take after each other"
    by_hand = sorted(range(first, first + batch.batch_size), key=lambda p: (-lengths([p])[0], p))
    assert dealt == by_hand


def test_rows_of_one_length_stay_in_order() -> None:
    def alike(samples: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.full(len(samples), 64)

    assert by_length(range(8, 16), alike) == list(range(8, 16))


ATTEMPTS = st.lists(
    st.tuples(SMALL, SMALL, SMALL, SMALL, st.sets(st.integers(1, 12), max_size=3)), min_size=1, max_size=5
)
"""Steps done, micro-batch, accumulation, world size and banned steps of each attempt of a run."""


@settings(deadline=None)
@given(attempts=ATTEMPTS, blocks=st.integers(1, 200))
def test_over_any_attempts_every_block_of_an_epoch_is_taken_once(
    attempts: list[tuple[int, int, int, int, set[int]]], blocks: int
) -> None:
    def banned(skip: Skip, before: int) -> Samples:
        held = {p for ranges in skip.steps.values() for a, b in ranges for p in range(a, b) if p < before}
        return np.array(sorted(held), dtype=np.int64)

    phases = Phases([], banned)
    taken: list[int] = []
    left_out: set[int] = set()
    done = 0
    for steps, micro, accumulation, world, skipped in attempts:
        batch = Batch(micro * accumulation * world, micro, accumulation, world)
        phases = phases.going_on(done, batch_size=batch.batch_size, steps=skipped, documents=())
        for rank in range(world):
            for own in RankBatches(phases, batch, rank, deal, start=done, steps=done + steps):
                taken += own
        done += steps
        left_out |= set(range(phases.position(done))) - set(taken) - left_out
    named = {
        p for phase in phases.phases for r in phase.skip.steps.values() for a, b in r for p in range(a, b)
    }
    assert len(taken) == len(set(taken)) == phases.consumed(done)
    assert left_out <= named
    order = Order([(blocks, 1.0)], 3)
    every = order.map(sorted([*taken, *left_out]))
    for epoch in range(len(every) // blocks):
        assert sorted(every[every[:, 1] == epoch, 2].tolist()) == list(range(blocks))


def test_the_length_counts_the_steps_before_the_start_too() -> None:
    assert len(RankBatches(without_changes(8), Batch(8, 2, 2, 2), 0, deal, start=3, steps=10)) == 20


def test_validation_rows_are_every_block_of_every_source(tmp_path: Path) -> None:
    sources = []
    for name, count in (("first", 40), ("second", 90), ("third", 60)):
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences(count, seed=count)) + "\n")
        sources.append(Source(name=name, files=[str(tmp_path / f"{name}.txt")], weight=1.0))
    data = DataSection(train=sources, validation=0.4)
    store = open_store(prepare(data, train_tokenizer(sentences(100), 300), tmp_path / "cache", 1))
    blocks = Blocks(store, "validation", 32, "concat")
    rows = StoredValidationRows(blocks)
    expected = [blocks.read(source, block) for source in range(3) for block in range(len(blocks[source]))]
    assert len(blocks) == 3
    assert [rows[index].tolist() for index in range(len(rows))] == [row.tolist() for row in expected]


def test_equal_blocks_are_stacked_without_a_mask() -> None:
    batch = stack([np.array([1, 2, 3]), np.array([4, 5, 6])])
    assert sorted(batch) == ["input_ids", "labels"]
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_padding_is_masked_by_attention_and_never_by_its_id() -> None:
    end = 9
    batch = PadToLongest(end)([np.array([1, end]), np.array([2, 3, 4, end])])
    assert batch["input_ids"].tolist() == [[1, end, end, end], [2, 3, 4, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[1, end, IGNORED, IGNORED], [2, 3, 4, end]]
    assert batch["labels"].dtype == torch.int64
