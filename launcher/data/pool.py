"""Work spread over processes that never outlive their parent.

Each process is joined to the parent by one pipe. The parent ends the work by closing its end; so does its
death. Either way a process sees the end of the pipe, between items or (telling how far it is) inside one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from launcher.errors import LauncherError, MachineError

STOP_SECONDS = 10.0

Item = TypeVar("Item")
Result = TypeVar("Result")
Tell = Callable[[Any], None]
"""Takes a report of how far an item has come. Raises StoppedError when the work is given up."""
Work = Callable[[Item, Tell], Result]


class StoppedError(Exception):
    """Raised inside work that has been given up, by its telling how far it is."""


def spread(
    make: Callable[[], Work[Item, Result]], items: Sequence[Item], workers: int, hear: Tell
) -> Generator[Result, None, None]:
    """The results of `make()(item, tell)`, as they come. `make` runs once in each process.

    What work tells, `hear` is called with here. With one worker the work is done here. With more, `make`,
    items, reports and results must pickle. An error in an item ends everything and is raised here; so is
    MachineError when a process dies. Close the generator to give up: `contextlib.closing`.
    """
    if workers == 1 or len(items) < 2:
        work = make()
        for item in items:
            yield work(item, hear)
        return
    crew: list[_Worker[Item, Result]] = []
    try:
        crew.extend(_Worker(make) for _ in range(min(workers, len(items))))
        yield from _deal(items, crew, hear)
    finally:
        for worker in crew:
            worker.connection.close()
        for worker in crew:
            worker.end()


@dataclass(frozen=True, slots=True)
class _Report:
    """What work told, on its way to the parent; a result or an error travels as a pair."""

    content: object


class _Worker(Generic[Item, Result]):
    """A process, and the parent's end of its pipe."""

    def __init__(self, make: Callable[[], Work[Item, Result]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with _interrupts_blocked():
            self.process.start()
        theirs.close()

    def receive(self) -> Result | _Report:
        """What it says next: a report, or the result of its item. Raises what the work raised."""
        answer: _Report | tuple[Result, Exception | None]
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise MachineError(
                f"a worker process died (exit code {self.process.exitcode})",
                hint="if it was killed for want of memory, use fewer workers",
            ) from None
        if isinstance(answer, _Report):
            return answer
        result, error = answer
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Wait for the process, and not for long."""
        self.process.join(STOP_SECONDS)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _deal(items: Sequence[Item], crew: Sequence[_Worker[Item, Result]], hear: Tell) -> Iterator[Result]:
    at = {worker.connection: worker for worker in crew}
    for worker, item in zip(crew, items, strict=False):
        worker.connection.send(item)
    dealt, done = len(crew), 0
    while done < len(items):
        for ready in wait(list(at)):
            assert isinstance(ready, Connection)
            result = at[ready].receive()
            if isinstance(result, _Report):
                hear(result.content)
                continue
            done += 1
            if dealt < len(items):
                ready.send(items[dealt])
                dealt += 1
            yield result


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started in here never gets Ctrl-C, which a terminal sends to all: its parent will tell it."""
    # Started first, because starting it unblocks the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, make: Callable[[], Work[Item, Result]]) -> None:
    # One process a core is enough: without this each would start the tokenizer's threads for all cores.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    work: Work[Item, Result] | None = None

    def tell(report: object) -> None:
        if connection.poll():
            raise StoppedError
        connection.send(_Report(report))

    try:
        while True:
            item = connection.recv()
            try:
                work = work or make()
                answer: tuple[Result | None, Exception | None] = (work(item, tell), None)
            except StoppedError:
                return
            except Exception as error:  # noqa: BLE001 - the parent raises it
                if not isinstance(error, LauncherError):
                    error.add_note(traceback.format_exc())
                answer = (None, error)
            connection.send(answer)
    except (EOFError, ConnectionError):
        return
