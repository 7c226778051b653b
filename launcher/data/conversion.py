"""One unit of text into its shards: read, tokenised, split and written a batch at a time.

Memory grows with neither the unit nor its documents: a long document comes in parts, whose ids wait in a
file until its end says which split they belong to.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import compress, groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from launcher.data.cutting import CutsOnDemand
from launcher.data.making import UnitRecord, publish, restore, writing_to
from launcher.data.pool import Tell
from launcher.data.shards import ShardWriter, token_type
from launcher.data.sources import Cuts, DocumentBatch, Reading, batches, changed
from launcher.data.split import HeldOut
from launcher.data.store import TOKENIZER_FOLDER, BadRecord, Origin, Shard, Split
from launcher.data.tokenizers import Tokenizer, load_tokenizer
from launcher.data.units import Piece, Unit
from launcher.errors import DataError

BATCH_BYTES = 1 << 20  # of text that is tokenised in one go
LONGEST = np.iinfo(np.int32).max  # tokens of a document that Megatron's index can count
SPOOLED = 1 << 20  # tokens read back at a time


@dataclass(frozen=True, slots=True)
class InHand:
    """How far a unit has come: about so many bytes of its files as stored, and so many tokens."""

    unit: int
    size: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Rules:
    """What a conversion does with text: how it is read, what is held out, whether bad records are skipped."""

    reading: Reading
    validation_fraction: float
    skip_bad: bool


@dataclass(frozen=True, slots=True)
class Tools:
    """How the tokenizer's ids are found, which never decides what they are: the backend that was proven, and
    texts of the corpus to prove on where a long one may be cut."""

    backend: str
    sample: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A unit to convert, and what to do it with: processes start before the proof of that is through."""

    unit: Unit
    tools: Tools


class Conversion:
    """Turns units into shards of the store `folder`, working in `work`; holds the store's tokenizer.

    `promised` has, by number, the shards that a unit of a finished store must become again.
    """

    def __init__(
        self,
        folder: Path,
        work: Path,
        rules: Rules,
        promised: dict[int, list[Shard]] | None = None,
    ) -> None:
        self._folder = folder
        self._work = work
        self._rules = rules
        self._promised = promised
        self._tokenizer = load_tokenizer(str(folder / TOKENIZER_FOLDER))
        self._equipped = cache(self._equip)

    def __call__(self, task: Task, tell: Tell) -> UnitRecord:
        """Convert one unit, telling every batch how far it is (InHand).

        Raises what `tell` raises, DataError, and MachineError where the store cannot be written.
        """
        with writing_to(self._folder):
            record = self._convert(task.unit, *self._equipped(task.tools), tell)
            if self._promised is None:
                publish(self._work, record)
            else:
                _check_promise(task.unit, record.shards, self._promised[task.unit.number])
                for shard in record.shards:
                    restore(self._work, self._folder, shard.marks)
        _give_back_memory()
        return record

    def _equip(self, tools: Tools) -> tuple[Tokenizer, Cuts]:
        return self._tokenizer.with_backend(tools.backend), CutsOnDemand(self._tokenizer, tools.sample)

    def _convert(self, unit: Unit, tokenizer: Tokenizer, cuts: Cuts, tell: Tell) -> UnitRecord:
        bad: list[BadRecord] = []

        def skip(error: DataError) -> None:
            bad.append(
                BadRecord(
                    source=unit.source,
                    file=error.file or unit.pieces[0].file.path,
                    line=error.line,
                    offset=error.offset,
                    counted=error.counted,
                    reason=error.reason,
                )
            )

        with ExitStack() as stack:
            held_out = HeldOut(self._rules.validation_fraction)
            spool = stack.enter_context(tempfile.TemporaryFile(dir=self._work))
            writing = _Writing(unit, self._work, tokenizer, held_out, stack, spool)
            behind = 0
            for piece in unit.pieces:
                for batch in batches(
                    piece.file,
                    self._rules.reading,
                    piece.start,
                    piece.end,
                    cuts=cuts,
                    on_bad=skip if self._rules.skip_bad else None,
                ):
                    if writing.take(piece, batch):
                        tell(InHand(unit.number, behind + _reached(piece, batch), writing.tokens))
                behind += piece.size
            writing.flush()
            _check_unchanged(unit.pieces)
            shards = writing.finish()
        return UnitRecord(
            number=unit.number,
            source=unit.source,
            shards=shards,
            skipped_empty=writing.skipped_empty,
            bad=bad,
        )


