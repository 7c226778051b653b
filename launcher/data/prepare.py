"""Text to token store: cut the listing into units, convert each into shards, seal them with the manifest.

A unit's shards depend on nothing but the unit, so the store has the same bytes for any number of workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from launcher.config.schema import DataSection, TokenizerFromCorpus
from launcher.data.corpus import Corpus, list_corpora, reading_of
from launcher.data.packing import Packing
from launcher.data.pool import Stopped, StoppedError, spread
from launcher.data.shards import ShardWriter, mark_of, sync_folder
from launcher.data.sources import Document, Reading, changed, documents
from launcher.data.store import (
    FORMAT_VERSION,
    TOKENIZER_FOLDER,
    Content,
    Listed,
    Listing,
    Manifest,
    Origin,
    Shard,
    SourceLedger,
    Split,
    Store,
    TokenizerRecord,
    is_store,
    write_manifest,
)
from launcher.data.tokenizers import TRAINING_BYTES, Tokenizer, load_tokenizer, train_tokenizer, within
from launcher.data.units import UNIT_BYTES, Piece, Unit, cut
from launcher.errors import DataError, MachineError

SPLIT_KEY = b"launcher validation split 1"
TRAINING_RULES = 1  # to be raised whenever the same text would train another tokenizer
TRAINING_UNITS = 1024  # places in the corpus that a tokenizer's training text is taken from, at most
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1 << 14

Progress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all (of files as stored) and tokens so far."""


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What a unit became."""

    unit: Unit
    shards: tuple[Shard, ...]
    skipped_empty: int


def prepare(
    data: DataSection, tokenizer: Tokenizer, cache_dir: Path, workers: int, progress: Progress | None = None
) -> Path:
    """The token store of this text under this tokenizer, made if it is not there. Returns its folder.

    A second process that asks for the same store waits for the first. What ends it early, an interruption
    too, leaves no store and no shard behind. Raises DataError for bad or missing text.
    """
    corpora = list_corpora(data)
    reading = reading_of(data)
    content = _content(data, corpora, tokenizer)
    folder = cache_dir / content.name
    if is_store(folder):
        return folder
    with locked(cache_dir / f"{content.name}.lock"):
        if not is_store(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                tokenizer.save(folder / TOKENIZER_FOLDER)
                make = partial(Conversion, folder, reading, content.validation_fraction)
                units = cut(corpora, reading)
                results = _converted(make, units, workers, progress)
                _seal(folder, content, results)
            except BaseException:
                shutil.rmtree(folder)
                raise
    return folder


def resolve_tokenizer(asked: str | TokenizerFromCorpus, data: DataSection, cache_dir: Path) -> Tokenizer:
    """The tokenizer a run asks for. One that is trained on the run's text is trained once for that text.

    Raises RequestError for a tokenizer that cannot be found, DataError for bad or missing text.
    """
    if isinstance(asked, str):
        return load_tokenizer(asked)
    corpora = [corpus for corpus in list_corpora(data) if not corpus.held_out]
    reading = reading_of(data)
    listing = [each.model_dump(mode="json") for each in _listing(corpora)]
    rules = [TRAINING_RULES, TRAINING_BYTES, asked.train.vocab_size, asdict(reading), listing]
    name = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:24]
    folder = cache_dir / "tokenizers" / name
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            train_tokenizer(_spread_texts(corpora, reading), asked.train.vocab_size).save(unfinished)
            unfinished.replace(folder)
    return load_tokenizer(str(folder))


def _spread_texts(corpora: Sequence[Corpus], reading: Reading) -> Iterator[str]:
    """Texts from all over the corpus, TRAINING_BYTES in all at most: an equal share from the start of units
    that lie evenly over it."""
    units = cut(corpora, reading)
    chosen = units[:: -(-len(units) // TRAINING_UNITS)]
    for unit in chosen:
        yield from within(_texts(unit, reading), TRAINING_BYTES // len(chosen))


def _texts(unit: Unit, reading: Reading) -> Iterator[str]:
    for piece in unit.pieces:
        for document in documents(piece.file, reading, piece.start, piece.end):
            if not document.empty:
                yield document.text


def check_blocks(store: Store, block_size: int, packing: Packing) -> None:
    """Raise DataError where a source, or validation text that was asked for, makes no block."""
    made = {(each.split, each.source): each for each in store.summary(block_size, packing)}
    for listing in store.manifest.content.listing:
        split: Split = "validation" if listing.held_out else "train"
        found = made.get((split, listing.source))
        if found is None or not found.blocks:
            tokens = found.tokens if found else 0
            raise DataError(
                f"the {split} text of source {listing.source!r} has {tokens:,} tokens: "
                f"not one block of {block_size:,}",
                hint="give it more text, or a smaller data.block_size",
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock, waiting for it. The system lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise MachineError(
                f"{path} cannot be locked: {error.strerror}",
                hint="set data.cache_dir to a folder on a file system that has file locks",
            ) from error
        yield


class Conversion:
    """Turns units into shards in `folder`; holds the tokenizer that lies there."""

    def __init__(self, folder: Path, reading: Reading, validation_fraction: float) -> None:
        self._folder = folder
        self._reading = reading
        self._threshold = int(validation_fraction * 2**64)
        self._tokenizer = load_tokenizer(str(folder / TOKENIZER_FOLDER))

    def __call__(self, unit: Unit, stopped: Stopped) -> UnitResult:
        """Convert one unit. Asks `stopped` every batch; raises StoppedError when told so, and DataError."""
        skipped = 0
        with ExitStack() as stack:
            shards: dict[Split, _OpenShard] = {}
            for batch in self._batches(unit):
                if stopped():
                    raise StoppedError
                kept = [(piece, document) for piece, document in batch if not document.empty]
                skipped += len(batch) - len(kept)
                encoded = self._tokenizer.encode_batch([document.text for _, document in kept])
                for (piece, document), ids in zip(kept, encoded, strict=True):
                    split = self._split(unit, document)
                    if split not in shards:
                        name = f"{split}-{unit.number:05d}"
                        writer = stack.enter_context(ShardWriter(self._folder, name, self._tokenizer.size))
                        shards[split] = _OpenShard(name, split, writer, [])
                    shards[split].place(piece, document)
                    shards[split].writer.add(
                        ids, self._tokenizer.end_of_text_id, document.offset, document.length
                    )
            _check_unchanged(unit.pieces)
            done = tuple(shards[split].finish(unit.source) for split in sorted(shards))
        return UnitResult(unit, done, skipped)

    def _batches(self, unit: Unit) -> Iterator[list[tuple[Piece, Document]]]:
        batch: list[tuple[Piece, Document]] = []
        characters = 0
        for piece in unit.pieces:
            for document in documents(piece.file, self._reading, piece.start, piece.end):
                batch.append((piece, document))
                characters += len(document.text)
                if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                    yield batch
                    batch, characters = [], 0
        yield batch

    def _split(self, unit: Unit, document: Document) -> Split:
        """By content alone, so that adding files never moves a document across the split."""
        if unit.held_out:
            return "validation"
        digest = hashlib.blake2b(document.text.encode("utf-8"), digest_size=8, key=SPLIT_KEY).digest()
        return "validation" if int.from_bytes(digest, "big") < self._threshold else "train"


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard being written, and where its documents come from so far."""

    name: str
    split: Split
    writer: ShardWriter
    origins: list[tuple[Piece, int]]

    def place(self, piece: Piece, document: Document) -> None:
        """Note where the next document comes from."""
        if not self.origins or self.origins[-1][0] is not piece:
            self.origins.append((piece, self.writer.documents))

    def finish(self, source: str) -> Shard:
        """Give the shard its name on disk."""
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


