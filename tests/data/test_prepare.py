"""Text to store: the same bytes whoever does the work, exact accounts, and a clean end."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from launcher.config.schema import DataSection, Source, TokenizerFromCorpus, TrainTokenizer
from launcher.data import conversion, vocabulary
from launcher.data.prepare import check_blocks, prepare
from launcher.data.store import Store, open_store
from launcher.data.tokenizers import Tokenizer, train_tokenizer
from launcher.data.vocabulary import resolve_tokenizer
from launcher.errors import DataError, RequestError
from tests.data.conftest import hashes


def validation_texts(store: Store) -> set[str]:
    """The documents of the validation split, by their places in the source files."""
    found = set()
    for shard in store.manifest.shards:
        if shard.split == "validation":
            starts = [*(origin.first_document for origin in shard.origins[1:]), shard.documents]
            places = iter(store.places(shard).tolist())
            for origin, stop in zip(shard.origins, starts, strict=True):
                content = Path(origin.file).read_bytes()
                for _ in range(origin.first_document, stop):
                    offset, length = next(places)
                    found.add(content[offset : offset + length].decode())
    return found


def keyed_share(text: str) -> float:
    """What is compared with the validation fraction, said once more."""
    return xxhash.xxh3_64(text.encode(), seed=int.from_bytes(b"launcher", "big")).intdigest() / 2**64


@pytest.mark.usefixtures("small_units")
def test_any_number_of_workers_writes_the_same_bytes(prepared: Any, corpus: Path, tmp_path: Path) -> None:
    (corpus / "c.txt.gz").write_bytes(gzip.compress((corpus / "a.txt").read_bytes()[:9000]))
    stores = [prepared([f"{corpus}/*"], n, validation=0.1, cache=tmp_path / str(n)) for n in (1, 2, 3)]
    assert len(stores[0].manifest.shards) > 20
    first = hashes(stores[0].path)
    assert hashes(stores[1].path) == first
    assert hashes(stores[2].path) == first
    assert len({store.path.name for store in stores}) == 1
    assert not [name for name in first if "tmp" in name]


def test_empty_documents_are_counted_in_every_batch(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "BATCH_BYTES", 9)
    (tmp_path / "a.txt").write_text("one\n\n \n\n\n\ntwo\n\n\n\t\nthree\n")
    (ledger,) = prepared([str(tmp_path / "a.txt")], validation=0.0).manifest.ledger
    assert (ledger.documents, ledger.skipped_empty) == (3, 8)


def test_a_document_never_changes_its_split(prepared: Any, corpus: Path) -> None:
    before = prepared([f"{corpus}/*.txt"], validation=0.1)
    old = set((corpus / "a.txt").read_text().splitlines()) | set((corpus / "b.txt").read_text().splitlines())
    (corpus / "0-first.txt").write_text("\n".join(f"a new line {i}" for i in range(500)))
    after = prepared([f"{corpus}/*.txt"], validation=0.1)
    assert after.path != before.path
    held_out = validation_texts(before)
    assert 60 < len(held_out) < 160
    assert validation_texts(after) & old == held_out
    assert held_out < validation_texts(prepared([f"{corpus}/*.txt"], validation=0.2))


def test_validation_files_are_the_validation_split(prepared: Any, corpus: Path) -> None:
    store = prepared([f"{corpus}/*.txt"], validation=[str(corpus / "b.txt")])
    assert validation_texts(store) == set((corpus / "b.txt").read_text().splitlines())
    assert (store.sources("train"), store.sources("validation")) == (["text"], ["validation"])
    train, validation = store.manifest.ledger
    assert (train.documents, train.validation_tokens) == (600, 0)
    assert (validation.documents, validation.train_tokens) == (500, 0)


@pytest.mark.parametrize("name", ["../corpus/b.txt", "../link/b.txt", "../b.txt"])
def test_a_validation_file_by_another_name_is_not_trained_on(prepared: Any, corpus: Path, name: str) -> None:
    (corpus.parent / "link").symlink_to(corpus)
    (corpus.parent / "b.txt").symlink_to(corpus / "b.txt")
    listing = prepared([f"{corpus}/*.txt"], validation=[f"{corpus}/{name}"]).manifest.content.listing
    assert [Path(file.file).name for file in listing[0].files] == ["a.txt"]


def test_a_store_that_is_there_is_not_made_again(prepared: Any, corpus: Path) -> None:
    first = prepared([f"{corpus}/*.txt"])
    written = (first.path / "manifest.json").stat().st_mtime_ns
    again = prepared([f"{corpus}/*.txt"], block_size=8, packing="pad")
    assert again.path == first.path
    assert (again.path / "manifest.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "keys", [{"validation": 0.02}, {"sample_by": "paragraph"}, {"format": "text"}, {"text_field": "body"}]
)
def test_what_determines_the_content_names_the_store(
    prepared: Any, corpus: Path, keys: dict[str, Any]
) -> None:
    assert prepared([f"{corpus}/*.txt"], **keys).path != prepared([f"{corpus}/*.txt"]).path


def test_a_changed_file_makes_another_store(prepared: Any, corpus: Path) -> None:
    first = prepared([f"{corpus}/*.txt"])
    os.utime(corpus / "a.txt", ns=(5, 5))
    assert prepared([f"{corpus}/*.txt"]).path != first.path


def test_another_tokenizer_makes_another_store(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataSection(train=[f"{corpus}/*.txt"])
    other = resolve_tokenizer(TokenizerFromCorpus(train=TrainTokenizer(vocab_size=300)), data, tmp_path)
    assert prepare(data, tokenizer, tmp_path, 1) != prepare(data, other, tmp_path, 1)


def test_progress_ends_at_the_whole(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    data = DataSection(train=[f"{corpus}/*.txt"])
    store = open_store(prepare(data, tokenizer, tmp_path / "cache", 1, lambda *now: seen.append(now)))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert seen[-1] == (size, size, store.manifest.ledger[0].tokens_in)


# What is refused


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_text_leaves_nothing(prepared: Any, corpus: Path, tmp_path: Path, workers: int) -> None:
    (corpus / "b.txt").write_bytes((corpus / "b.txt").read_bytes() + b"\n\xff")
    with pytest.raises(DataError, match=r"b\.txt:501") as raised:
        prepared([f"{corpus}/*.txt"], workers)
    assert raised.value.offset == (corpus / "b.txt").stat().st_size - 1
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [" ", "\n \n\t\n"])
def test_a_corpus_without_a_document(prepared: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match="no document to train on"):
        prepared([str(tmp_path / "a.txt")])
    assert list((tmp_path / "cache").iterdir()) == []


def test_validation_that_names_every_file(prepared: Any, corpus: Path) -> None:
    with pytest.raises(DataError, match="'text' has no file"):
        prepared([f"{corpus}/*.txt"], validation=[f"{corpus}/*.txt"])


def test_two_sources_of_one_name(prepared: Any, corpus: Path) -> None:
    twice = [Source(name="x", files=[str(corpus / name)], weight=1.0) for name in ("a.txt", "b.txt")]
    with pytest.raises(RequestError, match="same name"):
        prepared(twice)


def test_a_corpus_shorter_than_a_block(prepared: Any, corpus: Path) -> None:
    store = prepared([f"{corpus}/*.txt"], validation=0.0)
    tokens = store.manifest.ledger[0].tokens_in
    check_blocks(store, tokens, "concat")
    with pytest.raises(DataError, match=f"{tokens:,} tokens: not one block of {tokens + 1:,}"):
        check_blocks(store, tokens + 1, "concat")
    check_blocks(store, tokens + 1, "pad")


def test_validation_files_without_a_document(prepared: Any, corpus: Path) -> None:
    (corpus / "blank.txt").write_text(" \n")
    store = prepared([str(corpus / "a.txt")], validation=[str(corpus / "blank.txt")])
    with pytest.raises(DataError, match="validation text of source 'validation' has 0 tokens"):
        check_blocks(store, 64, "concat")


def test_a_file_that_changes_while_it_is_read(
    prepared: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Tokenizer.encode_joined

    def touching(self: Tokenizer, texts: Any) -> Any:
        os.utime(corpus / "a.txt", ns=(7, 7))
        return real(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_joined", touching)
    with pytest.raises(DataError, match=r"a\.txt: changed while it was being read"):
        prepared([f"{corpus}/*.txt"])


# The end of a process

PREPARE = """
import sys
from pathlib import Path
from launcher.config.schema import DataSection
from launcher.data.prepare import prepare
from launcher.data.tokenizers import load_tokenizer

