"""A long document in parts is the whole one, wherever it is cut; and what is bad is told and left out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.config.schema import DataSection
from launcher.data import batches as batching
from launcher.data import records, sources
from launcher.data.corpus import list_corpora, reading_of
from launcher.data.sources import Document, DocumentBatch, Reading, batches
from launcher.data.units import cut, unit_bytes
from launcher.data.vocabulary import spread_texts
from launcher.errors import DataError
from tests.data.conftest import documents
from tests.data.test_sources import COMPRESSORS, TEXT, written


class AfterSpace:
    """Cuts after a space or a newline that a letter follows: not what a tokenizer would prove, but alike."""

    def last(self, text: str) -> int | None:
        places = [i for i in range(1, len(text)) if text[i - 1] in " \n" and text[i].isalpha()]
        return places[-1] if places else None


@contextmanager
def small(batch: int = 7, long: int = 16, uncut: int = 200) -> Iterator[None]:
    """The readers with sizes that a test can go beyond."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (batching, records, sources):
            for name, size in (("BATCH", batch), ("LONG", long), ("UNCUT", uncut), ("MOST", long)):
                if hasattr(module, name):
                    patch.setattr(module, name, size)
        yield


def joined(parts: list[Document]) -> list[Document]:
    """Documents whole, from their parts."""
    whole: list[Document] = []
    goes_on = False
    for part in parts:
        if part.bad:
            assert goes_on
            whole.pop()
        elif goes_on:
            first = whole.pop()
            whole.append(Document(first.text + part.text, first.offset, first.length + part.length))
        else:
            whole.append(Document(part.text, part.offset, part.length))
        goes_on = part.more
    assert not goes_on
    return whole


PIECES = ["\n", "\n\n", "\r\n", " ", "\t", "ab", "word ", "b\u00e9", "\U0001f600", "\n \n", "two words", "\r"]


@settings(max_examples=400, deadline=None)
@given(
    content=st.lists(st.sampled_from(PIECES), min_size=1, max_size=60),
    bounds=st.lists(st.integers(0, 200), max_size=4),
    sample_by=st.sampled_from(["line", "paragraph", "document"]),
)
@example(content=["two words", "\r\n"] * 6 + ["\r\n", "two words"], bounds=[], sample_by="paragraph")
@example(content=["word "] * 9 + ["\r", "\n", "ab"], bounds=[], sample_by="line")
def test_parts_together_are_the_document(
    tmp_path_factory: pytest.TempPathFactory, content: list[str], bounds: list[int], sample_by: str
) -> None:
    raw = "".join(content).encode()
    file = written(tmp_path_factory.mktemp("parts") / "a.txt", raw)
    reading = Reading(format="text", sample_by=sample_by)  # type: ignore[arg-type]
    whole = list(documents(file, reading))
    ends = sorted({0, len(raw), *(b for b in bounds if b < len(raw) and sample_by != "document")})
    with small(uncut=10_000):
        parts = [
            part
            for start, end in pairwise(ends)
            for part in documents(file, reading, start, end, cuts=AfterSpace())
        ]
    assert joined(parts) == whole


