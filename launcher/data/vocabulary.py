"""The tokenizer a run asks for: named, or trained on text from all over its corpus."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from launcher.config.schema import DataSection, TokenizerFromCorpus
from launcher.data.corpus import Corpus, list_corpora, reading_of
from launcher.data.cutting import Anywhere
from launcher.data.making import locked
from launcher.data.manifest import listing_of
from launcher.data.sources import Reading, batches
from launcher.data.tokenizers import TRAINING_BYTES, Tokenizer, load_tokenizer, train_tokenizer, within
from launcher.data.units import Unit, cut, unit_bytes
from launcher.errors import DataError

TRAINING_RULES = 1  # to be raised whenever the same text would train another tokenizer
TOKENIZERS = "tokenizers"  # where trained ones are, in the folder of all stores
PLACES = 1024  # in the corpus that a tokenizer's training text is taken from, at most


def resolve_tokenizer(
    asked: str | TokenizerFromCorpus, data: DataSection, cache_dir: Path, *, skip_bad: bool = False
) -> Tokenizer:
    """The tokenizer a run asks for. One that is trained on the run's text is trained once for that text.

    Raises RequestError for a tokenizer that cannot be found, DataError for bad or missing text.
    """
    if isinstance(asked, str):
        return load_tokenizer(asked)
    corpora, reading = _trained_on(data), reading_of(data)
    folder = _trained_folder(asked, corpora, reading, cache_dir)
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            units = cut(corpora, reading, unit_bytes(corpora))
            texts = spread_texts(units, reading, TRAINING_BYTES, PLACES, skip_bad=skip_bad)
            train_tokenizer(texts, asked.train.vocab_size).save(unfinished)
            unfinished.replace(folder)
        return load_tokenizer(str(folder))


def find_tokenizer(asked: str | TokenizerFromCorpus, data: DataSection, cache_dir: Path) -> Tokenizer | None:
    """The tokenizer a run asks for; None for one that is yet to be trained. See `resolve_tokenizer`."""
    if isinstance(asked, str):
        return load_tokenizer(asked)
    folder = _trained_folder(asked, _trained_on(data), reading_of(data), cache_dir)
    return load_tokenizer(str(folder)) if folder.is_dir() else None


def _trained_on(data: DataSection) -> list[Corpus]:
    return [corpus for corpus in list_corpora(data) if not corpus.held_out]


def _trained_folder(
    asked: TokenizerFromCorpus, corpora: Sequence[Corpus], reading: Reading, cache_dir: Path
) -> Path:
    """Named by all that determines the tokenizer."""
    listing = [each.model_dump(mode="json") for each in listing_of(corpora)]
    rules = [TRAINING_RULES, TRAINING_BYTES, asked.train.vocab_size, asdict(reading), listing]
    name = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:24]
    return cache_dir / TOKENIZERS / name


def spread_texts(
    units: Sequence[Unit], reading: Reading, size: int, places: int, *, skip_bad: bool
) -> Iterator[str]:
    """Texts from all over the corpus, `size` bytes in all at most: an equal share from the start of at most
    `places` units that lie evenly over it. Raises DataError for a bad record, unless they are skipped."""
    chosen = units[:: -(-len(units) // places)]
    for unit in chosen:
        yield from within(_texts(unit, reading, skip_bad), size // len(chosen))


def _texts(unit: Unit, reading: Reading, skip_bad: bool) -> Iterator[str]:
    for piece in unit.pieces:
        on_bad = _skip if skip_bad else None
        for batch in batches(piece.file, reading, piece.start, piece.end, cuts=Anywhere(), on_bad=on_bad):
            yield from (text for text in batch.texts if text and not text.isspace())


def _skip(_: DataError) -> None:
    """The conversion records it; nothing else does."""
