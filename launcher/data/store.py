"""The token store: a folder of shards and the manifest that says what they are.

The manifest is written last, so a folder without one is not a store. Blocks are computed on top
(`data.packing`): one store serves every block size and packing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.data.packing import Packing, Plan, ShardSizes, plan_blocks
from launcher.data.shards import (
    Mark,
    mark_of,
    read_index,
    read_places,
    read_tokens,
    sync_folder,
    write_whole,
)
from launcher.data.tokenizers import Tokenizer, load_tokenizer
from launcher.errors import Counted, MachineError, StoreError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
DAMAGED = ".damaged"  # ends the name of a file that was set aside
REPAIR = "`launcher data prepare RUN` makes it again, to the same bytes"
OPEN_SHARDS = 256  # memory maps held at a time: each holds a file descriptor

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class Record(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(Record):
    """Bytes `[start, end)` of a source file (end null: all of it), and the shard's first document from it."""

    file: str
    start: int
    end: int | None
    first_document: int


class Shard(Record):
    """One shard: what is in it, where that comes from, and what its files must be."""

    name: str
    split: Split
    source: str
    tokens: int
    documents: int
    origins: list[Origin]
    files: dict[str, Mark]


class Listed(Record):
    """A source file as it was listed."""

    file: str
    size: int
    etag: str


class Listing(Record):
    """The files of one source; `held_out`: given as validation text."""

    source: str
    held_out: bool
    files: list[Listed]


class TokenizerRecord(Record):
    """Which tokenizer made the store, and how documents end."""

    fingerprint: str
    size: int
    end_of_text: str
    end_of_text_id: int
    end_of_text_policy: Literal["after every document"]
    pad_id: int
    probe_ids: list[list[int]]


class Content(Record):
    """All that determines a store's content, and so its name."""

    format_version: int
    format: str
    sample_by: str
    text_field: str
    validation_fraction: float
    unit_bytes: int
    tokenizer: TokenizerRecord
    listing: list[Listing]

    @property
    def name(self) -> str:
        """The store's folder name."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:24]


class BadRecord(Record):
    """A record of the text that could not be read and was left out, because `--skip-bad` asked for it.

    `offset` counts bytes of the decompressed file, or the rows of a table: `counted` says which. `line`
    counts from 1.
    """

    source: str
    file: str
    line: int | None
    offset: int | None
    counted: Counted
    reason: str


class SourceLedger(Record):
    """What became of a source's documents: tokens_in = train_tokens + validation_tokens, end-of-text
    included."""

    source: str
    tokens_in: int
    train_tokens: int
    validation_tokens: int
    documents: int
    skipped_empty: int
    skipped_bad: int


class Manifest(Record):
    """`manifest.json`. `checksum` is the sha256 of the rest of it."""

    content: Content
    ledger: list[SourceLedger]
    shards: list[Shard]
    bad: list[BadRecord]
    tokenizer_files: dict[str, Mark]
    checksum: str = ""

    def computed_checksum(self) -> str:
        """sha256 of everything but the checksum."""
        return hashlib.sha256(self.model_dump_json(exclude={"checksum"}).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Summary:
    """One source of one split under a packing. tokens + padding = blocks * block_size + dropped."""

    split: Split
    source: str
    documents: int
    tokens: int
    blocks: int
    dropped: int
    padding: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A file of a store that is not what the manifest says. `shard` is None for the tokenizer's files."""

    shard: str | None
    file: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class Store:
    """An open store. Shards are memory-mapped when first read."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._tokens = lru_cache(OPEN_SHARDS)(self._map_tokens)

    @property
    def vocabulary(self) -> int:
        """Entries in the tokenizer's vocabulary."""
        return self.manifest.content.tokenizer.size

    def sources(self, split: Split) -> list[str]:
        """The sources that have documents in a split, in the order they were given."""
        return list(dict.fromkeys(shard.source for shard in self.manifest.shards if shard.split == split))

    def shards(self, split: Split, source: str) -> list[Shard]:
        """The shards of one source and split, in order."""
        return [s for s in self.manifest.shards if s.split == split and s.source == source]

    def tokens(self, shard: Shard) -> NDArray[np.integer[Any]]:
        """`uint16` or `int32[tokens]`: the shard's ids, memory-mapped."""
        return self._tokens(shard.name)

    def lengths(self, shard: Shard) -> NDArray[np.int32]:
        """`int32[documents]`: tokens of each document, end-of-text included, memory-mapped."""
        return read_index(self._file(shard.name, "idx"))[0]

    def places(self, shard: Shard) -> NDArray[np.int64]:
        """`int64[documents, 2]`: byte offset and byte length of each document in its source file."""
        return read_places(self._file(shard.name, "doc"))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the store was made with."""
        return load_tokenizer(str(self.path / TOKENIZER_FOLDER))

    def plan(self, split: Split, source: str, block_size: int, packing: Packing) -> Plan:
        """How one source's shards become blocks."""
        nothing = np.empty(0, dtype=np.int32)
        sizes = [
            ShardSizes(shard.tokens, self.lengths(shard) if packing == "pad" else nothing)
            for shard in self.shards(split, source)
        ]
        return plan_blocks(sizes, block_size, packing)

    def summary(self, block_size: int, packing: Packing) -> list[Summary]:
        """Documents, tokens and blocks of every split and source."""
        return [
            self._summary(split, source, block_size, packing)
            for split in SPLITS
            for source in self.sources(split)
        ]

    def _summary(self, split: Split, source: str, block_size: int, packing: Packing) -> Summary:
        shards = self.shards(split, source)
        plan = self.plan(split, source, block_size, packing)
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        return Summary(split, source, documents, tokens, plan.blocks, plan.dropped, plan.padding)

    def _map_tokens(self, name: str) -> NDArray[np.integer[Any]]:
        return read_tokens(self._file(name, "bin"), self.vocabulary)

    def _file(self, name: str, kind: str) -> Path:
        return self.path / f"{name}.{kind}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the folder a store: everything it names is on disk before the manifest appears."""
    sealed = manifest.model_copy(update={"checksum": manifest.computed_checksum()})
    sync_folder(folder)
    write_whole(folder / MANIFEST, (sealed.model_dump_json(indent=1).encode() + b"\n",))
    sync_folder(folder)


