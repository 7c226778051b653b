"""What the ranks printed, by time, and followed over attempts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import RequestError
from launcher.run import logs
from launcher.run.directory import RunDirectory
from launcher.run.logs import follow_logs, read_logs


def stamp(second: int, text: str) -> str:
    return f"2026-01-02T03:04:{second:02d}.000Z {text}\n"


def write(directory: RunDirectory, attempt: int, rank: int, *lines: str) -> None:
    file = directory.log(attempt, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(lines)


def shown(lines: Iterator[logs.Line]) -> list[str]:
    return [f"{line.source}: {line.text.rpartition('Z ')[2]}" for line in lines]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_ranks_are_merged_by_time_and_lines_without_one_stay_with_theirs(directory: RunDirectory) -> None:
    write(directory, 1, 0, stamp(1, "one"), "from C\n", stamp(4, "four"))
    write(directory, 1, 10, stamp(3, "three"), "cut sho")
    write(directory, 1, 2, stamp(2, "two"))
    directory.launch_log(1).write_text("starting\n")
    assert shown(read_logs(directory, None, None)) == [
        *("launch: starting", "rank 0: one", "rank 0: from C", "rank 2: two"),
        *("rank 10: three", "rank 10: cut sho", "rank 0: four"),
    ]
    assert shown(read_logs(directory, 1, 2)) == ["rank 2: two"]
    write(directory, 2, 0, stamp(9, "again"))
    assert shown(read_logs(directory, None, None)) == ["rank 0: again"]


def test_what_is_not_there_is_named(directory: RunDirectory) -> None:
    with pytest.raises(RequestError, match="has no log of any attempt"):
        list(read_logs(directory, None, None))
    write(directory, 1, 0, stamp(1, "one"))
    with pytest.raises(RequestError, match="has no log of any attempt 3") as refused:
        list(read_logs(directory, 3, None))
    assert refused.value.hint == "there are attempts 1 to 1"
    with pytest.raises(RequestError, match="attempt 1 has no log of rank 4") as refused:
        list(read_logs(directory, None, 4))
    assert refused.value.hint == "there are: rank 0"


def test_following_goes_on_over_restarts_and_ends_with_the_run(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.0)
    # What has come by each look: attempt, rank, and what was printed.
    happenings = iter(
        [
            [],
            [(1, 0, stamp(1, "one") + stamp(2, "tw")[:-1])],
            [(1, 0, "o\n")],
            [(1, 0, stamp(3, "last words")), (2, 1, stamp(4, "anew"))],
            [],
        ]
    )

    def alive() -> bool:
        happening = next(happenings, None)
        for attempt, rank, text in happening if happening is not None else [(2, 1, stamp(5, "the end"))]:
            write(directory, attempt, rank, text)
        return happening is not None

    assert shown(follow_logs(directory, None, None, alive)) == [
        *("rank 0: one", "rank 0: two", "rank 0: last words"),
        *("rank 1: anew", "rank 1: the end"),
    ]


def test_following_one_attempt_ends_with_it(directory: RunDirectory) -> None:
    write(directory, 1, 0, stamp(1, "one"))
    write(directory, 2, 0, stamp(2, "two"))
    assert shown(follow_logs(directory, 1, None, lambda: True)) == ["rank 0: one"]
    assert shown(follow_logs(directory, None, None, lambda: False)) == ["rank 0: two"]
