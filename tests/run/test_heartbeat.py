from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.remote import CONNECT_SECONDS, LONGEST_DELAY, READ_SECONDS, READING_SECONDS
from launcher.run.heartbeat import (
    BYTES,
    FROZEN_SECONDS,
    LIMIT_VARIABLE,
    LIMITS,
    Beat,
    Phase,
    Watch,
    limits,
    lowered,
    read_beat,
    training_limit,
    write_beat,
)

BEAT = Beat(0, "node7", 4711, "training", 12, 1.7e9, 1.7e9 + 1, 0.5, 120.0, None, False, 0.25, None)


def beats(*each: Beat, alive: float = 0.0) -> dict[int, Beat]:
    """Rank to beat, written at `alive`."""
    return {rank: replace(beat, rank=rank, alive=alive) for rank, beat in enumerate(each)}


def test_a_beat_is_read_as_it_was_written_over_and_over_in_the_same_bytes(tmp_path: Path) -> None:
    file = tmp_path / "rank-0.heartbeat"
    assert read_beat(file) is None
    for beat in (BEAT, replace(BEAT, at="mine.py:7 f", save_seconds=1.5), BEAT):
        write_beat(file, beat)
        assert read_beat(file) == beat
        assert file.stat().st_size == BYTES
    inode = file.stat().st_ino
    at = "журнал/шаг.py:7 " * 12
    write_beat(file, replace(BEAT, at=f"{at}\udce9", host="узел" * 8))
    assert read_beat(file) == replace(BEAT, at=f"{at}?", host="узел" * 8), "of any alphabet"
    write_beat(file, replace(BEAT, at="x" * 2000))
    assert read_beat(file) == BEAT, "what is too long goes without its place"
    assert (file.stat().st_size, file.stat().st_ino) == (BYTES, inode)
    os.truncate(file, 40)
    assert read_beat(file) is None, "half of it tells nothing"


@given(quiet=st.lists(st.floats(0, 119), min_size=1, max_size=4), looks=st.integers(1, 300))
def test_who_beats_and_writes_is_well_however_long_it_is_watched(quiet: list[float], looks: int) -> None:
    watch = Watch()
    for look in range(looks):
        watch.see(beats(*(replace(BEAT, quiet=each) for each in quiet), alive=float(look)), float(look))
    assert watch.hang(0.0) is None


def test_one_that_does_not_run_is_told_from_those_that_wait_for_it() -> None:
    watch = Watch()
    frozen = replace(BEAT, rank=1, alive=0.0)
    found = None
    for second in range(125):
        rest = replace(BEAT, quiet=float(second), waits=True)
        watch.see(beats(rest, frozen, rest, alive=float(second)) | {1: frozen}, float(second))
        found = watch.hang(1e9)
        if found is not None:
            break
    assert found is not None, "within 125 s"
    assert FROZEN_SECONDS <= second <= FROZEN_SECONDS + 2
    assert (found.ranks, found.step, found.time) == ((1,), 12, 1e9)
    assert found.how.startswith("rank 1 did not run at all for 12")
    assert "training at step 12 on node7 (process 4711)" in found.how


@pytest.mark.parametrize(
    ("states", "culprits"),
    [
        (((12, True), (12, False), (12, True)), (1,)),
        (((12, True), (12, True)), (0, 1)),
        (((12, True), (11, True)), (1,)),
        (((5, False), (6, False)), (0,)),
        (((12, False), (12, False)), (0, 1)),
        (((12, False), (12, True), (12, False)), (0, 2)),
    ],
)
def test_who_is_busy_while_others_wait_is_named_else_who_is_behind(
    states: tuple[tuple[int, bool], ...], culprits: tuple[int, ...]
) -> None:
    watch = Watch()
    watch.see(beats(*(replace(BEAT, step=step, waits=waits, quiet=121.0) for step, waits in states)), 0.0)
    found = watch.hang(0.0)
    assert found is not None
    assert found.ranks == culprits


def test_a_pause_of_the_reader_or_of_everything_is_no_ranks_fault() -> None:
    watch = Watch()
    watch.see(beats(BEAT, BEAT, alive=0.0), 0.0)
    watch.see(beats(BEAT, BEAT, alive=0.0), 10_000.0)
    assert watch.hang(0.0) is None


def test_a_rank_that_has_ended_is_not_waited_for() -> None:
    watch = Watch()
    watch.see(beats(BEAT, replace(BEAT, quiet=121.0)), 0.0)
    assert watch.hang(0.0, frozenset({1})) is None


def test_a_phase_that_goes_through_a_checkpoint_may_last_as_long_as_that_takes() -> None:
    """Bytes of a checkpoint, at 200 MB/s: 70 billion parameters are 840 GB, 4200 s a time."""
    assert limits(None) == LIMITS
    large = limits(12 * 70_000_000_000)
    assert (large["saving"], large["starting"]) == (2 * 4200, 5 * 4200)
    assert large["finishing"] == 4 * 4200
    assert (large["training"], large["evaluating"]) == (LIMITS["training"], LIMITS["evaluating"])


def test_a_small_model_is_saved_soon_on_the_slowest_file_system_too() -> None:
    """Written and hashed at 20 MB/s: 124 million parameters are 1.5 GB, 350 million 4.2 GB."""
    assert limits(12 * 124_000_000) == {**LIMITS, "saving": 300}
    assert limits(12 * 350_000_000)["saving"] == 2 * 12 * 350e6 / 20e6 == 420
    by_size = [limits(12 * parameters)["saving"] for parameters in range(0, 40_000_000_000, 100_000_000)]
    assert by_size == sorted(by_size)
    assert by_size[15] == LIMITS["saving"], "1.5 billion"
    assert LIMITS["training"] < by_size[0]


def test_a_fault_of_the_network_is_waited_out_before_a_step_of_training_is_given_up() -> None:
    assert LIMITS["training"] > READING_SECONDS + LONGEST_DELAY + READ_SECONDS + CONNECT_SECONDS


@pytest.mark.parametrize("phase", ["starting", "saving", "finishing"])
def test_a_file_that_stands_still_in_a_long_phase_is_no_frozen_rank_before_the_phases_limit(
    phase: Phase,
) -> None:
    """One call may keep all threads from running, or the file system be busy with what is saved."""
    watch, busy = Watch(), replace(BEAT, phase=phase, limit=LIMITS[phase])
    for second in range(int(LIMITS[phase]) + 3):
        watch.see({0: busy}, float(second))
        if watch.hang(0.0) is not None:
            break
    assert LIMITS[phase] <= second <= LIMITS[phase] + 2


def test_limits() -> None:
    assert training_limit(0.05) == 240.0
    assert training_limit(60.0) == 600.0
    assert lowered(120.0, {}) == 120.0
    assert lowered(120.0, {LIMIT_VARIABLE: "3"}) == 3.0
