"""The token store: a folder of shards and the manifest that says what they are.

The manifest is written last, so a folder without one is not a store. Blocks are computed on top
(`data.packing`): one store serves every block size and packing.
"""

from __future__ import annotations

import gc
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from launcher.data.layout import Layout, layout_of
from launcher.data.packing import ByDocument, ConcatPlan, LaidOutPlan, Packing, PackingPlan
from launcher.data.shards import read_index, read_places, read_tokens, token_type
from launcher.data.tokenizers import Tokenizer, load_tokenizer
from launcher.durable import Mark, mark_of, sync, write_whole
from launcher.errors import Counted, StoreError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
CHECKSUM = b'"checksum": "'
TOKENIZER_FOLDER = "tokenizer"
REPAIR = "`launcher data prepare RUN` makes it again, to the same bytes"
VERIFY = "`launcher data verify STORE` sets it aside, and `launcher data prepare RUN` makes it again"
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

    name: str = Field(pattern=r"^(train|validation)-\d{5,}$")
    split: Split
    source: str
    tokens: int
    documents: int
    origins: list[Origin]
    files: dict[str, Mark]

    @property
    def marks(self) -> dict[str, Mark]:
        """Its files by name, and what each must be."""
        return {f"{self.name}.{kind}": mark for kind, mark in self.files.items()}

    def file_of(self, document: int) -> str:
        """The source file of a document, by its index in the shard."""
        firsts = [origin.first_document for origin in self.origins]
        return self.origins[bisect_right(firsts, document) - 1].file


class Listed(Record):
    """A source file as it was listed: `ranges` decides how it is cut into units."""

    file: str
    size: int
    etag: str
    ranges: bool


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
    """`manifest.json`. `checksum` stands last: the sha256 of the file's bytes with the checksum empty."""

    content: Content
    ledger: list[SourceLedger]
    shards: list[Shard]
    bad: list[BadRecord]
    tokenizer_files: dict[str, Mark]
    checksum: str = ""


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


class Shards:
    """The shards of one source and split, in order. Each becomes a `Shard` when it is first looked at: a
    large store has thousands, and a rank that starts needs only their sizes."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._records = records
        self._made: dict[int, Shard] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Shard:
        if number not in self._made:
            self._made[number] = Shard.model_validate(self._records[number])
        return self._made[number]

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    @property
    def names(self) -> list[str]:
        """What each is called."""
        return [record["name"] for record in self._records]

    @property
    def tokens(self) -> list[int]:
        """Tokens in each, end-of-text included."""
        return [record["tokens"] for record in self._records]


class Store:
    """An open store. `fields` are the manifest's, as JSON has them. A shard's files are checked for their
    size and memory-mapped when first read: StoreError where one is missing or short."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self._fields = fields
        self._tokens = lru_cache(OPEN_SHARDS)(self._map_tokens)
        self._layout = cache(self._make_layout)

    @cached_property
    def manifest(self) -> Manifest:
        """The whole manifest. Raises StoreError where it is not of this version's form."""
        try:
            return Manifest.model_validate(self._fields)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise StoreError(f"{self.path / MANIFEST} is damaged: {reason}", hint=REPAIR) from None

    @property
    def vocabulary(self) -> int:
        """Entries in the tokenizer's vocabulary."""
        return int(self._fields["content"]["tokenizer"]["size"])

    def sources(self, split: Split) -> list[str]:
        """The sources that have documents in a split, in the order they were given."""
        return list(
            dict.fromkeys(each["source"] for each in self._fields["shards"] if each["split"] == split)
        )

    def shards(self, split: Split, source: str) -> Shards:
        """The shards of one source and split, in order."""
        return Shards([s for s in self._fields["shards"] if s["split"] == split and s["source"] == source])

    def tokens(self, shard: Shard) -> NDArray[np.integer[Any]]:
        """`uint16` or `int32[tokens]`: the shard's ids, memory-mapped."""
        return self._tokens(shard.name, shard.files["bin"].size)

    def lengths(self, shard: Shard) -> NDArray[np.int32]:
        """`int32[documents]`: tokens of each document, end-of-text included, memory-mapped.

        Raises StoreError where they do not add up to the shard: what is cut by them would be cut wrongly.
        """
        path = self._file(shard.name, "idx", shard.files["idx"].size)
        lengths, _ = read_index(path)
        if (len(lengths), int(lengths.sum(dtype=np.int64))) != (shard.documents, shard.tokens):
            raise StoreError(f"{path}: its lengths are not the shard's", hint=VERIFY)
        return lengths

    def places(self, shard: Shard) -> NDArray[np.int64]:
        """`int64[documents, 2]`: byte offset and byte length of each document in its source file."""
        return read_places(self._file(shard.name, "doc", shard.files["doc"].size))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the store was made with."""
        return load_tokenizer(str(self.path / TOKENIZER_FOLDER))

    def plan(self, split: Split, source: str, block_size: int, packing: Packing) -> PackingPlan:
        """How one source's shards become blocks."""
        shards = self.shards(split, source)
        if packing == "concat":
            return ConcatPlan(shards.tokens, block_size)
        layout, names = self._layout(block_size, packing), shards.names
        blocks = [layout.blocks[name] for name in names]
        return LaidOutPlan(blocks, sum(shards.tokens), block_size, lambda shard: layout.shard(names[shard]))

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

    def _map_tokens(self, name: str, size: int) -> NDArray[np.integer[Any]]:
        return read_tokens(self._file(name, "bin", size), self.vocabulary, alone=self._outgrows_memory)

    @cached_property
    def _outgrows_memory(self) -> bool:
        """Whether pages that are brought in early, in an order that jumps, are gone before they are read."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        tokens = sum(shard["tokens"] for shard in self._fields["shards"])
        return bool(tokens * token_type(self.vocabulary).itemsize > memory // 2)

    def _make_layout(self, block_size: int, packing: ByDocument) -> Layout:
        shards = {shard["name"]: shard for shard in self._fields["shards"]}

        def lengths(name: str) -> NDArray[np.int32]:
            shard = Shard.model_validate(shards[name])
            path = self._file(name, "idx", shard.files["idx"].size)
            # A layout is kept and trusted from then on, so it is made of bytes that are proven.
            if mark_of(path) != shard.files["idx"]:
                raise StoreError(f"{path}: its content has changed (sha256 differs)", hint=VERIFY)
            return self.lengths(shard)

        checksum = self._fields["checksum"]
        return layout_of(self.path, checksum, list(shards), lengths, block_size, packing)

    def _file(self, name: str, kind: str, size: int) -> Path:
        path = self.path / f"{name}.{kind}"
        if problem := size_problem(path, size):
            raise StoreError(f"{path}: {problem}", hint=REPAIR)
        return path


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the folder a store: everything it names is on disk before the manifest appears."""
    text = manifest.model_copy(update={"checksum": ""}).model_dump_json(indent=1).encode() + b"\n"
    before, after = _around_checksum(text)
    sync(folder)
    write_whole(folder / MANIFEST, (bytes(before), _checksum(before, after).encode(), bytes(after)))
    sync(folder)


