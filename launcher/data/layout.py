"""Packings that hang on the documents' lengths: worked out once for a store, and kept in its folder.

`layouts/PACKING-BLOCK_SIZE-KEY/` holds for each shard `NAME.layout`, little-endian int64: `firsts`, then
`pieces` (see `packing.ShardLayout`); in `blocks.json` how many blocks each has; in `marks.json` the size and
sha256 of these files. KEY is a hash of the manifest's checksum and of VERSION, so a layout of other shards or
other rules is never met. All of it follows from the store: whoever needs a layout that is not there makes it,
and it may be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from launcher.data.packing import ByDocument, ShardLayout, lay_out
from launcher.durable import Mark, mark_of, sync, write_whole
from launcher.errors import MachineError, StoreError

VERSION = 2  # to be raised whenever the same store would be laid out otherwise; 1 took any lengths
FOLDER = "layouts"
COUNTS, MARKS = "blocks.json", "marks.json"
KEY = "[0-9a-f]" * 16
OPEN_LAYOUTS = 256  # shards whose layout is mapped at a time: each holds a file descriptor
KEPT_LAYOUTS = 8  # the same where they are held in memory
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

_Marks: Final = TypeAdapter(dict[str, Mark])
Lengths = Callable[[str], NDArray[np.int32]]
"""The lengths in tokens of a shard's documents, by the shard's name."""


class Layout:
    """The blocks of every shard of a store, by the shard's name. `blocks`: how many there are. `shard`: where
    they are, read or made when asked for."""

    def __init__(self, blocks: Mapping[str, int], shard: Callable[[str], ShardLayout]) -> None:
        self.blocks = blocks
        self.shard = shard


def layout_of(
    store: Path, checksum: str, names: Sequence[str], lengths: Lengths, block_size: int, packing: ByDocument
) -> Layout:
    """The layout of the shards `names`, made and kept if it is not there.

    Where the store's folder cannot be written to, only the counts are held and a shard is laid out again
    whenever it is asked for. Memory grows with the number of shards and with the largest of them only.
    Raises MachineError for a full disk, and StoreError for a shard whose files are not what they were.
    """
    key = hashlib.sha256(f"{VERSION} {checksum}".encode()).hexdigest()[:16]
    folder = store / FOLDER / f"{packing}-{block_size}-{key}"

    def make(name: str) -> ShardLayout:
        return lay_out(lengths(name), block_size, packing)

    if not folder.is_dir():
        try:
            _keep(folder, names, make)
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise MachineError(
                    f"{folder} cannot be written: {error.strerror}",
                    hint="make room there: a layout takes some 16 bytes a document and 8 a block",
                ) from error
            return Layout({name: make(name).blocks for name in names}, lru_cache(KEPT_LAYOUTS)(make))
    return _open(folder)


def _keep(folder: Path, names: Sequence[str], make: Callable[[str], ShardLayout]) -> None:
    """Write a layout under a name of its own and rename it: whoever comes second throws theirs away."""
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        blocks, marks = {}, {}
        for name in names:
            layout = make(name)
            blocks[name] = layout.blocks
            content = (part.astype("<i8", copy=False).tobytes() for part in (layout.firsts, layout.pieces))
            marks[f"{name}.layout"] = write_whole(unfinished / f"{name}.layout", content)
        marks[COUNTS] = write_whole(unfinished / COUNTS, (json.dumps(blocks).encode(),))
        write_whole(unfinished / MARKS, (_Marks.dump_json(marks),))
        sync(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open(folder: Path) -> Layout:
    try:
        blocks: dict[str, int] = json.loads((folder / COUNTS).read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{folder / COUNTS}: {error}") from error

    def read(name: str) -> ShardLayout:
        path = folder / f"{name}.layout"
        try:
            content = np.asarray(np.memmap(path, dtype="<i8", mode="r"))
        except (OSError, ValueError) as error:
            raise _damaged(folder, f"{path}: {error}") from error
        after = blocks[name] + 1
        if len(content) < after or len(content) != after + 2 * content[after - 1]:
            raise _damaged(folder, f"{path}: {8 * len(content):,} bytes do not hold {blocks[name]:,} blocks")
        return ShardLayout(content[:after], content[after:].reshape(-1, 2))

    return Layout(blocks, lru_cache(OPEN_LAYOUTS)(read))


def find_damaged(store: Path) -> Iterator[tuple[Path, str]]:
    """Every layout in a store's folder that is not as it was made, and what is wrong. Reads them all."""
    for folder in sorted((store / FOLDER).glob(f"*-{KEY}")):
        try:
            marks = _Marks.validate_json((folder / MARKS).read_bytes())
            changed = [name for name, mark in marks.items() if mark_of(folder / name) != mark]
        except (OSError, ValueError) as error:
            yield folder, str(error)
        else:
            if changed:
                yield folder, f"{changed[0]}: its content has changed (sha256 differs)"


def _damaged(folder: Path, problem: str) -> StoreError:
    return StoreError(problem, hint=f"delete {folder}: it is made again from the store")