def _check_unchanged(pieces: Sequence[Piece]) -> None:
    for file, _ in groupby(piece.file for piece in pieces):
        if changed(file):
            raise DataError(
                "changed while it was being read", file=file.path, hint="run again when nothing writes to it"
            )


def _content(data: DataSection, corpora: Sequence[Corpus], tokenizer: Tokenizer) -> Content:
    return Content(
        format_version=FORMAT_VERSION,
        format=data.format,
        sample_by=data.sample_by,
        text_field=data.text_field,
        validation_fraction=0.0 if isinstance(data.validation, list) else data.validation,
        unit_bytes=UNIT_BYTES,
        tokenizer=TokenizerRecord(
            fingerprint=tokenizer.fingerprint,
            size=tokenizer.size,
            end_of_text=tokenizer.end_of_text,
            end_of_text_id=tokenizer.end_of_text_id,
            end_of_text_policy="after every document",
            pad_id=tokenizer.pad_id,
            probe_ids=tokenizer.probe_ids(),
        ),
        listing=_listing(corpora),
    )


def _listing(corpora: Sequence[Corpus]) -> list[Listing]:
    return [
        Listing(
            source=corpus.source,
            held_out=corpus.held_out,
            files=[Listed(file=file.path, size=file.size, etag=file.etag) for file in corpus.files],
        )
        for corpus in corpora
    ]


def _converted(
    make: Callable[[], Conversion], units: Sequence[Unit], workers: int, progress: Progress | None
) -> list[UnitResult]:
    total, done, tokens = sum(unit.size for unit in units), 0, 0
    results = []
    with closing(spread(make, units, workers)) as converting:
        for result in converting:
            results.append(result)
            done += result.unit.size
            tokens += sum(shard.tokens for shard in result.shards)
            if progress is not None:
                progress(done, total, tokens)
    return sorted(results, key=lambda result: result.unit.number)


def _seal(folder: Path, content: Content, results: Sequence[UnitResult]) -> None:
    shards = [shard for result in results for shard in result.shards]
    if not any(shard.split == "train" for shard in shards):
        files = sum(len(listing.files) for listing in content.listing)
        raise DataError(
            f"no document to train on in {files:,} files",
            hint="they are empty, hold only white space, or are all held out by data.validation",
        )
    tokenizer = folder / TOKENIZER_FOLDER
    manifest = Manifest(
        content=content,
        ledger=[_ledger(listing.source, results) for listing in content.listing],
        shards=shards,
        tokenizer_files={path.name: mark_of(path) for path in sorted(tokenizer.iterdir())},
    )
    sync_folder(tokenizer)
    write_manifest(folder, manifest)


def _ledger(source: str, results: Sequence[UnitResult]) -> SourceLedger:
    own = [result for result in results if result.unit.source == source]
    shards = [shard for result in own for shard in result.shards]
    tokens = {
        split: sum(shard.tokens for shard in shards if shard.split == split)
        for split in ("train", "validation")
    }
    return SourceLedger(
        source=source,
        tokens_in=sum(tokens.values()),
        train_tokens=tokens["train"],
        validation_tokens=tokens["validation"],
        documents=sum(shard.documents for shard in shards),
        skipped_empty=sum(result.skipped_empty for result in own),
    )
