"""Streams against an enumeration of their tokens made here from the text, and against themselves when
they are stopped and gone on from anywhere."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from launcher.config.schema import DataSection, Source
from launcher.data.backends import REFERENCE
from launcher.data.batches import LONG
from launcher.data.cursor import WINDOW, Cursor, SourceText, window_blocks, window_of
from launcher.data.order import Turns, permute, round_keys
from launcher.data.stream import (
    UNIT_BYTES,
    VALIDATION_BLOCKS,
    StreamBlocks,
    StreamText,
    latest,
    list_stream,
    read_stream_text,
    read_validation,
    source_texts,
)
from launcher.data.tokenizers import Tokenizer
from launcher.errors import DataError, StoreError
from tests.data.conftest import sentences

SEED = 7
BLOCK = 8


def listed(data: DataSection, batch_size: int, tokenizer: Tokenizer) -> StreamText:
    return list_stream(data, batch_size, tokenizer, SEED, lambda _: None)


def texts_of(
    data: DataSection, tokenizer: Tokenizer, batch_size: int, unit_bytes: int = 400
) -> tuple[list[SourceText], list[SourceText]]:
    """The sources of `data`, with units small enough for a small corpus."""
    text = listed(data, batch_size, tokenizer)
    sources = [
        each.model_copy(update={"unit_bytes": unit_bytes, "streams": each.streams}) for each in text.sources
    ]
    return source_texts(text.model_copy(update={"sources": sources}), data, tokenizer, SEED)


def with_streams(source: SourceText, streams: int) -> SourceText:
    assert streams <= len(source.units)
    return replace(source, streams=streams)


@contextmanager
def reading(
    sources: Sequence[SourceText], data: DataSection, cursors: object = None
) -> Iterator[StreamBlocks]:
    with closing(StreamBlocks(sources, data, cursors)) as blocks:  # type: ignore[arg-type]
        yield blocks


def is_held_out(line: str, fraction: float) -> bool:
    return xxhash.xxh3_64_intdigest(line.encode(), seed=int.from_bytes(b"launcher", "big")) < fraction * 2**64


def lines_of(source: SourceText, unit: int) -> Iterator[str]:
    """The lines that start in a unit's bytes, split here."""
    for piece in source.units[unit].pieces:
        content = Path(piece.file.path).read_bytes()
        if piece.file.compression:
            content = gzip.decompress(content)
        offset = 0
        for line in content.splitlines(keepends=True):
            if piece.start <= offset and (piece.end is None or offset < piece.end):
                yield line.decode().rstrip("\n")
            offset += len(line)


def tokens_of(source: SourceText, stream: int, fraction: float = 0.0) -> Iterator[int]:
    """Every token of a stream, epoch after epoch."""
    epoch, tokenizer = 0, source.tokenizer.with_backend(REFERENCE)
    while True:
        keys = round_keys(SEED, source.number, epoch)
        shuffled = [permute(place, len(source.units), keys) for place in range(len(source.units))]
        for unit in shuffled[stream :: source.streams]:
            for line in lines_of(source, unit):
                if line.strip() and not is_held_out(line, fraction):
                    yield from tokenizer.encode_batch([line])[0].tolist()
                    yield tokenizer.end_of_text_id
        epoch += 1


