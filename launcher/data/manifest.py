"""What a store's manifest says: what determines its content, before it is made; its accounts, after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.config.schema import DataSection
from launcher.data.corpus import Corpus
from launcher.data.making import UnitRecord
from launcher.data.store import (
    FORMAT_VERSION,
    TOKENIZER_FOLDER,
    Content,
    Listed,
    Listing,
    Manifest,
    SourceLedger,
    TokenizerRecord,
    write_manifest,
)
from launcher.data.tokenizers import Tokenizer
from launcher.data.units import unit_bytes
from launcher.durable import mark_of
from launcher.errors import DataError


def content_of(data: DataSection, corpora: Sequence[Corpus], tokenizer: Tokenizer) -> Content:
    """All that determines the content of the store of these files under this tokenizer.

    `--skip-bad` is not among it: text without bad records gives the same store with it, and text with some
    gives none without it.
    """
    return Content(
        format_version=FORMAT_VERSION,
        format=data.format,
        sample_by=data.sample_by,
        text_field=data.text_field,
        validation_fraction=0.0 if isinstance(data.validation, list) else data.validation,
        unit_bytes=unit_bytes(corpora),
        tokenizer=TokenizerRecord(
            fingerprint=tokenizer.fingerprint,
            size=tokenizer.size,
            end_of_text=tokenizer.end_of_text,
            end_of_text_id=tokenizer.end_of_text_id,
            end_of_text_policy="after every document",
            pad_id=tokenizer.pad_id,
            probe_ids=tokenizer.probe_ids(),
        ),
        listing=listing_of(corpora),
    )


def listing_of(corpora: Sequence[Corpus]) -> list[Listing]:
    """The files of each source, as they were listed."""
    return [
        Listing(
            source=corpus.source,
            held_out=corpus.held_out,
            files=[
                Listed(file=file.path, size=file.size, etag=file.etag, ranges=file.ranges)
                for file in corpus.files
            ],
        )
        for corpus in corpora
    ]


def seal(folder: Path, content: Content, records: Sequence[UnitRecord]) -> None:
    """Make the folder a store, from the records of all units in order. Raises DataError without a document
    to train on."""
    shards = [shard for record in records for shard in record.shards]
    if not any(shard.split == "train" for shard in shards):
        files = sum(len(listing.files) for listing in content.listing)
        raise DataError(
            f"no document to train on in {files:,} files",
            hint="they are empty, hold only white space, or are all held out by data.validation",
        )
    tokenizer = folder / TOKENIZER_FOLDER
    manifest = Manifest(
        content=content,
        ledger=[_ledger(listing.source, records) for listing in content.listing],
        shards=shards,
        bad=[each for record in records for each in record.bad],
        tokenizer_files={path.name: mark_of(path) for path in sorted(tokenizer.iterdir())},
    )
    write_manifest(folder, manifest)


def _ledger(source: str, records: Sequence[UnitRecord]) -> SourceLedger:
    own = [record for record in records if record.source == source]
    shards = [shard for record in own for shard in record.shards]
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
        skipped_empty=sum(record.skipped_empty for record in own),
        skipped_bad=sum(len(record.bad) for record in own),
    )
