from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.batch import Batch
from launcher.worker.dataset import IGNORED, PadToLongest, RankBatches, stack

SMALL = st.integers(1, 6)


@given(micro=SMALL, accumulation=SMALL, world=SMALL, start=st.integers(0, 5), steps=st.integers(1, 5))
def test_each_step_s_samples_are_the_same_however_they_are_split(
    micro: int, accumulation: int, world: int, start: int, steps: int
) -> None:
    batch = Batch(micro * accumulation * world, micro, accumulation, world)
    per_rank = [list(RankBatches(batch, rank, start=start, steps=start + steps)) for rank in range(world)]
    for step in range(steps):
        turns = slice(step * accumulation, (step + 1) * accumulation)
        taken = sorted(sample for batches in per_rank for turn in batches[turns] for sample in turn)
        first = (start + step) * batch.batch_size
        assert taken == list(range(first, first + batch.batch_size))
    assert all(len(batches) == steps * accumulation for batches in per_rank)


def test_the_length_counts_the_steps_before_the_start_too() -> None:
    assert len(RankBatches(Batch(8, 2, 2, 2), 0, start=3, steps=10)) == 20


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
