"""What every reader gives: documents in batches, and a long document in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.errors import Counted, DataError

BATCH = 1 << 20  # bytes of text in a batch, about
LONG = 4 << 20  # a document of more comes in parts, where there are places to cut it
UNCUT = 64 << 20  # as far as a place to cut is looked for

OnBad = Callable[[DataError], None]
"""Is given each bad record, and returns to go on after it."""


class Cuts(Protocol):
    """Knows the places where a text may be cut and its parts be tokenised apart with the same ids."""

    def last(self, text: str) -> int | None:
        """The last such place in `text`, above 0 and below its length, or None."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, and where its record lies in the decompressed file, in bytes.

    In a table (parquet, Arrow) `offset` is the number of its row, from 0, and `length` the bytes of its text.
    `more`: this is a part, and the document goes on in the next one; it begins at its first part's offset
    and has the lengths of all together. `bad`: the long document whose parts came before turned out bad,
    and is to be forgotten.
    """

    text: str
    offset: int
    length: int
    more: bool = False
    bad: bool = False

    @property
    def empty(self) -> bool:
        """Nothing but white space: counted, never stored. Says nothing of a part."""
        return not self.text or self.text.isspace()


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Consecutive documents of one file: for each the text, `offsets: int64[n]` and `lengths: int64[n]`.

    A part of a long document is alone in its batch. `more` and `bad` are those of `Document`; a batch that
    is `bad` has no texts.
    """

    texts: list[str]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    more: bool = False
    bad: bool = False

    @property
    def empty(self) -> NDArray[np.bool_]:
        """`bool[n]`: which are nothing but white space. Says nothing of a part."""
        return np.fromiter((not text or text.isspace() for text in self.texts), np.bool_, len(self.texts))

    def documents(self) -> Iterator[Document]:
        """The documents one by one."""
        if self.bad:
            yield Document("", 0, 0, bad=True)
        for text, offset, length in zip(
            self.texts, self.offsets.tolist(), self.lengths.tolist(), strict=True
        ):
            yield Document(text, offset, length, self.more)


def single(text: str, offset: int, length: int, more: bool = False) -> DocumentBatch:
    """A batch of one document, or of one part."""
    return DocumentBatch([text], np.array([offset], dtype=np.int64), np.array([length], dtype=np.int64), more)


def forgotten() -> DocumentBatch:
    """The batch that ends a long document which turned out bad."""
    return DocumentBatch([], np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), bad=True)


def in_parts(
    batch: DocumentBatch, cuts: Cuts, file: str, on_bad: OnBad, counted: Counted = "byte"
) -> Iterator[DocumentBatch]:
    """The batch, with its long texts in parts of at most LONG characters where there are places to cut.

    The first part of a text has the length of its record. `on_bad` is given those that cannot be cut.
    """
    if all(len(text) <= LONG for text in batch.texts):
        yield batch
        return
    for document in batch.documents():
        text, start, length = document.text, 0, document.length
        while place := _next_cut(text, start, cuts):
            yield single(text[start:place], document.offset, length, more=True)
            start, length = place, 0
        if len(text) - start <= UNCUT:
            yield single(text[start:], document.offset, length)
            continue
        on_bad(no_place_to_cut(file, document.offset, counted))
        if start:
            yield forgotten()


def _next_cut(text: str, start: int, cuts: Cuts) -> int | None:
    """Where to cut a text that is long from `start` on, no further than UNCUT behind it."""
    window = LONG
    while len(text) - start > window // 2 and len(text) - start > LONG:
        if place := cuts.last(text[start : start + window]):
            return start + place
        if window >= UNCUT:
            break
        window *= 2
    return None


def no_place_to_cut(file: str, offset: int, counted: Counted = "byte") -> DataError:
    """What to raise for a document that is too long to be tokenised whole, and cannot be cut."""
    return DataError(
        f"a document of more than {LONG >> 20} MiB has no place in {UNCUT >> 20} MiB where it may be cut "
        "and give the same tokens",
        file=file,
        offset=offset,
        counted=counted,
        hint="is it text? put line breaks between its words, or set data.sample_by to line or paragraph",
    )
