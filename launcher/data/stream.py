"""Blocks straight from text, with nothing written: the order rule over streams of tokens.

Sample p of a run is the n-th of its source, by the sources' turns as everywhere (`data.order`). The n-th
sample of a source with S streams is block n div S of stream n mod S (`data.cursor`). S is fixed when the run
begins, so which tokens are in a sample depends on neither the world nor the batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from launcher.config.schema import DataSection
from launcher.data.backends import REFERENCE
from launcher.data.corpus import Corpus, list_corpora, reading_of
from launcher.data.cursor import (
    WINDOW,
    Cursor,
    LogicalStream,
    SourceText,
    Window,
    chosen_texts,
    encode,
    window_of,
)
from launcher.data.cutting import Anywhere, ProvenCuts, prove_cuts
from launcher.data.manifest import listing_of
from launcher.data.mixture import source_weights
from launcher.data.order import Turns
from launcher.data.proof import SAMPLE_BYTES, choose_backend
from launcher.data.sources import SourceFile, empty
from launcher.data.split import HeldOut
from launcher.data.store import Listed, Listing, Record
from launcher.data.tokenizers import Tokenizer, within
from launcher.data.units import Unit, cut
from launcher.errors import DataError, StoreError

FORMAT_VERSION = 1
STREAMS = 64
"""Streams of a run at most, over all its sources (each has one at least)."""

UNIT_BYTES = 256 << 10
"""Of a unit: small, so that there are enough for STREAMS; a resume reads up to one of each stream again."""

MANY_UNITS = 65_536
"""Units of a source at most, but for its number of files: beyond it they are larger."""

SAMPLE_PLACES = 64
"""Units that the text to prove a tokenizer's backend on comes from, at least where there are as many."""

VALIDATION_BLOCKS = 128
"""Blocks of each source that are evaluated on at most, where `data.validation` is a fraction."""

Cursors = Mapping[str, Sequence[Sequence[int]]]
"""Source to the cursor of each of its streams."""


class StreamSource(Record):
    """The files of a source as they were listed, and how they are read."""

    listing: Listing
    unit_bytes: int
    streams: int


