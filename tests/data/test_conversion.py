"""What becomes of every record of a text: a token of some document, or an entry in the accounts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.schema import DataSection, Source
from launcher.data import conversion, units
from launcher.data.batches import LONG
from launcher.data.prepare import prepare
from launcher.data.sources import DocumentBatch, batches
from launcher.data.split import HeldOut
from launcher.data.store import Store, open_store
from launcher.data.tokenizers import Tokenizer
from launcher.errors import DataError
from tests.data.conftest import hashes, sentences

BAD = {"not JSON": b"{oops}", "no field": b'{"body": "x"}', "not UTF-8": b'{"text": "caf\xe9"}'}
GOOD = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    corpora=st.lists(
        st.lists(st.one_of(GOOD, st.sampled_from(list(BAD.values()))), max_size=25), min_size=2, max_size=2
    ),
    fraction=st.sampled_from([0.0, 0.3, 0.9]),
    unit_bytes=st.sampled_from([100, 1 << 24]),
)
def test_every_record_is_accounted_for(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    corpora: list[list[str | bytes]],
    fraction: float,
    unit_bytes: int,
) -> None:
    monkeypatch.setattr(units, "SMALLEST", unit_bytes)
    folder = tmp_path_factory.mktemp("ledger")
    anchor = next(text for text in sentences(100) if not HeldOut(fraction)([text])[0])
    expected = []
    for name, texts in zip("ab", corpora, strict=True):
        records = [anchor, *texts]
        lines = [
            record if isinstance(record, bytes) else json.dumps({"text": record}).encode()
            for record in records
        ]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        good = [record for record in records if isinstance(record, str)]
        full = [text for text in good if text.strip()]
        tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(full))
        ends = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()
        places = [
            (name, number, start)
            for number, (record, start) in enumerate(zip(records, ends, strict=False), 1)
            if isinstance(record, bytes)
        ]
        expected.append((tokens, len(full), len(good) - len(full), places))
    sources = [Source(name=name, files=[f"{folder}/{name}.jsonl"], weight=1.0) for name in "ab"]
    data = DataSection(train=sources, validation=fraction)
    store = open_store(prepare(data, tokenizer, folder / "cache", 1, skip_bad=True))
    for ledger, (tokens, documents, empty, places) in zip(store.manifest.ledger, expected, strict=True):
        assert ledger.tokens_in == ledger.train_tokens + ledger.validation_tokens == tokens
        assert (ledger.documents, ledger.skipped_empty, ledger.skipped_bad) == (documents, empty, len(places))
        found = [(bad.source, bad.line) for bad in store.manifest.bad if bad.source == ledger.source]
        assert found == [(name, line) for name, line, _ in places]
    for split, source, tokens, blocks, dropped in (
        (row.split, row.source, row.tokens, row.blocks, row.dropped) for row in store.summary(16, "concat")
    ):
        own = [len(store.tokens(shard)) for shard in store.shards(split, source)]
        assert blocks * 16 + dropped == tokens == sum(own)


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.txt.gz"])
def test_an_empty_file_is_bad(prepared: Any, corpus: Path, name: str, sample_by: str) -> None:
    (corpus / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    given = [f"{corpus}/a.txt", f"{corpus}/{name}"]
    with pytest.raises(DataError, match=f"{name}, byte 0: the file is empty") as refused:
        prepared(given, sample_by=sample_by)
    assert "--skip-bad" in (refused.value.hint or "")
    store = prepared(given, sample_by=sample_by, skip_bad=True)
    (bad,) = store.manifest.bad
    assert (Path(bad.file).name, bad.offset, bad.reason) == (name, 0, "the file is empty")
    (ledger,) = store.manifest.ledger
    assert (ledger.skipped_bad, ledger.skipped_empty) == (1, 0)


def test_bad_records_are_skipped_and_listed(tokenizer: Tokenizer, tmp_path: Path, small_units: None) -> None:
    texts = sentences(300)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    for place, bad in zip((3, 150, 299), BAD.values(), strict=True):
        lines[place] = bad
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    packed = gzip.compress("\n".join(sentences(2000, 2)).encode())
    (tmp_path / "b.txt.gz").write_bytes(packed[: len(packed) // 2])
    data = DataSection(train=[f"{tmp_path}/*.*"])
    with pytest.raises(DataError):
        prepare(data, tokenizer, tmp_path / "cache", 1)
    folder = prepare(data, tokenizer, tmp_path / "cache", 2, skip_bad=True)
    one, two, three, cut_off = open_store(folder).manifest.bad
    assert [(Path(each.file).name, each.line) for each in (one, two, three)] == [
        ("a.jsonl", 4),
        ("a.jsonl", 151),
        ("a.jsonl", 300),
    ]
    assert ["not JSON" in one.reason, "no field" in two.reason, "UTF-8" in three.reason] == [True] * 3
    assert (Path(cut_off.file).name, "truncated gzip" in cut_off.reason) == ("b.txt.gz", True)
    calm = prepare(data, tokenizer, tmp_path / "other", 1, skip_bad=True)
    assert hashes(calm) == hashes(folder)
    # The store is there: what was skipped once is skipped for whoever uses it, or mends it.
    whole = hashes(folder)
    assert prepare(data, tokenizer, tmp_path / "cache", 1) == folder
    (folder / "train-00000.bin").unlink()
    assert prepare(data, tokenizer, tmp_path / "cache", 1) == folder
    assert hashes(folder) == whole


def test_units_with_bad_records_are_not_kept_for_who_does_not_skip(
    tokenizer: Tokenizer, tmp_path: Path, small_units: None
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*[b'{"text": "one"}'] * 150, BAD["not JSON"]]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([b'{"text": "two"}'] * 100))
    data = DataSection(train=[f"{tmp_path}/*.jsonl"])
    seen = 0

    def interrupt(*_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, tokenizer, tmp_path / "cache", 1, interrupt, skip_bad=True)
    assert [path.name for path in tmp_path.glob("cache/*/units/*.json")] == ["00000.json"]
    with pytest.raises(DataError, match=r"a\.jsonl:151, byte \d+: not JSON"):
        prepare(data, tokenizer, tmp_path / "cache", 1)


# Long documents


def test_a_document_in_parts_is_the_document(
    prepared: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts, as a reader gives them, become what the whole becomes: ids, split, place."""

    def in_parts(*arguments: Any, **options: Any) -> Iterator[DocumentBatch]:
        for batch in batches(*arguments, **options):
            for text, offset in zip(batch.texts, batch.offsets.tolist(), strict=True):
                # These words are tokens of their own wherever they stand: any space is a safe place.
                cut = text.find(" ", len(text) // 2)
                parts = [text[:cut], text[cut:]] if cut > 0 else [text]
                for number, part in enumerate(parts, 1):
                    length = len(part.encode())
                    more = number < len(parts)
                    yield DocumentBatch([part], np.array([offset]), np.array([length]), more)
                    offset += length

    (corpus / "c.txt").write_text("a line\n" + "        \n" * 3 + "and another\n")
    whole: Store = prepared([f"{corpus}/*.txt"], validation=0.3)
    monkeypatch.setattr(conversion, "batches", in_parts)
    parts: Store = prepared([f"{corpus}/*.txt"], validation=0.3, cache=corpus.parent / "parts")
    assert hashes(parts.path) == hashes(whole.path)


def test_a_long_document_between_short_ones(
    prepared: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SMALLEST", 1 << 30)
    long = "\n".join(sentences(LONG // 20))
    assert len(long) > 2 * LONG
    texts = ["the first", long, " \n " * (LONG // 2), "the last"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = prepared([f"{tmp_path}/a.jsonl"], validation=0.0)
    (shard,) = store.manifest.shards
    expected = [tokenizer.encode_batch([text])[0].tolist() for text in (texts[0], long, texts[3])]
    found = np.split(np.asarray(store.tokens(shard)), np.cumsum(store.lengths(shard))[:-1])
    assert [ids[:-1].tolist() for ids in found] == expected
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    starts = [0, len(lines[0]), sum(map(len, lines[:3]))]
    kept = [lines[0], lines[1], lines[3]]
    assert store.places(shard).tolist() == [
        [start, len(line) - 1] for start, line in zip(starts, kept, strict=True)
    ]
    (ledger,) = store.manifest.ledger
    assert (ledger.documents, ledger.skipped_empty) == (3, 1)


def test_a_long_document_that_turns_out_bad(prepared: Any, tmp_path: Path) -> None:
    long = "\n".join(sentences(LONG // 20)).encode()
    (tmp_path / "a.txt").write_bytes(long + b"\xff")
    (tmp_path / "b.txt").write_text("all is well")
    store = prepared([f"{tmp_path}/*.txt"], validation=0.0, sample_by="document", skip_bad=True)
    (bad,) = store.manifest.bad
    assert (Path(bad.file).name, bad.offset) == ("a.txt", len(long))
    (ledger,) = store.manifest.ledger
    assert (ledger.documents, ledger.skipped_bad) == (1, 1)


def test_a_document_that_the_format_cannot_count(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "LONGEST", 1000)
    (tmp_path / "a.txt").write_text("\n".join(sentences(LONG // 20)))
    with pytest.raises(DataError, match=r"a\.txt, byte 0: a document of [\d,]+ tokens") as refused:
        prepared([f"{tmp_path}/a.txt"], sample_by="document")
    assert "sample_by" in (refused.value.hint or "")


# The split


@given(st.lists(GOOD, max_size=20), st.floats(0, 0.999))
def test_a_text_in_parts_is_held_out_as_the_whole(texts: list[str], fraction: float) -> None:
    held_out = HeldOut(fraction)
    digest = held_out.digest()
    for text in texts:
        digest.update(text.encode())
    assert held_out.holds(digest) == held_out(["".join(texts)])[0]


def test_the_share_held_out() -> None:
    texts = [f"line {i}" for i in range(50_000)]
    for fraction in (0.0, 0.01, 0.5, 0.99):
        share = HeldOut(fraction)(texts).mean()
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(texts)) ** 0.5 + 1e-12