class _Writing:
    """The shards of a unit being written, and the text that waits to be tokenised in one go."""

    def __init__(
        self,
        unit: Unit,
        work: Path,
        tokenizer: Tokenizer,
        held_out: HeldOut,
        stack: ExitStack,
        spool: BinaryIO,
    ) -> None:
        self._unit = unit
        self._work = work
        self._tokenizer = tokenizer
        self._held_out = held_out
        self._stack = stack
        self._spool = spool
        self._waiting: list[tuple[Piece, DocumentBatch]] = []
        self._size = 0
        self._long: _LongDocument | None = None
        self._shards: dict[Split, _OpenShard] = {}
        self.skipped_empty = 0
        self.tokens = 0

    def take(self, piece: Piece, batch: DocumentBatch) -> bool:
        """Take in what was read next. Returns whether anything was tokenised."""
        if batch.more or batch.bad or self._long is not None:
            self.flush()
            self._take_part(piece, batch)
            return True
        self._waiting.append((piece, batch))
        self._size += int(batch.lengths.sum())
        if self._size < BATCH_BYTES:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Tokenise and write what waits."""
        waiting, self._waiting, self._size = self._waiting, [], 0
        texts: list[str] = []
        counts: list[int] = []
        places: list[NDArray[np.int64]] = []
        for _, batch in waiting:
            full = ~batch.empty
            counts.append(int(full.sum()))
            texts += batch.texts if full.all() else compress(batch.texts, full)
            places.append(np.stack([batch.offsets, batch.lengths], axis=1)[full])
            self.skipped_empty += len(batch.texts) - counts[-1]
        if not texts:
            return
        ids, lengths = self._tokenizer.encode_joined(texts)
        self.tokens += len(ids)
        place, owner = np.concatenate(places), np.repeat(np.arange(len(waiting)), counts)
        for split, chosen in self._splits(texts):
            if chosen.any():
                shard = self._shard(split)
                shard.note([piece for piece, _ in waiting], owner[chosen])
                shard.writer.write(ids if chosen.all() else ids[np.repeat(chosen, lengths)])
                shard.writer.end(lengths[chosen], place[chosen])

    def finish(self) -> list[Shard]:
        """Have the shards on disk, whole."""
        return [self._shards[split].finish(self._unit.source) for split in sorted(self._shards)]

    def _splits(self, texts: Sequence[str]) -> list[tuple[Split, NDArray[np.bool_]]]:
        """Which of the texts go into which split: by content alone, unless all of them are held out."""
        if self._unit.held_out:
            return [("validation", np.ones(len(texts), dtype=np.bool_))]
        held = self._held_out(texts)
        return [("train", ~held), ("validation", held)]

    def _shard(self, split: Split) -> _OpenShard:
        if split not in self._shards:
            name = f"{split}-{self._unit.number:05d}"
            writer = self._stack.enter_context(ShardWriter(self._work, name, self._tokenizer.size))
            self._shards[split] = _OpenShard(name, split, writer)
        return self._shards[split]

    def _take_part(self, piece: Piece, batch: DocumentBatch) -> None:
        """A part of a long document. With the last one it is known which split it belongs to."""
        if self._long is None:
            self._long = _LongDocument(self._spool, token_type(self._tokenizer.size), self._held_out)
        for text, offset, length in zip(batch.texts, batch.offsets, batch.lengths, strict=True):
            ids, _ = self._tokenizer.encode_joined([text])
            self._long.add(text, ids[:-1], int(offset), int(length))
            self.tokens += len(ids) - 1
        if not batch.more:
            long, self._long = self._long, None
            if not batch.bad:
                self._write_long(piece, long)

    def _write_long(self, piece: Piece, long: _LongDocument) -> None:
        if long.empty:
            self.skipped_empty += 1
            return
        if long.tokens >= LONGEST:
            raise DataError(
                f"a document of {long.tokens:,} tokens: the store's format counts up to {LONGEST:,}",
                file=piece.file.path,
                offset=long.offset,
                hint="cut it, or set data.sample_by to paragraph or line",
            )
        split: Split = "validation" if self._unit.held_out or long.held_out else "train"
        shard = self._shard(split)
        shard.note([piece], np.zeros(1, dtype=np.int64))
        for ids in long.ids():
            shard.writer.write(ids)
        shard.writer.write(np.array([self._tokenizer.end_of_text_id]))
        shard.writer.end(np.array([long.tokens + 1]), np.array([[long.offset, long.length]]))
        self.tokens += 1


class _LongDocument:
    """A document that comes in parts, whose ids so far are in a file that others used before it."""

    def __init__(self, spool: BinaryIO, kind: np.dtype[Any], held_out: HeldOut) -> None:
        spool.seek(0)
        spool.truncate()
        self._spool = spool
        self._type = kind
        self._held_out = held_out
        self._digest = held_out.digest()
        self.empty = True
        self.tokens = 0
        self.offset = -1
        self.length = 0

    @property
    def held_out(self) -> bool:
        """Whether the whole document is for validation."""
        return self._held_out.holds(self._digest)

    def add(self, text: str, ids: NDArray[np.integer[Any]], offset: int, length: int) -> None:
        """Append a part: its text, its ids, and where its bytes lie in the source file."""
        self._spool.write(ids.astype(self._type).data)
        self._digest.update(text.encode())
        self.empty = self.empty and (not text or text.isspace())
        self.offset = offset if self.offset < 0 else self.offset
        self.tokens += len(ids)
        self.length += length

    def ids(self) -> Iterator[NDArray[np.integer[Any]]]:
        """All ids so far, some at a time."""
        self._spool.seek(0)
        while part := self._spool.read(SPOOLED * self._type.itemsize):
            yield np.frombuffer(part, dtype=self._type)


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard being written, and where its documents come from so far."""

    name: str
    split: Split
    writer: ShardWriter
    origins: list[tuple[Piece, int]] = field(default_factory=list)

    def note(self, pieces: Sequence[Piece], owners: NDArray[np.int64]) -> None:
        """Note where the next documents come from: `owners[n]`, ascending, are indices into `pieces`."""
        numbers, firsts = np.unique(owners, return_index=True)
        for number, first in zip(numbers.tolist(), firsts.tolist(), strict=True):
            if not self.origins or self.origins[-1][0] is not pieces[number]:
                self.origins.append((pieces[number], self.writer.documents + first))

    def finish(self, source: str) -> Shard:
        """Have the shard on disk, whole."""
        origins = [
            Origin(file=piece.file.path, start=piece.start, end=piece.end, first_document=first)
            for piece, first in self.origins
        ]
        return Shard(
            name=self.name,
            split=self.split,
            source=source,
            tokens=self.writer.tokens,
            documents=self.writer.documents,
            origins=origins,
            files=self.writer.finish(),
        )


def _reached(piece: Piece, batch: DocumentBatch) -> int:
    """Bytes of the piece, as stored, that lie behind the batch; of a file read whole, or a table, none."""
    if piece.end is None or not len(batch.offsets):
        return 0
    return max(0, min(int(batch.offsets[-1] + batch.lengths[-1]) - piece.start, piece.size))


def _check_unchanged(pieces: Sequence[Piece]) -> None:
    for file, _ in groupby(piece.file for piece in pieces):
        if changed(file):
            raise DataError(
                "changed while it was being read", file=file.path, hint="run again when nothing writes to it"
            )


def _give_back_memory() -> None:
    """Return freed memory to the kernel: glibc keeps what lies between other things, more with every unit, so
    that a process would grow by half over a large corpus. A C library without malloc_trim(3) is left as it
    is."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _check_promise(unit: Unit, made: Sequence[Shard], promised: Sequence[Shard]) -> None:
    if list(made) != list(promised):
        files = " and ".join(dict.fromkeys((unit.pieces[0].file.path, unit.pieces[-1].file.path)))
        raise DataError(
            f"{files} no longer give the tokens that the store's manifest promises",
            hint="the text has changed though size and time are the same: touch it, and it gets a new store",
        )
