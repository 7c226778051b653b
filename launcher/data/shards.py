"""One shard on disk: Megatron's indexed dataset, format version 1, and our places beside it.

`NAME.bin`   the token ids of all documents, one after another, little-endian.
`NAME.idx`   b"MMIDIDX\\0\\0", u64 version, u8 type code, u64 sequences, u64 entries in the last table;
             then int32 lengths and int64 byte pointers, one a sequence, and int64 document indices,
             one more than there are documents. A document is one sequence, ending in end-of-text.
`NAME.doc`   int64 (byte offset, byte length) of each document in its decompressed source file.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.durable import Mark, Output
from launcher.errors import StoreError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPE_CODES: Mapping[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
SMALL_VOCABULARY = 65_500  # below it ids are stored as uint16, as Megatron chooses
CHUNK = 1 << 20


def token_type(vocabulary: int) -> np.dtype[Any]:
    """How ids of a vocabulary of this size are stored."""
    return TYPE_CODES[8 if vocabulary < SMALL_VOCABULARY else 4]


class ShardWriter:
    """Writes a shard's three files into a folder, a batch of documents at a time; holds 4 bytes a document.

    The folder is one that nobody reads: whoever does takes a file that is there for whole. As a context
    manager it removes what it wrote when it is left without `finish`.
    """

    def __init__(self, folder: Path, name: str, vocabulary: int) -> None:
        self._folder = folder
        self._name = name
        self._type = token_type(vocabulary)
        self._bin = Output(folder / f"{name}.bin")
        self._doc = Output(folder / f"{name}.doc")
        self._lengths = array("i")
        self._finished = False
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    def write(self, ids: NDArray[np.integer[Any]]) -> None:
        """Append ids; `end` says which documents they are."""
        assert ids.max(initial=0) <= np.iinfo(self._type).max
        self._bin.write(np.ascontiguousarray(ids, dtype=self._type).data.cast("B"))
        self.tokens += len(ids)

    def end(self, lengths: NDArray[np.integer[Any]], places: NDArray[np.int64]) -> None:
        """Say what was written since the last time: `lengths[n]` in tokens, end-of-text included, of n
        documents, and `places[n, 2]`, the byte offset and byte length of each in its source file."""
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self._doc.write(places.astype("<i8").tobytes())

    def finish(self) -> dict[str, Mark]:
        """Have the three files on disk, whole. Returns their marks. Raises OSError."""
        index = Output(self._folder / f"{self._name}.idx")
        try:
            for part in self._index():
                index.write(part)
            marks = {"bin": self._bin.finish(), "idx": index.finish(), "doc": self._doc.finish()}
        except BaseException:
            index.discard()
            raise
        self._finished = True
        return marks

    def _index(self) -> Iterator[bytes]:
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        assert int(lengths.sum(dtype=np.int64)) == self.tokens
        code = next(code for code, kind in TYPE_CODES.items() if kind == self._type)
        yield HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1)
        pieces = [lengths[start : start + CHUNK] for start in range(0, len(lengths), CHUNK)]
        for piece in pieces:
            yield piece.astype("<i4").tobytes()
        pointer = 0
        for piece in pieces:
            ends = pointer + np.cumsum(piece, dtype="<i8") * self._type.itemsize
            yield np.concatenate([np.array([pointer], "<i8"), ends[:-1]]).tobytes()
            pointer = int(ends[-1])
        for start in range(0, len(lengths) + 1, CHUNK):
            yield np.arange(start, min(start + CHUNK, len(lengths) + 1), dtype="<i8").tobytes()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._bin.discard()
            self._doc.discard()


def read_tokens(path: Path, vocabulary: int, *, alone: bool = False) -> NDArray[np.integer[Any]]:
    """The ids of a .bin, memory-mapped; a plain array, since a slice of a `memmap` costs twice as much.

    `alone`: what is read brings in no pages around it, which the system may otherwise take megabytes of.
    """
    with path.open("rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if alone:
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype=token_type(vocabulary))


def read_index(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """`int32[n]` lengths in tokens and `int64[n]` byte pointers of an .idx's documents, memory-mapped."""
    content = np.memmap(path, dtype=np.uint8, mode="r")
    if len(content) < HEADER.size:
        raise StoreError(f"{path}: too short for an index")
    magic, version, code, count, _ = HEADER.unpack(content[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in TYPE_CODES:
        raise StoreError(f"{path}: not an index of Megatron's format version 1")
    middle = HEADER.size + 4 * count
    lengths = content[HEADER.size : middle].view("<i4")
    return lengths, content[middle : middle + 8 * count].view("<i8")


def read_places(path: Path) -> NDArray[np.int64]:
    """`int64[n, 2]`: byte offset and byte length of each document of a .doc, memory-mapped."""
    return np.memmap(path, dtype="<i8", mode="r").reshape(-1, 2)
