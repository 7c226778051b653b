"""`data/` as torch sees it: which rows this rank takes at each step, and rows as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from launcher.data.blocks import Blocks
from launcher.data.order import Order
from launcher.plan.batch import Batch

IGNORED = -100
"""The label that cross-entropy leaves out."""

Row = npt.NDArray[np.int64]
Tensors = dict[str, torch.Tensor]


class Collate(Protocol):
    def __call__(self, rows: Sequence[Row]) -> Tensors: ...


class TrainingRows(Dataset[Row]):
    """Sample index to row: the order's pure function, then one read from the store."""

    def __init__(self, blocks: Blocks, order: Order, samples: int) -> None:
        self._blocks = blocks
        self._order = order
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def certificate(self, first: int, count: int) -> str:
        """A hash of which blocks the samples [first, first + count) are."""
        return self._order.certificate(first, first + count)

    def __getitem__(self, sample: int) -> Row:
        place = self._order[sample]
        return self._blocks.read(place.source, place.block)


class ValidationRows(Dataset[Row]):
    """Every validation block of every source, in store order."""

    def __init__(self, blocks: Blocks) -> None:
        self._rows = [(source, row) for source in range(len(blocks)) for row in range(len(blocks[source]))]
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._blocks.read(*self._rows[index])


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one rank, in order, from `start` (a step) to `steps`.

    Step `s` takes the samples [s x batch_size, (s+1) x batch_size) whatever the world size,
    micro-batch and accumulation; only who takes which of them differs.
    """

    def __init__(self, batch: Batch, rank: int, *, start: int, steps: int) -> None:
        self._batch = batch
        self._rank = rank
        self._start = start
        self._steps = steps

    def __len__(self) -> int:
        """Micro-batches in the whole run, those before `start` included: the Trainer counts from zero."""
        return self._steps * self._batch.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        micro, world = self._batch.micro_batch, self._batch.world_size
        for step in range(self._start, self._steps):
            for turn in range(self._batch.accumulation):
                first = step * self._batch.batch_size + (turn * world + self._rank) * micro
                yield list(range(first, first + micro))


def stack(rows: Sequence[Row]) -> Tensors:
    """Blocks of one length as `input_ids` and `labels`, int64[rows, block_size]; no mask, so that
    attention keeps its causal fast path."""
    ids = torch.from_numpy(np.stack(rows))
    return {"input_ids": ids, "labels": ids}


class PadToLongest:
    """Rows of unequal length, padded on the right to the longest of them: `input_ids`,
    `attention_mask` and `labels`, int64[rows, longest]."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[Row]) -> Tensors:
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self._pad, dtype=torch.int64)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = torch.from_numpy(row)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def training_loader(
    rows: TrainingRows,
    batches: RankBatches,
    collate: Collate,
    arguments: TrainingArguments,
    *,
    pin_memory: bool,
) -> DataLoader[Row]:
    """The loader of one rank. It has a random generator of its own: drawing a seed from the global
    one would shift the dropout of a resumed run against an undisturbed one."""
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=pin_memory,
        num_workers=arguments.dataloader_num_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        persistent_workers=arguments.dataloader_persistent_workers,
        generator=torch.Generator(),
    )
