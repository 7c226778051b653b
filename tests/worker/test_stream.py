"""Which rank takes which samples of a step of streams."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.schema import DataSection, Source
from launcher.data.phases import Phase, Phases, Skip
from launcher.data.stream import UNIT_BYTES, list_stream, source_texts
from launcher.data.tokenizers import train_tokenizer
from launcher.plan.batch import Batch
from launcher.worker.dataset import RankBatches
from launcher.worker.stream import StreamRows
from tests.conftest import sentences

SMALL = st.integers(1, 4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> StreamRows:
    """Two sources, of 8 and of 3 streams, three samples to one."""
    folder = tmp_path_factory.mktemp("text")
    for name, units in (("a", 9), ("b", 3)):
        (folder / f"{name}.txt").write_text("seven wizards brew tea\n" * (units * UNIT_BYTES // 23))
    train = [
        Source(name="a", files=[str(folder / "a.txt")], weight=3),
        Source(name="b", files=[str(folder / "b.txt")], weight=1),
    ]
    data = DataSection(train=train, validation=0.0, block_size=16)
    tokenizer = train_tokenizer(sentences(100), 300)
    text = list_stream(data, 24, tokenizer, 1, lambda _: None)
    sources, _ = source_texts(text, data, tokenizer, 1)
    assert [source.streams for source in sources] == [8, 3]
    return StreamRows(sources, data, text.fingerprint, 24 * 100)


def phases_of(rows: StreamRows, batch: Batch) -> Phases:
    return rows.phases([Phase(0, 0, batch.batch_size, Skip())])


@settings(max_examples=30, deadline=None)
@given(micro=SMALL, accumulation=SMALL, world=SMALL, start=st.integers(0, 50))
def test_each_step_s_samples_are_the_same_however_they_are_dealt(
    rows: StreamRows, micro: int, accumulation: int, world: int, start: int
) -> None:
    batch = Batch(micro * accumulation * world, micro, accumulation, world)
    phases = phases_of(rows, batch)
    crew = [RankBatches(phases, batch, r, rows.deal, start=start, steps=start + 3) for r in range(world)]
    per_rank = [[sample for turn in batches for sample in turn] for batches in crew]
    size = batch.batch_size
    assert sorted(chain.from_iterable(per_rank)) == list(range(start * size, (start + 3) * size))
    assert all(len(turn) == micro for batches in crew for turn in batches)
    for mine in per_rank:
        by_stream: dict[tuple[int, int], list[int]] = {}
        for sample in mine:
            by_stream.setdefault(rows._blocks.stream(sample), []).append(sample)
        assert all(samples == sorted(samples) for samples in by_stream.values()), "streams run forwards"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_few_streams_are_read_by_two_ranks(rows: StreamRows, world: int) -> None:
    batch = Batch(24, 1, 24 // world, world)
    read = [
        {
            rows._blocks.stream(sample)
            for turn in RankBatches(phases_of(rows, batch), batch, rank, rows.deal, start=0, steps=50)
            for sample in turn
        }
        for rank in range(world)
    ]
    assert len(set.union(*read)) == 11
    assert sum(map(len, read)) <= 11 + 2 * (world - 1)


def test_the_certificate_is_of_the_text_and_the_samples(rows: StreamRows) -> None:
    here, there = np.arange(24, 48), np.arange(48, 72)
    assert rows.certificate([here, there]) == rows.certificate([np.arange(24, 72)])
    assert rows.certificate([here]) != rows.certificate([there])
    other = StreamRows(rows._sources, rows._data, "another text", 10)
    assert other.certificate([here]) != rows.certificate([here])