def windows_of(source: SourceText, stream: int, count: int, fraction: float = 0.0) -> list[list[list[int]]]:
    """The blocks of a stream's first windows, each window's sorted."""
    tokens = tokens_of(source, stream, fraction)
    return [
        sorted(
            list(islice(tokens, source.block_size)) for _ in range(window_blocks(stream, source.streams, w))
        )
        for w in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of text, the second one compressed, with empty lines in between."""
    made = tmp_path_factory.mktemp("text")
    (made / "a.txt").write_text("\n".join(sentences(300, 1)) + "\n\n")
    (made / "b.txt").write_text("\n \n".join(sentences(200, 2)))
    for part in range(4):
        with gzip.open(made / f"c{part}.txt.gz", "wt") as stream:
            stream.write("\n".join(sentences(40, 3 + part)) + "\n")
    return made


def plain(folder: Path, **keys: object) -> DataSection:
    files = [str(folder / "*.txt")]
    return DataSection.model_validate({"train": files, "validation": 0.0, "block_size": BLOCK} | keys)


@pytest.mark.parametrize(("streams", "windows"), [(1, 24), (3, 10), (8, 6)])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_each_window_holds_the_next_blocks_of_its_stream(
    folder: Path, tokenizer: Tokenizer, streams: int, windows: int, fraction: float
) -> None:
    data = plain(folder, validation=fraction)
    source = with_streams(texts_of(data, tokenizer, 8)[0][0], streams)
    epoch = sum(len(list(lines_of(source, unit))) for unit in range(len(source.units)))
    assert epoch == 300 + 1 + 200 + 199, "the enumeration itself has lost a line"
    samples = windows * WINDOW * streams
    with reading([source], data) as blocks:
        rows = [blocks.read(sample).tolist() for sample in range(samples)]
        assert min(cursor.epoch for cursor in blocks.cursors()["text"]) >= 1, "the text was to be read twice"
    for stream in range(streams):
        expected = windows_of(source, stream, windows, fraction)
        found: list[list[list[int]]] = [[] for _ in range(windows + 1)]
        for block, row in enumerate(rows[stream::streams]):
            found[window_of(stream, streams, block)[0]].append(row)
        assert [sorted(window) for window in found[:windows]] == expected
        assert found[1] != expected[1], "a window is shuffled"


@given(streams=st.integers(1, 64), data=st.data())
def test_windows_part_a_stream_s_blocks(streams: int, data: st.DataObject) -> None:
    stream = data.draw(st.integers(0, streams - 1))
    places = [window_of(stream, streams, block) for block in range(4 * WINDOW)]
    expected = [(w, i) for w in range(5) for i in range(window_blocks(stream, streams, w))]
    assert places == expected[: 4 * WINDOW]


Segment = tuple[int, int, int]
"""Ranks, steps they take, and samples to a step."""


def deal(blocks: StreamBlocks, samples: Sequence[int], ranks: int) -> list[list[int]]:
    """A step's samples over ranks, of neighbouring streams together; some ranks may have one more."""
    shares = np.array_split(np.array(sorted(samples, key=blocks.stream)), ranks)
    return [share.tolist() for share in shares]


@settings(max_examples=25, deadline=None)
@given(
    segments=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 60), st.sampled_from([4, 12, 24])), min_size=1, max_size=4
    ),
    streams=st.tuples(st.sampled_from([1, 2, 4, 12]), st.sampled_from([1, 3, 4])),
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_stopped_anywhere_and_gone_on_by_any_world_nothing_is_lost_or_repeated(
    folder: Path,
    tokenizer: Tokenizer,
    segments: list[Segment],
    streams: tuple[int, int],
    weights: tuple[int, int],
) -> None:
    data = mixture(folder, weights)
    sources = [with_streams(s, n) for s, n in zip(texts_of(data, tokenizer, 12)[0], streams, strict=True)]
    rows: dict[int, list[int]] = {}
    windows = {name: [0] * source.streams for name, source in zip(("plain", "packed"), sources, strict=True)}
    turns = Turns(weights)
    cursors, at = None, 0
    for ranks, steps, batch_size in segments:
        crew = [StreamBlocks(sources, data, cursors) for _ in range(ranks)]
        for _ in range(steps):
            for sample in range(at, at + batch_size):
                source, nth = turns.turn(sample)
                block, stream = divmod(nth, streams[source])
                windows[list(windows)[source]][stream] = window_of(stream, streams[source], block)[0]
            shares = deal(crew[0], range(at, at + batch_size), ranks)
            for blocks, share in zip(crew, shares, strict=True):
                rows |= {sample: blocks.read(sample).tolist() for sample in share}
            at += batch_size
        cursors = json.loads(json.dumps(latest([blocks.cursors() for blocks in crew])))
        for blocks in crew:
            blocks.close()
        begins = {name: [cursor[0] for cursor in of_streams] for name, of_streams in cursors.items()}
        assert begins == windows, "no more than the window in hand is read again"
    with reading(sources, data) as whole:
        assert rows == {sample: whole.read(sample).tolist() for sample in range(at)}