if __name__ == "__main__":
    data = DataSection(train=[sys.argv[1]], validation=0.1)
    print("done", prepare(data, load_tokenizer(sys.argv[2]), Path(sys.argv[3]), 2))
"""


def children_of(pid: int) -> list[int]:
    """The worker processes of a process (not multiprocessing's resource tracker)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (folder / "stat").exists():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid and "spawn_main" in command:
                found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(happened: Any, limit: float = 20.0) -> Any:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if result := happened():
            return result
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
@pytest.mark.parametrize(
    ("how", "group"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGKILL, False)]
)
def test_an_interrupted_preparation(
    lines: list[str], tokenizer: Tokenizer, tmp_path: Path, how: signal.Signals, group: bool
) -> None:
    script, text, cache = tmp_path / "go.py", tmp_path / "long.txt", tmp_path / "cache"
    script.write_text(PREPARE)
    text.write_text("\n".join(lines * 2000))
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, str(script), str(text), str(tmp_path / "tokenizer"), str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list(cache.glob("*/units/*/train-*.bin")))
    workers = children_of(process.pid)
    assert len(workers) == 2
    (os.killpg if group else os.kill)(process.pid, how)
    out, err = process.communicate(timeout=20)
    assert "done" not in out
    wait_for(lambda: not any(is_alive(pid) for pid in workers))
    assert list(cache.glob("*/manifest.json")) == []
    if how == signal.SIGINT:
        assert err.count("KeyboardInterrupt") == 1
        assert list(cache.glob("*/units/*/*")) == []


