"""A small tokenizer, and text to prepare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from launcher.config.schema import DataSection, Source
from launcher.data import units
from launcher.data.prepare import prepare
from launcher.data.sources import Document, Reading, SourceFile, batches
from launcher.data.store import Store, open_store
from launcher.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while"),
    *("seven", "wizards", "brew", "strong", "tea", "in", "the", "old", "mill"),
)


def sentences(count: int, seed: int = 1) -> list[str]:
    """Distinct lines of words, the same for the same seed."""
    return [
        " ".join(WORDS[(seed * i * (j + 3) + j * j) % len(WORDS)] for j in range(4 + i % 9)) + f" {seed}.{i}"
        for i in range(count)
    ]


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def documents(
    file: SourceFile, reading: Reading, start: int = 0, end: int | None = None, **asked: Any
) -> Iterator[Document]:
    """The documents of `batches`, one by one."""
    for batch in batches(file, reading, start, end, **asked):
        yield from batch.documents()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 400 entries."""
    return train_tokenizer(sentences(400), 400)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of two text files: 600 lines, and 500 lines without a last newline."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(sentences(600, 1)) + "\n")
    (folder / "b.txt").write_text("\n".join(sentences(500, 2)))
    return folder


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """Four hundred distinct lines of words."""
    return sentences(400)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 3,000 bytes: some twenty of the corpus."""
    monkeypatch.setattr(units, "SMALLEST", 3000)


class Preparing(Protocol):
    def __call__(self, train: list[str] | list[Source], workers: int = 1, **keys: Any) -> Store: ...


@pytest.fixture
def prepared(tokenizer: Tokenizer, tmp_path: Path) -> Preparing:
    """Prepare text into a store under `tmp_path`, and open it."""

    def make(train: list[str] | list[Source], workers: int = 1, **keys: Any) -> Store:
        cache = keys.pop("cache", tmp_path / "cache")
        rest = {name: keys.pop(name) for name in ("part", "skip_bad", "say") if name in keys}
        data = DataSection(train=train, **keys)
        return open_store(prepare(data, tokenizer, cache, workers, **rest))

    return make


@pytest.fixture
def store(prepared: Preparing, corpus: Path) -> Store:
    """The corpus, a fifth of it held out."""
    return prepared([f"{corpus}/*.txt"], validation=0.2)


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    """GPT-2's own tokenizer, where the folder of data for trials is."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return load_tokenizer(str(folder))