def mixture(folder: Path, weights: tuple[int, int], **keys: object) -> DataSection:
    train = [
        Source(name="plain", files=[str(folder / "*.txt")], weight=weights[0]),
        Source(name="packed", files=[str(folder / "*.gz")], weight=weights[1]),
    ]
    return DataSection.model_validate({"train": train, "validation": 0.0, "block_size": BLOCK} | keys)


def test_sources_take_turns_by_weight_and_each_is_read_in_its_own_order(
    folder: Path, tokenizer: Tokenizer
) -> None:
    data = mixture(folder, (3, 1))
    sources, _ = texts_of(data, tokenizer, 8)
    sources = [with_streams(sources[0], 2), with_streams(sources[1], 4)]
    rows: list[list[list[list[int]]]] = [[[] for _ in range(source.streams)] for source in sources]
    with reading(sources, data) as blocks:
        for sample in range(2048):
            source, stream = blocks.stream(sample)
            rows[source][stream].append(blocks.read(sample).tolist())
    assert [sum(map(len, each)) for each in rows] == [1536, 512]
    for text, of_streams in zip(sources, rows, strict=True):
        for stream, found in enumerate(of_streams):
            first = window_blocks(stream, text.streams, 0)
            assert sorted(found[:first]) == windows_of(text, stream, 1)[0]


def test_what_a_cursor_says_is_where_a_new_reader_begins(folder: Path, tokenizer: Tokenizer) -> None:
    data = plain(folder)
    source = with_streams(texts_of(data, tokenizer, 8)[0][0], 2)
    with reading([source], data) as blocks:
        rows = [blocks.read(sample).tolist() for sample in range(800)]
        cursors = blocks.cursors()
    assert all(cursor.window == 6 and cursor.token for cursor in cursors["text"])
    with reading([source], data, cursors) as blocks:
        assert [blocks.read(sample).tolist() for sample in range(770, 800)] == rows[770:]
    with reading([source], data, cursors) as blocks, pytest.raises(ValueError, match="window 0 of a stream"):
        blocks.read(0)