# The tokenizer of a run


def trained(vocab_size: int) -> TokenizerFromCorpus:
    return TokenizerFromCorpus(train=TrainTokenizer(vocab_size=vocab_size))


def test_a_tokenizer_is_trained_once(corpus: Path, tmp_path: Path) -> None:
    data = DataSection(train=[f"{corpus}/*.txt"])
    first = resolve_tokenizer(trained(300), data, tmp_path / "cache")
    assert first.size == 300
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("tokenizer.json")}
    assert resolve_tokenizer(trained(300), data, tmp_path / "cache").fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in written} == written
    resolve_tokenizer(trained(310), data, tmp_path / "cache")
    os.utime(corpus / "a.txt", ns=(5, 5))
    resolve_tokenizer(trained(300), data, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("tokenizer.json"))) == 3


@pytest.mark.usefixtures("small_units")
def test_training_text_comes_from_all_over(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(vocabulary, "TRAINING_BYTES", 6000)
    monkeypatch.setattr(vocabulary, "train_tokenizer", train)
    resolve_tokenizer(trained(300), DataSection(train=[f"{corpus}/*.txt"]), tmp_path / "cache")
    assert 3000 < sum(len(text) for text in seen) <= 6000
    numbers = [text.split()[-1] for text in seen if text[-1].isdigit() and "." in text]
    assert {number.split(".")[0] for number in numbers} == {"1", "2"}
    assert max(int(number.split(".")[1]) for number in numbers if number.startswith("1.")) > 500


def test_a_named_tokenizer_is_loaded(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "named")
    data = DataSection(train=[f"{corpus}/*.txt"])
    assert resolve_tokenizer(str(tmp_path / "named"), data, tmp_path).fingerprint == tokenizer.fingerprint
