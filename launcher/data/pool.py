"""Work spread over processes that never outlive their parent.

Each process is joined to the parent by one pipe. The parent ends the work by closing its end; so does its
death. Either way a process sees the end of the pipe, between items or (telling how far it is) inside one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
    make: Callable[[], Work[Item, Result]], items: Iterable[Item], workers: int, hear: Tell
) -> Generator[Result, None, None]:
    """The results of `make()(item, tell)`, as they come. `make` runs once in each process.

    The processes start, and make, before the first item is asked for: `items` may take its time over it.
    What work tells, `hear` is called with here. With one worker the work is done here. With more, `make`,
    items, reports and results must pickle. An error in an item ends everything and is raised here; so is
    MachineError when a process dies. Close the generator to give up: `contextlib.closing`.
    """
    if workers == 1:
        work = make()
        for item in items:
            yield work(item, hear)
        return
    crew: list[_Worker[Item, Result]] = []
    try:
        crew.extend(_Worker(make) for _ in range(workers))
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

    def give(self, item: Item) -> None:
        """Have it do this next."""
        # That it died is seen, and said, where its answer is waited for.
        with suppress(ConnectionError):
            self.connection.send(item)

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


def _deal(items: Iterable[Item], crew: Sequence[_Worker[Item, Result]], hear: Tell) -> Iterator[Result]:
    left = iter(items)
    busy = {}
    for worker, item in zip(crew, left, strict=False):
        worker.give(item)
        busy[worker.connection] = worker
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            worker = busy.pop(ready)
            result = worker.receive()
            if isinstance(result, _Report):
                busy[ready] = worker
                hear(result.content)
                continue
            for item in islice(left, 1):
                worker.give(item)
                busy[ready] = worker
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

    def tell(report: object) -> None:
        if connection.poll():
            raise StoppedError
        connection.send(_Report(report))

    work, failure = _attempt(make)
    try:
        while True:
            item = connection.recv()
            connection.send((None, failure) if work is None else _attempt(partial(work, item, tell)))
    except (EOFError, ConnectionError, StoppedError):
        # Nothing is left to do but to take the interpreter apart, which takes a tenth of a second.
        os._exit(0)


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """What it gives, or what it raises, for the parent to raise. StoppedError goes on."""
    try:
        return action(), None
    except StoppedError:
        raise
    except Exception as error:  # noqa: BLE001 - see above
        if not isinstance(error, LauncherError):
            error.add_note(traceback.format_exc())
        return None, error
