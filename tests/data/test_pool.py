"""Work in processes: all of it, its errors, and no process left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from launcher.data.pool import Tell, spread
from launcher.errors import DataError, LauncherError, MachineError


class Squares:
    """Squares numbers, and tells each first; 3 fails, 5 kills its process, 7 goes on until it is given up."""

    def __init__(self, folder: Path) -> None:
        (folder / str(os.getpid())).touch()

    def __call__(self, number: int, tell: Tell) -> int:
        tell(number)
        if number == 3:
            raise DataError("three", file="a.txt", line=3, hint="not three")
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        while number == 7:
            tell(number)
            time.sleep(0.01)
        return number * number


class Refuses:
    """Cannot be made; or, told to, dies of it."""

    def __init__(self, dies: bool) -> None:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("no tools", hint="bring some")

    def __call__(self, number: int, tell: Tell) -> int:
        raise NotImplementedError


def deaf(_: object) -> None:
    """For reports that do not matter."""


def processes(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def assert_all_gone(folder: Path) -> None:
    others = [pid for pid in processes(folder) if pid != os.getpid()]
    assert others
    for pid in others:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_item_is_done_once(tmp_path: Path, workers: int) -> None:
    items = [10, 11, 12, 13, 14]
    heard: list[int] = []
    results = sorted(spread(partial(Squares, tmp_path), items, workers, heard.append))
    assert results == [item * item for item in items]
    assert sorted(heard) == items
    assert len(processes(tmp_path)) == workers
    assert (os.getpid() in processes(tmp_path)) == (workers == 1)


def test_an_error_comes_back_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        list(spread(partial(Squares, tmp_path), [1, 3, 7, 7], 2, deaf))
    assert (raised.value.file, raised.value.line, raised.value.hint) == ("a.txt", 3, "not three")
    assert_all_gone(tmp_path)


def test_a_process_that_dies_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="exit code -9"):
        list(spread(partial(Squares, tmp_path), [7, 5], 2, deaf))
    assert_all_gone(tmp_path)


def test_processes_are_ready_before_the_first_item_is_asked_for(tmp_path: Path) -> None:
    def items() -> Iterator[int]:
        latest = time.monotonic() + 60
        while len(processes(tmp_path)) < 2:
            assert time.monotonic() < latest
            time.sleep(0.01)
        yield from (10, 11, 12)

    assert sorted(spread(partial(Squares, tmp_path), items(), 2, deaf)) == [100, 121, 144]


def test_fewer_items_than_processes_are_done(tmp_path: Path) -> None:
    assert list(spread(partial(Squares, tmp_path), [10], 2, deaf)) == [100]
    assert list(spread(partial(Squares, tmp_path), [], 2, deaf)) == []
    assert_all_gone(tmp_path)


@pytest.mark.parametrize(("dies", "said"), [(False, "no tools"), (True, "exit code -9")])
def test_work_that_cannot_be_made_is_noticed(dies: bool, said: str) -> None:
    def items() -> Iterator[int]:
        time.sleep(1)
        yield from (1, 2, 3)

    with pytest.raises(LauncherError, match=said):
        list(spread(partial(Refuses, dies), items(), 2, deaf))


def test_work_that_is_given_up_stops_inside_an_item(tmp_path: Path) -> None:
    results = spread(partial(Squares, tmp_path), [2, 7, 7], 2, deaf)
    assert next(results) == 4
    results.close()
    assert_all_gone(tmp_path)
