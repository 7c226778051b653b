"""Files as documents, the same under any compression and any cut; and bad input with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.sources import (
    Document,
    Reading,
    SourceFile,
    changed,
    file_format,
    list_files,
    splittable,
)
from launcher.errors import DataError
from tests.data.conftest import documents


def _zstd(content: bytes) -> bytes:
    """Two frames with checksums, as `zstd` and `cat` make them."""
    half = len(content) // 2
    frames = zstandard.ZstdCompressor(write_checksum=True)
    return frames.compress(content[:half]) + frames.compress(content[half:])


COMPRESSORS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstd,
    ".zstd": _zstd,
}
TEXT = Reading(format="text")


def one(path: Path) -> SourceFile:
    (file,) = list_files([str(path)])
    return file


def written(path: Path, content: bytes) -> SourceFile:
    path.write_bytes(content)
    return one(path)


def texts(file: SourceFile, reading: Reading) -> list[str]:
    return [document.text for document in documents(file, reading) if not document.empty]


# Listing


def test_globs_of_any_depth_sorted_and_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    listed = list_files([f"{tmp_path}/**/*.txt", str(tmp_path / "a.txt"), f"{tmp_path}/deep/**"])
    names = [str(Path(file.path).relative_to(tmp_path)) for file in listed]
    assert names == ["a.txt", "b.txt", "deep/d.md", "deep/er/c.txt"]
    assert [file.size for file in listed] == [len(name) for name in names]


def test_a_dot_that_the_pattern_spells_is_matched(tmp_path: Path) -> None:
    for name in (".hidden.txt", ".other.txt", ".d/a.txt", ".d/.b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    matched = {
        pattern: [
            str(Path(file.path).relative_to(tmp_path)) for file in list_files([f"{tmp_path}/{pattern}"])
        ]
        for pattern in (".hid*.txt", ".d*/*.txt", ".*.txt")
    }
    assert matched == {
        ".hid*.txt": [".hidden.txt"],
        ".d*/*.txt": [".d/a.txt"],
        ".*.txt": [".hidden.txt", ".other.txt"],
    }


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).touch()
    with pytest.raises(DataError, match=r"caf\\udce9\.txt': the name is not UTF-8"):
        list_files([f"{tmp_path}/*.txt"])


def test_a_relative_path_is_listed_as_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert list_files(["a.txt"]) == list_files([str(tmp_path / "a.txt")])


def test_a_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").touch()
    assert one(tmp_path / "a[1].txt").path.endswith("a[1].txt")


@pytest.mark.parametrize(("pattern", "named"), [("none/*.txt", "none"), ("missing.txt", "missing")])
def test_a_pattern_without_a_file_is_named(tmp_path: Path, pattern: str, named: str) -> None:
    with pytest.raises(DataError, match=named) as refused:
        list_files([str(tmp_path / pattern)])
    assert refused.value.hint


def test_a_folder_says_how_to_take_all_of_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder") as refused:
        list_files([str(tmp_path)])
    assert f"{tmp_path}/**" in str(refused.value.hint)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", b"one")
    assert not changed(file)
    os.utime(file.path, ns=(1, 1))
    assert changed(file)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.JSON.gz", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("a.txt", "text"),
        ("a", "text"),
        ("a.jsonl.txt", "text"),
        ("a.PARQUET", "parquet"),
        ("data-00000-of-00001.arrow", "arrow"),
        ("a.csv.txt", "text"),
    ],
)
def test_the_format_goes_by_the_name(name: str, kind: str) -> None:
    assert file_format(SourceFile(f"/x/{name}", 0, ""), Reading()) == kind
    assert file_format(SourceFile(f"/x/{name}", 0, ""), TEXT) == "text"


# Documents


def test_lines_end_at_newline_only(tmp_path: Path) -> None:
    content = "one\r\ntwo\rstill two\u2028\x0b\n\n  \nlast\r".encode()
    found = list(documents(written(tmp_path / "a.txt", content), TEXT))
    assert [d.text for d in found] == ["one", "two\rstill two\u2028\x0b", "", "  ", "last\r"]
    assert [content[d.offset : d.offset + d.length].decode() for d in found] == [d.text for d in found]
    assert [d.empty for d in found] == [False, False, True, True, False]


def test_a_byte_order_mark_is_text_and_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    (text,) = list_files([str(tmp_path / "a.txt")])
    assert [each.text for each in documents(text, Reading())] == ["\ufeffone", "two"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    (lines,) = list_files([str(tmp_path / "a.jsonl")])
    with pytest.raises(DataError, match="byte-order mark") as refused:
        list(documents(lines, Reading()))
    assert (refused.value.line, refused.value.offset) == (1, 0)
    bad: list[DataError] = []
    assert [each.text for each in documents(lines, Reading(), on_bad=bad.append)] == ["two"]


def test_paragraphs_lie_between_blank_lines(tmp_path: Path) -> None:
    content = b"\n \none\r\nand one\r\n\r\n\t\ntwo\n\n\nthree\n"
    reading = Reading(format="text", sample_by="paragraph")
    found = list(documents(written(tmp_path / "a.txt", content), reading))
    assert [d.text for d in found] == ["one\r\nand one", "two", "three"]
    assert [content[d.offset : d.offset + d.length].decode() for d in found] == [d.text for d in found]


def test_a_document_is_the_whole_file(tmp_path: Path) -> None:
    reading = Reading(format="text", sample_by="document")
    file = written(tmp_path / "a.txt", b"one\n\ntwo\n")
    assert list(documents(file, reading)) == [Document("one\n\ntwo\n", 0, 9)]
    assert not splittable(file, reading)
    assert splittable(written(tmp_path / "a.jsonl", b""), Reading(sample_by="document"))


def test_a_number_of_any_length_is_json(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", b'{"id": ' + b"1" * 5000 + b', "text": "tea"}\n')
    assert texts(file, Reading()) == ["tea"]


def test_jsonl_gives_the_field_and_the_place_of_the_line(tmp_path: Path) -> None:
    lines = [
        json.dumps({"id": 1, "body": "na\u00efve\nline"}),
        "",
        json.dumps({"body": ""}),
        '{"body": "\u00e9"}',
    ]
    content = "\n".join(lines).encode()
    found = list(documents(written(tmp_path / "a.jsonl", content), Reading(text_field="body")))
    assert [d.text for d in found] == ["na\u00efve\nline", "", "", "\u00e9"]
    assert [content[d.offset : d.offset + d.length].decode() for d in found] == lines


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_a_compressed_file_is_its_content(tmp_path: Path, suffix: str, sample_by: str) -> None:
    content = "".join(f"line {i} \u20ac\n" + "\n" * (i % 5 == 0) for i in range(40_000)).encode()
    reading = Reading(format="text", sample_by=sample_by)  # type: ignore[arg-type]
    plain = written(tmp_path / "a.txt", content)
    packed = written(tmp_path / f"a.txt{suffix}", COMPRESSORS[suffix](content))
    assert list(documents(packed, reading)) == list(documents(plain, reading))
    assert not splittable(packed, reading)


@settings(max_examples=150, deadline=None)
@given(
    content=st.lists(
        st.sampled_from(["\n", "\n\n", "\r\n", " ", "\t", "a", "bc", "\u00e9", "\n \n"]),
        min_size=1,
        max_size=60,
    ),
    cuts=st.lists(st.integers(0, 130), max_size=6),
    sample_by=st.sampled_from(["line", "paragraph"]),
)
def test_ranges_together_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: list[str], cuts: list[int], sample_by: str
) -> None:
    raw = "".join(content).encode()
    file = written(tmp_path_factory.mktemp("ranges") / "a.txt", raw)
    reading = Reading(format="text", sample_by=sample_by)  # type: ignore[arg-type]
    bounds = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    apart = [d for start, end in pairwise(bounds) for d in documents(file, reading, start, end)]
    assert apart == list(documents(file, reading))


@settings(max_examples=60, deadline=None)
@given(
    bodies=st.lists(st.text(max_size=8), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_ranges_of_jsonl_together_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[str], cuts: list[int]
) -> None:
    raw = "".join(json.dumps({"text": body}) + "\n" for body in bodies).encode()
    file = written(tmp_path_factory.mktemp("ranges") / "a.jsonl", raw)
    bounds = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    apart = [d.text for start, end in pairwise(bounds) for d in documents(file, Reading(), start, end)]
    assert apart == bodies


def test_a_blank_line_longer_than_the_look_back(tmp_path: Path) -> None:
    reading = Reading(format="text", sample_by="paragraph")
    raw = b"one\n" + b" " * 10_000 + b"\ntwo\n" + b"x" + b" " * 10_000 + b"\nthree"
    file = written(tmp_path / "a.txt", raw)
    whole = list(documents(file, reading))
    assert [d.text[:3] for d in whole] == ["one", "two"]
    for cut in (9_000, 10_004, 10_005, 19_000, len(raw) - 5):
        assert [*documents(file, reading, 0, cut), *documents(file, reading, cut, len(raw))] == whole


# Bad input


def failure(file: SourceFile, reading: Reading = Reading(), start: int = 0) -> DataError:  # noqa: B008
    with pytest.raises(DataError) as raised:
        list(documents(file, reading, start, None))
    assert raised.value.file == file.path
    assert raised.value.hint
    return raised.value


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz"])
def test_text_that_is_not_utf8(tmp_path: Path, suffix: str) -> None:
    good = b'{"text": "good"}\n' * 3
    content = good + b'{"text": "caf\xe9"}\n'
    packed = gzip.compress(content) if suffix.endswith("gz") else content
    error = failure(written(tmp_path / f"a{suffix}", packed))
    assert (error.line, error.offset) == (4, content.index(b"\xe9"))
    assert "0xe9" in error.reason


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_file_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    content = os.urandom(40_000).hex().encode()
    packed = COMPRESSORS[suffix](content)
    for kept in (len(packed) - 1, len(packed) * 3 // 4, 30, 0):
        error = failure(written(tmp_path / f"cut.txt{suffix}", packed[:kept]))
        assert "truncated" in error.reason
        assert error.offset is not None
        assert 0 <= error.offset <= len(content)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_damaged_file(tmp_path: Path, suffix: str) -> None:
    packed = bytearray(COMPRESSORS[suffix](os.urandom(40_000).hex().encode()))
    packed[len(packed) // 3] ^= 0x10
    assert "damaged" in failure(written(tmp_path / f"bad.txt{suffix}", bytes(packed))).reason


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_what_follows_a_whole_frame_is_not_lost(tmp_path: Path, suffix: str) -> None:
    first, second = COMPRESSORS[suffix](b"first\n" * 9000), COMPRESSORS[suffix](b"second\n" * 9000)
    for after in (bytes([second[0] ^ 1]) + second[1:], b"junk", second[:-1]):
        error = failure(written(tmp_path / f"a.txt{suffix}", first + after))
        assert "damaged" in error.reason or "truncated" in error.reason
        assert error.offset in (9000 * 6, 9000 * 6 + 9000 * 7)
    both = written(tmp_path / f"b.txt{suffix}", first + second)
    assert len(texts(both, TEXT)) == 18_000


def test_the_padding_of_xz_is_no_damage(tmp_path: Path) -> None:
    packed = lzma.compress(b"line\n" * 9)
    for padding in (4, 1 << 19):
        file = written(tmp_path / "a.txt.xz", packed + bytes(padding) + packed + bytes(padding))
        assert len(texts(file, TEXT)) == 18
        failure(written(tmp_path / "b.txt.xz", packed + bytes(padding + 1)))


def test_a_window_as_large_as_zstd_makes_them(tmp_path: Path) -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    packed = bytearray(stream.compress(b"line\n" * 9) + stream.flush())
    packed[5] = (
        28 - 10
    ) << 3  # the window's size, after the magic number and a byte of flags: `zstd --long=28`
    assert len(texts(written(tmp_path / "a.txt.zst", bytes(packed)), TEXT)) == 9


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 1}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "array, not an object"),
        ("3.5", "number, not an object"),
        ('"x"', "string, not an object"),
        ('{"body": "x", "id": 1}', "no field 'text' among 'body', 'id'"),
        ("{}", "no field 'text' among none"),
        ('{"text": null}', "type null"),
        ('{"text": ["x"]}', "type array"),
        ('{"text": true}', "type boolean"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_line_of_jsonl_without_text(tmp_path: Path, line: str, reason: str) -> None:
    good = '{"text": "good"}\n' * 5
    file = written(tmp_path / "a.jsonl", f"{good}{line}\n{good}".encode())
    for start in (0, 30, len(good)):
        error = failure(file, start=start)
        assert error.line == 6
        assert reason in error.reason


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", b"one")
    Path(file.path).unlink()
    with pytest.raises(DataError, match="No such file"):
        list(documents(file, TEXT))
