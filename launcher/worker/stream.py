"""Training rows straight from text: each rank reads the streams it takes samples of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from launcher.config.schema import DataSection, RunConfig
from launcher.data.cursor import SourceText
from launcher.data.phases import Samples, Skip
from launcher.data.stream import (
    Cursors,
    StreamBlocks,
    latest,
    read_stream_text,
    read_validation,
    source_texts,
)
from launcher.data.tokenizers import load_tokenizer
from launcher.errors import DataError
from launcher.plan.batch import Batch
from launcher.plan.choose import Every
from launcher.plan.orders import Orders
from launcher.run.directory import RunDirectory
from launcher.worker.collate import Row
from launcher.worker.dataset import TrainingRows, ValidationRows
from launcher.worker.together import of_all_ranks


class StreamRows(TrainingRows):
    """Sample index to row, read from the sample's stream. `text` is the fingerprint of what is read."""

    def __init__(self, sources: Sequence[SourceText], data: DataSection, text: str, samples: int) -> None:
        super().__init__(samples, _nothing_banned)
        self._sources = sources
        self._data = data
        self._text = text
        self._blocks = StreamBlocks(sources, data, None)

    def __getitem__(self, sample: int) -> Row:
        return self._blocks.read(sample)

    def certificate(self, samples: Iterable[Samples]) -> str:
        """Of the samples, and of all that decides what they are."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self._text} {self._sources[0].seed} {self._data.block_size}".encode())
        for part in samples:
            digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()

    def lengths(self, samples: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.full(len(samples), self._data.block_size)

    def deal(self, samples: list[int], batch: Batch) -> list[int]:
        """Samples of one stream, and of neighbouring ones, to the same rank, so that few streams are read by
        two."""
        shares = np.array(sorted(samples, key=self._blocks.stream))
        by_rank = shares.reshape(batch.world_size, batch.accumulation, batch.micro_batch)
        dealt: list[int] = by_rank.swapaxes(0, 1).ravel().tolist()
        return dealt

    def cursors(self) -> Cursors:
        return latest(of_all_ranks(self._blocks.cursors()))

    def take_up(self, cursors: Cursors) -> None:
        self._blocks = StreamBlocks(self._sources, self._data, cursors)

    def close(self) -> None:
        self._blocks.close()


def _nothing_banned(_skip: Skip, _before: int) -> Samples:
    return np.empty(0, dtype=np.int64)


def open_stream(
    directory: RunDirectory, orders: Orders, run: RunConfig
) -> tuple[TrainingRows, ValidationRows]:
    """Rows that are read from the text as it was when the run began.

    Raises DataError where there is to be evaluation and the held-out text has not one block.
    """
    text = read_stream_text(directory.stream)
    training, files = source_texts(text, run.data, load_tokenizer(str(directory.tokenizer)), run.seed)
    held_out: list[npt.NDArray[np.int32]] = []
    if orders.plan.eval_every != Every():
        held_out = read_validation(training, files)
        if not held_out:
            raise DataError(
                f"the validation text has not one block of {run.data.block_size:,} tokens",
                hint="give it more text, or set data.validation: 0",
            )
    assert orders.plan.samples is not None
    rows = StreamRows(training, run.data, text.fingerprint, orders.plan.samples)
    return rows, [ids.astype(np.int64) for ids in held_out]