class StreamText(Record):
    """`stream.json`: what a run reads, fixed when it begins, for every rank and every resume.

    `tokenizer` is its fingerprint, `cuts` the rules by which long documents are cut. `backend` does the work,
    decides nothing, and may be another one at each start.
    """

    format_version: int
    tokenizer: str
    cuts: tuple[str, ...]
    window: int
    sources: list[StreamSource]
    backend: str

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a run reads."""
        return hashlib.sha256(self.model_dump_json(exclude={"backend"}).encode()).hexdigest()

    def change(self, now: StreamText) -> str | None:
        """What `now` has that this has not: the first file, or the tokenizer; None where it is the same."""
        if self.tokenizer != now.tokenizer:
            return "the tokenizer is another one"
        before, after = self._files(), now._files()
        for file in sorted(before.keys() | after.keys()):
            if before.get(file) != after.get(file):
                return f"{file} is {_difference(before.get(file), after.get(file))}"
        return None

    def _files(self) -> dict[str, tuple[str, Listed]]:
        return {
            f"{file.file} of source {source.listing.source!r}": (source.listing.source, file)
            for source in self.sources
            for file in source.listing.files
        }


def _difference(before: object, after: object) -> str:
    if before is None:
        return "new"
    return "gone" if after is None else "not as it was (size or time of change)"


def read_stream_text(file: Path) -> StreamText:
    """What `stream.json` says. Raises StoreError where it is missing, damaged or of another version."""
    hint = "give the run another name: what it read so far is not known any more"
    try:
        text = StreamText.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{file} is missing", hint=hint) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise StoreError(f"{file} is damaged: {first['msg']}", hint=hint) from None
    if (text.format_version, text.window) != (FORMAT_VERSION, WINDOW):
        raise StoreError(f"{file} was written by another version of launcher", hint=hint)
    return text


def list_stream(
    data: DataSection, batch_size: int, tokenizer: Tokenizer, seed: int, say: Callable[[str], None]
) -> StreamText:
    """List the text of a run, and prove on a sample of it how it may be tokenised.

    Raises DataError for an empty file, and where a source has nothing to train on.
    """
    text = StreamText(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer.fingerprint,
        cuts=(),
        window=WINDOW,
        sources=_list_sources(data, batch_size),
        backend=REFERENCE,
    )
    training, _ = source_texts(text, data, tokenizer, seed)
    sample: list[str] = []
    for name, source in zip(source_weights(data), training, strict=True):
        found = list(_sample(source, SAMPLE_BYTES // len(training)))
        if not found:
            raise DataError(
                f"source {name!r} has no document to train on",
                hint="its files are empty, hold only white space, or are all held out by data.validation",
            )
        sample += found
    choice = choose_backend(tokenizer, sample)
    for note in choice.notes:
        say(f"note: {note}")
    return text.model_copy(update={"cuts": prove_cuts(tokenizer, sample).rules, "backend": choice.name})


def _list_sources(data: DataSection, batch_size: int) -> list[StreamSource]:
    """Each source's streams are a divisor of the batch size, so that a step takes as many blocks of each: the
    largest that neither its share of STREAMS, nor its share of a batch, nor its number of units forbids."""
    weights = source_weights(data)
    turns = Turns(list(weights.values()))
    shares = dict(zip(weights, turns.quotas, strict=True))
    sources = []
    for corpus in list_corpora(data):
        for file in corpus.files:
            if not file.size:  # else it would end the run in whatever step it is met
                raise empty(file)
        unit_bytes = max(UNIT_BYTES, sum(file.size for file in corpus.files) // MANY_UNITS)
        units = cut([corpus], reading_of(data), unit_bytes)
        share = min(STREAMS, batch_size) * shares.get(corpus.source, 0) // turns.cycle
        (listing,) = listing_of([corpus])
        streams = _largest_divisor(batch_size, min(share, len(units)))
        sources.append(StreamSource(listing=listing, unit_bytes=unit_bytes, streams=streams))
    return sources


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(max(1, most), 0, -1) if number % size == 0)


def source_texts(
    text: StreamText, data: DataSection, tokenizer: Tokenizer, seed: int
) -> tuple[list[SourceText], list[SourceText]]:
    """The sources to train on, and those that were given as validation files."""
    reading = reading_of(data)
    fast = tokenizer.with_backend(text.backend)
    fraction = 0.0 if isinstance(data.validation, list) else data.validation
    training: list[SourceText] = []
    validation: list[SourceText] = []
    for source in text.sources:
        listing = source.listing
        files = tuple(SourceFile(each.file, each.size, each.etag, each.ranges) for each in listing.files)
        target = validation if listing.held_out else training
        target.append(
            SourceText(
                number=len(target),
                units=cut([Corpus(listing.source, files, listing.held_out)], reading, source.unit_bytes),
                streams=source.streams,
                reading=reading,
                tokenizer=fast,
                cuts=ProvenCuts(text.cuts),
                held_out=HeldOut(0.0 if listing.held_out else fraction),
                block_size=data.block_size,
                seed=seed,
            )
        )
    return training, validation


class StreamBlocks:
    """The blocks of samples, for one who asks for samples in increasing order, with gaps or without.

    Holds a window of each stream that was asked for, and from its middle on the next one too, which a thread
    reads meanwhile. `close` ends the thread.
    """

    def __init__(self, sources: Sequence[SourceText], data: DataSection, cursors: Cursors | None) -> None:
        weights = source_weights(data)
        self._names = list(weights)
        self._turns = Turns(list(weights.values()))
        self._thread = ThreadPoolExecutor(1, "stream")
        self._streams = [
            [
                _ReadAhead(
                    LogicalStream(source, number, cursor := _begin(cursors, name, number)),
                    cursor,
                    self._thread,
                )
                for number in range(source.streams)
            ]
            for name, source in zip(self._names, sources, strict=True)
        ]

    def stream(self, sample: int) -> tuple[int, int]:
        """The source and the stream that a sample comes from."""
        source, nth = self._turns.turn(sample)
        return source, nth % len(self._streams[source])

    def read(self, sample: int) -> NDArray[np.int64]:
        """`int64[block_size]`: the sample's ids.

        Raises DataError for bad text, and for a file that is not as it was listed; ValueError for a sample
        whose window was left behind.
        """
        source, nth = self._turns.turn(sample)
        streams = self._streams[source]
        block, number = divmod(nth, len(streams))
        ids = streams[number].block(*window_of(number, len(streams), block))
        return ids.astype(np.int64)

    def cursors(self) -> dict[str, list[Cursor]]:
        """Of each stream the window that was last asked for, or else the one to begin with."""
        return {
            name: [stream.cursor for stream in streams]
            for name, streams in zip(self._names, self._streams, strict=True)
        }

    def close(self) -> None:
        """Read no more."""
        self._thread.shutdown(cancel_futures=True)


def _begin(cursors: Cursors | None, source: str, stream: int) -> Cursor:
    return Cursor() if cursors is None else Cursor(*cursors[source][stream])


class _ReadAhead:
    """The blocks of a stream, the next window read by a thread while this one is used."""

    def __init__(self, stream: LogicalStream, cursor: Cursor, thread: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._thread = thread
        self._window: Window | None = None
        self._next: Future[Window] | None = None
        self.cursor = cursor

    def block(self, window: int, place: int) -> NDArray[np.int32]:
        """A block by its window; windows that no block was asked of are read and left."""
        if window < self.cursor.window:
            raise ValueError(f"window {window} of a stream that is at window {self.cursor.window}")
        while self._window is None or self._window.start.window < window:
            self._window = (self._next or self._thread.submit(self._stream.read)).result()
            self._next = None
            self.cursor = self._window.start
        if self._next is None and 2 * place >= len(self._window.blocks):
            self._next = self._thread.submit(self._stream.read)
        block: NDArray[np.int32] = self._window.blocks[place]
        return block


def latest(cursors: Sequence[Cursors]) -> dict[str, list[Sequence[int]]]:
    """Of each stream the latest of several readers' cursors, each reader having asked for other blocks."""
    return {
        source: [max(of_readers) for of_readers in zip(*(each[source] for each in cursors), strict=True)]
        for source in cursors[0]
    }