def test_a_step_takes_as_many_blocks_of_each_stream_and_no_source_has_more_than_its_share(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for name, units in (("big", 80), ("small", 3)):
        (tmp_path / f"{name}.txt").write_bytes(b"seven wizards brew tea\n" * (units * UNIT_BYTES // 23))

    def streams(batch_size: int, *weights: float) -> list[int]:
        names = ("big", "small")
        train = [
            Source(name=n, files=[str(tmp_path / f"{n}.txt")], weight=w)
            for n, w in zip(names, weights, strict=False)
        ]
        data = DataSection.model_validate({"train": train, "validation": 0.0})
        return [source.streams for source in listed(data, batch_size, tokenizer).sources]

    assert streams(512, 1) == [64]
    assert streams(48, 1) == [48]
    assert streams(100, 1) == [50]
    assert streams(509, 1) == [1]
    assert streams(512, 3, 1) == [32, 2], "48 of 64, and a small source's 3 units"
    assert streams(8, 99, 1) == [4, 1]


def test_held_out_documents_are_those_that_training_leaves_out(folder: Path, tokenizer: Tokenizer) -> None:
    data = plain(folder, validation=0.3)
    sources, files = texts_of(data, tokenizer, 8)
    assert not files
    lines = [
        line for unit in range(len(sources[0].units)) for line in lines_of(sources[0], unit) if line.strip()
    ]
    held = [line for line in lines if is_held_out(line, 0.3)]
    assert 100 < len(held) < 200
    found = read_validation(sources, [])
    assert len(found) == VALIDATION_BLOCKS < len(joined(held, tokenizer)) // BLOCK
    *documents, _ = tokenizer.decode(np.concatenate(found)).split(tokenizer.end_of_text)
    assert len(documents) > 50
    assert len(documents) == len(set(documents) & set(held))
    assert documents != held[: len(documents)], "they come from all over the text"


def test_validation_files_are_read_whole_and_not_trained_on(folder: Path, tokenizer: Tokenizer) -> None:
    data = plain(folder, validation=[str(folder / "b.txt")])
    training, validation = texts_of(data, tokenizer, 8)
    assert files_of(training[0]) == {str(folder / "a.txt")}
    assert np.concatenate(read_validation(training, validation)).tolist() == joined(
        sentences(200, 2), tokenizer
    )


def joined(documents: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens of as many whole blocks as the documents fill."""
    end = tokenizer.end_of_text_id
    ids = [each for line in documents for each in [*tokenizer.encode_batch([line])[0].tolist(), end]]
    return ids[: len(ids) // BLOCK * BLOCK]


def files_of(source: SourceText) -> set[str]:
    return {piece.file.path for unit in source.units for piece in unit.pieces}


def test_a_file_that_changed_is_named_when_it_is_read_and_when_a_run_goes_on(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(sentences(300)))
    data = plain(tmp_path)
    sources, _ = texts_of(data, tokenizer, 8)
    before = listed(data, 8, tokenizer)
    assert before.change(listed(data, 4, tokenizer)) is None
    with reading(sources, data) as blocks:
        blocks.read(0)
        os.utime(file, (1, 1))
        with pytest.raises(DataError, match=r"a\.txt: has changed since the run began"):
            deque(map(blocks.read, range(5000)), maxlen=0)
    assert "a.txt of source 'text' is not as it was" in (before.change(listed(data, 8, tokenizer)) or "")
    (tmp_path / "0.txt").write_text("new")
    assert "0.txt of source 'text' is new" in (before.change(listed(data, 8, tokenizer)) or "")
    file.unlink()
    assert before.change(listed(data, 8, tokenizer)) is not None


def test_a_file_without_ranges_is_one_unit_as_read_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "the quick brown fox\n" * 40_000)
    data = DataSection(train=[f"zip://a.txt::{tmp_path / 'a.zip'}"], validation=0.0, block_size=16)
    sources, _ = source_texts(listed(data, 8, tokenizer), data, tokenizer, SEED)
    assert [len(source.units) for source in sources] == [1]


def test_another_tokenizer_is_a_change(folder: Path, tokenizer: Tokenizer) -> None:
    text = listed(plain(folder), 8, tokenizer)
    assert text.change(text.model_copy(update={"tokenizer": "other"})) == "the tokenizer is another one"


def test_bad_text_is_raised_where_the_sample_is_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(sentences(300)))
    data = plain(tmp_path)
    sources, _ = texts_of(data, tokenizer, 8)
    times = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with reading(sources, data) as blocks, pytest.raises(DataError, match=r"a\.txt:300.*not UTF-8"):
        deque(map(blocks.read, range(5000)), maxlen=0)


def long_and_short() -> dict[str, str]:
    """A short and a long document that a split in half does not hold out, and two that it does."""
    texts = {}
    for kind, size, held in (
        ("short", 2, False),
        ("short", 2, True),
        ("long", 900, True),
        ("long", 900, False),
    ):
        body = "\n".join(sentences(250, 9) * size)
        numbered = (f"{kind} {number}\n{body}" for number in count())
        texts[f"{kind}-{held}.txt"] = next(each for each in numbered if is_held_out(each, 0.5) == held)
    return texts


@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("form", ["document", "jsonl"])
def test_a_long_document_is_read_in_parts_with_the_ids_of_the_whole_and_is_on_one_side_of_the_split(
    tmp_path: Path, tokenizer: Tokenizer, form: str, fraction: float
) -> None:
    texts = long_and_short()
    places: dict[str, tuple[str, int]] = {}  # of a document: its file, and where its record begins there
    with (tmp_path / "all.jsonl").open("wb") as stream:
        for name, text in texts.items():
            places[name] = ("all.jsonl", stream.tell()) if form == "jsonl" else (name, 0)
            (tmp_path / name).write_text(text)
            stream.write(json.dumps({"text": text}).encode() + b"\n")
    keys = {"sample_by": "document", "block_size": 1024, "validation": fraction}
    files = "*.jsonl" if form == "jsonl" else "*.txt"
    data = DataSection.model_validate({"train": [str(tmp_path / files)], **keys})
    (source,), _ = texts_of(data, tokenizer, 8, unit_bytes=3 * LONG)
    source = with_streams(source, 1)

    def encoded(names: Iterable[str]) -> NDArray[np.int32]:
        whole = source.tokenizer.encode_joined([texts[name] for name in names])[0]
        return whole[: len(whole) // 1024 * 1024]

    def shuffled(epoch: int) -> Iterator[str]:
        for piece in chain.from_iterable(unit.pieces for unit in source.shuffled_units(epoch)):
            for name, (file, offset) in places.items():
                inside = piece.start <= offset and (piece.end is None or offset < piece.end)
                if file == Path(piece.file.path).name and inside:
                    yield name

    assert sorted(shuffled(0)) == sorted(texts)
    kept = [name for epoch in range(2) for name in shuffled(epoch) if not is_held_out(texts[name], fraction)]
    expected = encoded(kept)
    inside: dict[int, Mapping[str, list[Cursor]]] = {}
    with reading([source], data) as blocks:
        for window in range(len(expected) // (WINDOW * 1024)):
            rows = sorted(blocks.read(window * WINDOW + place).tolist() for place in range(WINDOW))
            begin = window * WINDOW * 1024
            assert rows == sorted(expected[begin : begin + WINDOW * 1024].reshape(WINDOW, 1024).tolist())
            cursors = blocks.cursors()
            if cursors["text"][0].document:
                inside[window] = cursors
        assert len(inside) > 5, "cursors were to stand inside a long document"
    window = list(inside)[-3]
    with reading([source], data, inside[window]) as resumed:
        rows = sorted(resumed.read(window * WINDOW + place).tolist() for place in range(WINDOW))
        begin = window * WINDOW * 1024
        assert rows == sorted(expected[begin : begin + WINDOW * 1024].reshape(WINDOW, 1024).tolist())
    held_out = [name for name in shuffled(0) if is_held_out(texts[name], fraction)]
    found = np.array(read_validation([source], []), dtype=np.int32).ravel()
    assert found.tolist() == encoded(held_out)[: VALIDATION_BLOCKS * 1024].tolist()


def test_a_source_with_nothing_to_train_on_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="source 'text' has no document to train on"):
        listed(plain(tmp_path), 8, tokenizer)


def test_an_empty_file_is_refused_before_it_begins(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(300)))
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match=r"b\.txt, byte 0: the file is empty"):
        listed(plain(tmp_path), 8, tokenizer)


def test_what_a_run_reads_is_written_down_and_read_again(folder: Path, tokenizer: Tokenizer) -> None:
    text = listed(plain(folder), 8, tokenizer)
    file = folder / "stream.json"
    file.write_text(text.model_dump_json())
    assert read_stream_text(file) == text
    file.write_text(text.model_copy(update={"window": 1}).model_dump_json())
    with pytest.raises(StoreError, match="another version"):
        read_stream_text(file)
    file.write_text("{}")
    with pytest.raises(StoreError, match="is damaged"):
        read_stream_text(file)
    file.unlink()
    with pytest.raises(StoreError, match="is missing"):
        read_stream_text(file)


READS = """
import resource, sys
from pathlib import Path
from launcher.config.schema import DataSection
from launcher.data.stream import StreamBlocks, list_stream, source_texts
from launcher.data.tokenizers import load_tokenizer
folder, samples = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = load_tokenizer(str(folder / "tokenizer"))
data = DataSection(train=[str(folder / sys.argv[3])], validation=0.01, block_size=64)
sources, _ = source_texts(list_stream(data, 64, tokenizer, 1, print), data, tokenizer, 1)
blocks = StreamBlocks(sources, data, None)
for sample in range(samples):
    blocks.read(sample)
blocks.close()
print(sources[0].streams, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_grows_neither_with_the_text_nor_with_what_was_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    million = "\n".join(sentences(20_000)).encode()[:1_000_000] + b"\n"
    for megabytes in (20, 200):
        with (tmp_path / f"{megabytes}.txt").open("wb") as stream:
            for _ in range(megabytes):
                stream.write(million)

    def peak(name: str, samples: int) -> int:
        command = [sys.executable, "-c", READS, str(tmp_path), str(samples), name]
        streams, kilobytes = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.split()
        assert streams == "64"
        return int(kilobytes)

    small, large, longer = peak("20.txt", 8192), peak("200.txt", 8192), peak("20.txt", 24_576)
    assert max(small, large, longer) < 1.1 * min(small, large, longer)
