"""`data/` as torch sees it: which rows this rank takes at each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from launcher.data.blocks import Blocks
from launcher.data.order import Order
from launcher.data.phases import Banned, Phase, Phases, Samples
from launcher.data.skipping import bans
from launcher.data.stream import Cursors
from launcher.plan.batch import Batch
from launcher.worker.collate import Collate, Row

Lengths = Callable[[Sequence[int]], npt.NDArray[np.int64]]
Deal = Callable[[list[int], Batch], list[int]]


class TrainingRows(Dataset[Row], ABC):
    """The rows of the samples [0, `samples`), asked for in increasing order.

    A subclass says what they are; what stands here is right where no row depends on those before it.
    """

    def __init__(self, samples: int, banned: Banned) -> None:
        self._samples = samples
        self._banned = banned

    def __len__(self) -> int:
        return self._samples

    def phases(self, phases: Sequence[Phase]) -> Phases:
        """These phases over these rows."""
        return Phases(phases, self._banned)

    @abstractmethod
    def certificate(self, samples: Iterable[Samples]) -> str:
        """A hash of what these samples are."""

    @abstractmethod
    def lengths(self, samples: Sequence[int]) -> npt.NDArray[np.int64]:
        """`int64[n]`: the tokens of each of n samples, without reading them."""

    @abstractmethod
    def deal(self, samples: list[int], batch: Batch) -> list[int]:
        """A step's samples in the order that ranks take them: a micro-batch each in turn, then again."""

    def cursors(self) -> Cursors:
        """What a checkpoint must hold for `take_up`. Every rank asks for it at once."""
        return {}

    def take_up(self, cursors: Cursors) -> None:
        """Be ready for the samples that follow the checkpoint which holds `cursors`."""

    def close(self) -> None:
        """Nothing more is asked for."""


class StoredRows(TrainingRows):
    """Sample index to row: the order's pure function, then one read from the store."""

    def __init__(self, blocks: Blocks, order: Order, samples: int) -> None:
        super().__init__(samples, bans(order, blocks))
        self._blocks = blocks
        self._order = order

    def certificate(self, samples: Iterable[Samples]) -> str:
        return self._order.certificate(samples)

    def lengths(self, samples: Sequence[int]) -> npt.NDArray[np.int64]:
        if self._blocks.full:
            return np.full(len(samples), self._blocks.block_size)
        places = self._order.map(samples).tolist()
        return np.array([self._blocks.length(source, block) for source, _, block in places])

    def deal(self, samples: list[int], batch: Batch) -> list[int]:
        """By length, so that a micro-batch needs little padding."""
        return by_length(samples, self.lengths)

    def __getitem__(self, sample: int) -> Row:
        place = self._order[sample]
        return self._blocks.read(place.source, place.block)


class ValidationRows(Protocol):
    """All the rows to evaluate on."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class StoredValidationRows:
    """Every validation block of every source, in store order."""

    def __init__(self, blocks: Blocks) -> None:
        self._starts = [0, *accumulate(len(blocks[source]) for source in range(len(blocks)))]
        self._blocks = blocks

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        source = bisect_right(self._starts, index) - 1
        return self._blocks.read(source, index - self._starts[source])


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one rank, in order, from `start` (a step) to `steps`.

    Step `s` takes the samples that `phases` say, whatever the world size, micro-batch and accumulation;
    only who takes which of them, as `deal` says, differs.
    """

    def __init__(
        self, phases: Phases, batch: Batch, rank: int, deal: Deal, *, start: int, steps: int
    ) -> None:
        self._phases = phases
        self._batch = batch
        self._rank = rank
        self._deal = deal
        self._start = start
        self._steps = steps

    def __len__(self) -> int:
        """Micro-batches in the whole run, those before `start` included: the Trainer counts from zero."""
        return self._steps * self._batch.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        micro, world = self._batch.micro_batch, self._batch.world_size
        for step in range(self._start, self._steps):
            samples = self._deal(self._phases.samples_of_step(step).tolist(), self._batch)
            for turn in range(self._batch.accumulation):
                mine = (turn * world + self._rank) * micro
                yield samples[mine : mine + micro]


def by_length(samples: Sequence[int], lengths: Lengths) -> list[int]:
    """The samples of one step, the longest first and those of one length in their own order."""
    return [samples[place] for place in np.argsort(-lengths(samples), kind="stable")]


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