def test_only_what_is_long_comes_in_parts(tmp_path: Path) -> None:
    text = "one two three four five six\n" + "short\n" * 3
    file = written(tmp_path / "a.txt", text.encode())
    with small():
        found = [(batch.texts, batch.more) for batch in batches(file, TEXT, cuts=AfterSpace())]
    assert [more for _, more in found[:-1]].count(True) >= 1
    assert all(len(texts) == 1 for texts, more in found if more)
    assert found[-1][0][-1] == "short"
    assert (
        "".join(texts[0] for texts, _ in found[: [more for _, more in found].index(False) + 1]) == text[:27]
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_long_text_in_jsonl(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": text}) for text in ("short", "one two three four \u00e9t\u00e9 six", "last")]
    content = "\n".join(lines).encode()
    packed = gzip.compress(content) if suffix.endswith("gz") else content
    file = written(tmp_path / f"a{suffix}", packed)
    with small():
        parts = list(documents(file, Reading(), cuts=AfterSpace()))
    assert len(parts) > 3
    assert joined(parts) == list(documents(file, Reading()))


def test_a_document_without_a_place_to_cut(tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", b"first\n" + b"x" * 300 + b"\nlast\n")
    with small(), pytest.raises(DataError, match="no place") as raised:
        list(documents(file, TEXT, cuts=AfterSpace()))
    assert raised.value.offset == 6
    assert raised.value.hint
    bad: list[DataError] = []
    with small():
        found = list(documents(file, TEXT, cuts=AfterSpace(), on_bad=bad.append))
    assert [document.text for document in joined(found)] == ["first", "last"]
    assert len(bad) == 1


def test_a_line_of_jsonl_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 50)
    content = b'{"text": "a"}\n{"text": "' + b"x" * 100 + b'"}\n{"text": "b"}\n'
    file = written(tmp_path / "a.jsonl", content)
    bad: list[DataError] = []
    with small(batch=20):
        found = list(documents(file, Reading(), on_bad=bad.append))
    assert [document.text for document in found] == ["a", "b"]
    assert [(error.line, error.offset) for error in bad] == [(2, 14)]


# Bad input that is told and left out


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(
        st.sampled_from([b"\n", b"\n\n", b"ok", b" words", b"\xe9", b"\r\n", b"\xc3\xa9"]),
        min_size=1,
        max_size=60,
    ),
    sample_by=st.sampled_from(["line", "paragraph", "document"]),
    cut=st.booleans(),
)
def test_bad_bytes_are_told_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], sample_by: str, cut: bool
) -> None:
    raw = b"".join(content)
    file = written(tmp_path_factory.mktemp("bad") / "a.txt", raw)
    reading = Reading(format="text", sample_by=sample_by)  # type: ignore[arg-type]
    # The same records, all of them good.
    readable = written(tmp_path_factory.mktemp("good") / "a.txt", _repaired(raw))
    bad: list[DataError] = []
    with small(uncut=10_000):
        cuts = AfterSpace() if cut else None
        found = joined(list(documents(file, reading, cuts=cuts, on_bad=bad.append)))
    records_ = [(d.offset, raw[d.offset : d.offset + d.length]) for d in documents(readable, reading)]
    assert [d.offset for d in found] == [at for at, record in records_ if _is_utf8(record)]
    expected = [(at, record) for at, record in records_ if not _is_utf8(record)]
    assert len(bad) == len(expected)
    for error, (at, record) in zip(bad, expected, strict=True):
        assert error.offset == at + _first_bad(record)
        assert error.line == raw.count(b"\n", 0, error.offset) + 1


def _repaired(raw: bytes) -> bytes:
    out = bytearray(raw)
    position = 0
    while not _is_utf8(bytes(out[position:])):
        position += _first_bad(bytes(out[position:]))
        out[position] = ord("?")
    return bytes(out)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _first_bad(raw: bytes) -> int:
    with pytest.raises(UnicodeDecodeError) as raised:
        raw.decode()
    return raised.value.start


def test_bad_lines_of_jsonl_are_told(tmp_path: Path) -> None:
    lines = [
        '{"text": "a"}',
        "{not",
        '{"body": 1}',
        '{"text": 3}',
        "[]",
        '{"text": "\\ud800"}',
        '{"text": "b"}',
    ]
    content = "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n{"text": "c"}'
    file = written(tmp_path / "a.jsonl", content)
    bad: list[DataError] = []
    found = list(documents(file, Reading(), on_bad=bad.append))
    assert [document.text for document in found] == ["a", "b", "c"]
    assert [error.line for error in bad] == [2, 3, 4, 5, 6, 8]
    assert [content[document.offset :].startswith(b'{"text"') for document in found] == [True] * 3
    assert bad[0].offset == 14
    assert bad[-1].offset == content.index(b"\xe9")


@pytest.mark.parametrize("sample_by", ["line", "paragraph"])
def test_lines_are_told_in_any_range(tmp_path: Path, sample_by: str) -> None:
    content = b"fine\n \n\n" * 10 + b"\xff\n" + b"fine\n" * 10
    file = written(tmp_path / "a.txt", content)
    for start in (0, 1, 12, 70, 78, 79, 80):
        bad: list[DataError] = []
        reading = Reading(format="text", sample_by=sample_by)  # type: ignore[arg-type]
        list(documents(file, reading, start, None, on_bad=bad.append))
        assert [(error.line, error.offset) for error in bad] == [(31, 80)]


