"""One shard on disk: Megatron's indexed dataset, format version 1, and our places beside it.

`NAME.bin`   the token ids of all documents, one after another, little-endian.
`NAME.idx`   b"MMIDIDX\\0\\0", u64 version, u8 type code, u64 sequences, u64 entries in the last table;
             then int32 lengths and int64 byte pointers, one a sequence, and int64 document indices,
             one more than there are documents. A document is one sequence, ending in end-of-text.
`NAME.doc`   int64 (byte offset, byte length) of each document in its decompressed source file.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from launcher.errors import StoreError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPE_CODES: Mapping[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
SMALL_VOCABULARY = 65_500  # below it ids are stored as uint16, as Megatron chooses
CHUNK = 1 << 22


class Mark(BaseModel):
    """What a file must be: its size in bytes and the sha256 of its content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


def token_type(vocabulary: int) -> np.dtype[Any]:
    """How ids of a vocabulary of this size are stored."""
    return TYPE_CODES[8 if vocabulary < SMALL_VOCABULARY else 4]


def mark_of(path: Path) -> Mark:
    """Reads the whole file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Mark(size=size, sha256=digest.hexdigest())


def write_whole(path: Path, parts: Iterable[bytes]) -> Mark:
    """Write a file that is either not there or whole: a temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    size = 0
    with temporary.open("wb") as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
            size += len(part)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    return Mark(size=size, sha256=digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes a shard a document at a time. Nothing has its final name until `finish`.

    As a context manager it removes what it wrote when it is left without `finish`.
    """

    def __init__(self, folder: Path, name: str, vocabulary: int) -> None:
        self._folder = folder
        self._name = name
        self._type = token_type(vocabulary)
        self._bin = folder / f"{name}.bin.tmp"
        self._stream = self._bin.open("wb")
        self._digest = hashlib.sha256()
        self._lengths = array("i")
        self._places = array("q")
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    def add(self, ids: NDArray[np.integer[Any]], end_of_text: int, offset: int, length: int) -> None:
        """Append a document: its ids, then end-of-text; and its place in the source file, in bytes."""
        content = np.empty(len(ids) + 1, dtype=self._type)
        content[:-1] = ids
        content[-1] = end_of_text
        self._stream.write(content.data)
        self._digest.update(content.data)
        self._lengths.append(len(ids) + 1)
        self._places.extend((offset, length))
        self.tokens += len(ids) + 1

    def finish(self) -> dict[str, Mark]:
        """Give the three files their names, the .bin last of all to be renamed. Returns their marks."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32).astype("<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._type.itemsize
        pointers = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        code = next(code for code, kind in TYPE_CODES.items() if kind == self._type)
        header = HEADER.pack(MAGIC, 1, code, len(lengths), len(documents))
        index = (header, lengths.tobytes(), pointers.tobytes(), documents.tobytes())
        places = np.frombuffer(self._places, dtype=np.int64).astype("<i8").tobytes()
        marks = {
            "bin": Mark(size=self.tokens * self._type.itemsize, sha256=self._digest.hexdigest()),
            "idx": write_whole(self._folder / f"{self._name}.idx", index),
            "doc": write_whole(self._folder / f"{self._name}.doc", (places,)),
        }
        self._bin.replace(self._folder / f"{self._name}.bin")
        return marks

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._stream.closed:
            self._stream.close()
        self._bin.unlink(missing_ok=True)


def read_tokens(path: Path, vocabulary: int) -> NDArray[np.integer[Any]]:
    """The ids of a .bin, memory-mapped; a plain array, since a slice of a `memmap` costs twice as much."""
    return np.asarray(np.memmap(path, dtype=token_type(vocabulary), mode="r"))


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