def read_validation(training: Sequence[SourceText], files: Sequence[SourceText]) -> list[NDArray[np.int32]]:
    """The blocks to evaluate on, `int32[block_size]` each: those of the validation files, in their order.

    Without files, those of held-out documents: of each source VALIDATION_BLOCKS, or as many as there are, its
    units taken in the order of the first epoch.
    """
    if files:
        read = [_blocks(each, each.units, held_out=False, most=None) for each in files]
    else:
        read = [
            _blocks(each, each.shuffled_units(0), held_out=True, most=VALIDATION_BLOCKS) for each in training
        ]
    return list(chain.from_iterable(read))


def _blocks(
    source: SourceText, units: Iterable[Unit], *, held_out: bool, most: int | None
) -> NDArray[np.int32]:
    """`int32[n, block_size]`: the whole blocks of some units' documents, `most` of them at most."""
    size = source.block_size
    pieces = chain.from_iterable(unit.pieces for unit in units)
    parts = [np.empty(0, np.int32)]
    tokens = 0
    for part in chain.from_iterable(encode(source, piece, held_out=held_out) for piece in pieces):
        parts.append(part.ids)
        tokens += len(part.ids)
        if most is not None and tokens >= most * size:
            break
    count = tokens // size if most is None else min(tokens // size, most)
    return np.concatenate(parts)[: count * size].reshape(count, size)


def _sample(source: SourceText, size: int) -> Iterator[str]:
    """Texts to train on, `size` bytes in all at most, from the beginnings of units all over the source."""
    anywhere = replace(source, cuts=Anywhere())
    for unit in anywhere.shuffled_units(0):
        texts = (each for piece in unit.pieces for each in chosen_texts(anywhere, piece, held_out=False))
        for text in within(chain.from_iterable(some for _, some, _ in texts), SAMPLE_BYTES // SAMPLE_PLACES):
            yield text
            size -= len(text)
        if size <= 0:
            return