def is_store(folder: Path) -> bool:
    """Whether a store was finished here."""
    return (folder / MANIFEST).is_file()


def open_store(path: Path) -> Store:
    """Open a store, checking the manifest and that every file is there in its full size.

    Raises StoreError. Reads no shard: `verify_store` does.
    """
    manifest = read_manifest(path)
    for each in find_missing(path, manifest):
        raise StoreError(str(each), hint=REPAIR)
    return Store(path, manifest)


def find_missing(path: Path, manifest: Manifest) -> Iterator[Damage]:
    """Every file that is not there in its full size. Reads none."""
    for name, shard, mark in _files(manifest):
        if problem := _size_problem(path / name, mark):
            yield Damage(shard, path / name, problem)


def verify_store(path: Path) -> list[Damage]:
    """Every file whose content is not what the manifest says. Reads all of them.

    Raises StoreError when the manifest itself is missing or damaged.
    """
    manifest = read_manifest(path)
    damage = {each.file: each for each in find_missing(path, manifest)}
    for name, shard, mark in _files(manifest):
        if path / name not in damage and mark_of(path / name) != mark:
            damage[path / name] = Damage(shard, path / name, "its content has changed (sha256 differs)")
    return list(damage.values())


def set_aside(damage: Sequence[Damage]) -> None:
    """Rename damaged files that are there to `NAME.damaged`: nobody opens them any more, and `prepare`
    finds them missing and makes them again. Whoever has one open reads on. Raises MachineError."""
    for each in damage:
        if each.file.exists():
            try:
                each.file.replace(each.file.with_name(each.file.name + DAMAGED))
            except OSError as error:
                raise MachineError(
                    f"{each.file} is damaged and cannot be set aside: {error.strerror}",
                    hint="let someone who may write to the store run `launcher data verify`",
                ) from error


def read_manifest(path: Path) -> Manifest:
    """The manifest, if it is whole and of this version. Raises StoreError."""
    if not is_store(path):
        raise StoreError(
            f"{path} is not a token store: it has no {MANIFEST}", hint="run `launcher data prepare RUN`"
        )
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
        raise StoreError(f"{path / MANIFEST} is damaged: {reason}", hint=REPAIR) from None
    if manifest.checksum != manifest.computed_checksum():
        raise StoreError(f"{path / MANIFEST} is damaged: its checksum differs", hint=REPAIR)
    if manifest.content.format_version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {manifest.content.format_version}, not {FORMAT_VERSION}",
            hint="run `launcher data prepare RUN` for a store of this version",
        )
    return manifest


def _files(manifest: Manifest) -> Sequence[tuple[str, str | None, Mark]]:
    shards = [(f"{s.name}.{kind}", s.name, s.files[kind]) for s in manifest.shards for kind in s.files]
    tokenizer = [
        (f"{TOKENIZER_FOLDER}/{name}", None, mark) for name, mark in manifest.tokenizer_files.items()
    ]
    return [*shards, *tokenizer]


def _size_problem(path: Path, mark: Mark) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    return None if size == mark.size else f"{size:,} bytes where the manifest says {mark.size:,}"