def is_store(folder: Path) -> bool:
    """Whether a store was finished here."""
    return (folder / MANIFEST).is_file()


def open_store(path: Path) -> Store:
    """Open a store by its manifest alone, so that a rank starts at once however large the store is.

    Raises StoreError. `damage.find_missing` looks at every file, `damage.verify_store` reads them.
    """
    return Store(path, _read_fields(path))


def read_manifest(path: Path) -> Manifest:
    """The manifest, if it is whole and of this version. Raises StoreError."""
    return open_store(path).manifest


def _read_fields(path: Path) -> dict[str, Any]:
    """The manifest as JSON has it, once its checksum holds: what was written is what `Manifest` dumped."""
    if not is_store(path):
        raise StoreError(
            f"{path} is not a token store: it has no {MANIFEST}", hint="run `launcher data prepare RUN`"
        )
    content = (path / MANIFEST).read_bytes()
    try:
        fields = _parse(content)
        version, checksum = fields["content"]["format_version"], fields["checksum"]
    except ValueError as error:
        raise StoreError(f"{path / MANIFEST} is damaged: {error}", hint=REPAIR) from None
    except (TypeError, KeyError):
        raise StoreError(f"{path / MANIFEST} is damaged: it is no manifest of a store", hint=REPAIR) from None
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, not {FORMAT_VERSION}",
            hint="run `launcher data prepare RUN` for a store of this version",
        )
    if checksum != _checksum(*_around_checksum(content)):
        raise StoreError(f"{path / MANIFEST} is damaged: its checksum differs", hint=REPAIR)
    return dict(fields)


def _parse(content: bytes) -> Any:
    """JSON has no cycles to look for, and in a large manifest looking takes as long as parsing: what is made
    here goes to the oldest generation at once, or the first collection afterwards would look after all."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return from_json(content)
    finally:
        gc.freeze()
        gc.unfreeze()
        if collecting:
            gc.enable()


def _around_checksum(content: bytes) -> tuple[memoryview, memoryview]:
    """What stands before and after the characters of the checksum, the last value of the manifest."""
    start = content.rfind(CHECKSUM) + len(CHECKSUM)
    return memoryview(content)[:start], memoryview(content)[content.find(b'"', start) :]


def _checksum(before: memoryview, after: memoryview) -> str:
    digest = hashlib.sha256(before)
    digest.update(after)
    return digest.hexdigest()


def size_problem(path: Path, size: int) -> str | None:
    """What is wrong with a file that is to have this size, by a look at the folder alone."""
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    return None if found == size else f"{found:,} bytes where the manifest says {size:,}"