@pytest.mark.parametrize("ending", [b"\n", b" words\n" * 9])
def test_a_long_document_that_turns_out_bad_is_forgotten(tmp_path: Path, ending: bytes) -> None:
    file = written(tmp_path / "a.txt", b"first\n" + b"some words " * 9 + b"\xff" + ending + b"last\n")
    bad: list[DataError] = []
    with small():
        parts = list(documents(file, TEXT, cuts=AfterSpace(), on_bad=bad.append))
    assert [part.bad for part in parts].count(True) == 1
    assert len(parts) > 5
    whole = [document.text for document in joined(parts)]
    assert (whole[0], whole[-1]) == ("first", "last")
    assert not any("some" in text for text in whole)
    assert [error.offset for error in bad] == [6 + 99]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("long", [False, True])
def test_what_comes_before_the_damage_is_read(tmp_path: Path, suffix: str, long: bool) -> None:
    lines = [f"line {i} {i * i}" for i in range(100_000)]
    packed = COMPRESSORS[suffix]("\n".join(lines).encode())
    file = written(tmp_path / f"cut.txt{suffix}", packed[: len(packed) * 3 // 4])
    reading = Reading(format="text", sample_by="document" if long else "line")
    bad: list[DataError] = []
    with small(batch=1000, long=5000, uncut=100_000):
        found = list(documents(file, reading, cuts=AfterSpace() if long else None, on_bad=bad.append))
    assert len(bad) == 1
    assert "truncated" in bad[0].reason
    if long:
        assert len(found) > 10
        assert joined(found) == []
    else:
        assert len(found) > 10_000
        assert [document.text for document in found] == lines[: len(found)]


def test_a_file_that_is_gone_is_not_a_bad_record(tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", b"one")
    Path(file.path).unlink()
    bad: list[DataError] = []
    with pytest.raises(DataError, match="No such file"):
        list(documents(file, TEXT, on_bad=bad.append))
    assert not bad


FLAT = """
import re, sys
from launcher.data.sources import Reading, batches, list_files

class AfterNewline:
    def last(self, text):
        place = text.rfind("\\n", 0, len(text) - 1)
        return place + 1 if place >= 0 else None

(file,) = list_files([sys.argv[1]])
size = sum(int(b.lengths.sum()) for b in batches(file, Reading(sample_by=sys.argv[2]), cuts=AfterNewline()))
# Not ru_maxrss: that is at least what the process which started this one held.
print(size, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def test_memory_does_not_grow_with_the_document(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (10, 150):
        path = tmp_path / f"{megabytes}.txt"
        line = ("the same words \u00e9" * 5 + "\n").encode()
        with path.open("wb") as stream:
            for _ in range(megabytes):
                stream.write(line * (1_000_000 // len(line)))
        done = subprocess.run(
            [sys.executable, "-c", FLAT, str(path), "document"], capture_output=True, text=True, check=True
        )
        size, peak = map(int, done.stdout.split())
        assert size == path.stat().st_size
        peaks.append(peak)
        path.unlink()
    assert peaks[1] < peaks[0] * 1.2, peaks


def test_a_batch_tells_which_are_empty(tmp_path: Path) -> None:
    (batch,) = batches(written(tmp_path / "a.txt", b"a\n\n \t\nb"), TEXT)
    assert isinstance(batch, DocumentBatch)
    assert batch.empty.tolist() == [False, True, True, False]


def test_a_sample_of_a_long_document_takes_no_more_memory_than_a_part(tmp_path: Path) -> None:
    size = 128 << 20
    file = tmp_path / "long.txt"
    file.write_bytes(b"some words and a line\n" * (size // 22))
    data = DataSection.model_validate({"train": [str(file)], "sample_by": "document"})
    corpus = list_corpora(data)[0]
    units = cut([corpus], reading_of(data), unit_bytes([corpus]))
    tracemalloc.start()
    try:
        texts = list(spread_texts(units, reading_of(data), 1 << 18, 16, skip_bad=True))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(map(len, texts)) == 1 << 18
    assert peak < size // 2
