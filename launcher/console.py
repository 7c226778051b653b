"""How we speak to people: tables, errors, progress. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from launcher.errors import ConfigError, Interrupted, LauncherError
from launcher.sizes import size_in_words

BOLD, RED, RESET = "\033[1m", "\033[31m", "\033[0m"


def colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that wants colour (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def say(text: str) -> None:
    """A line to the person, beside the answer."""
    print(text, file=sys.stderr, flush=True)


def answer(text: str) -> None:
    """The answer itself, on stdout."""
    print(text, flush=True)


def answer_json(value: Any) -> None:
    """The answer as JSON, on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def answer_json_line(value: Any) -> None:
    """One of many answers, as a line of JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


@contextmanager
def live_answer() -> Iterator[Callable[[str], None]]:
    """While inside, each text given to what is yielded is drawn in place of the one before, on a terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(file=sys.stdout), auto_refresh=False) as drawn:
        yield lambda text: drawn.update(Text.from_ansi(text), refresh=True)


def show_error(error: LauncherError) -> None:
    """What is wrong, where it was set, what to do; every fault of a configuration."""
    mark, end = (RED, RESET) if colour(sys.stderr) else ("", "")
    if isinstance(error, ConfigError):
        for fault in error.faults:
            say(f"{mark}error:{end} {fault}")
            if fault.hint:
                say(f"  hint: {fault.hint}")
        return
    say(error.told if isinstance(error, Interrupted) else f"{mark}error:{end} {error.told}")


def section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A titled block of two columns: what it is, and its value."""
    bold, end = (BOLD, RESET) if colour(sys.stdout) else ("", "")
    return "\n".join([f"{bold}{title}{end}", *(f"  {name:<24}{value}" for name, value in rows)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; numbers (cells that start with a digit) to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = [bool(rows) and all(row[column][:1].isdigit() for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def count(number: float) -> str:
    """A number as a person reads it: 124,439,808 is `124.4 M`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / limit if unit != 'k' else number / 1e3:.1f} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """A time as a person reads it: 5,000 seconds are `1 h 23 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def bars(parts: Mapping[str, int], available: int | None) -> list[tuple[str, str]]:
    """Sizes in bytes as bars, all to one scale: the memory available, or else their sum. Without zeros."""
    whole = max(available or 0, sum(parts.values()), 1)
    return [
        (name, f"{'#' * round(40 * size / whole):<40} {size_in_words(size):>10}")
        for name, size in parts.items()
        if size
    ]


class Bar:
    """Progress of something counted in bytes: a line that is rewritten on a terminal, silent elsewhere.

    Speed and time left count from the first call, so what was done before it is not taken for speed.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._begun: tuple[float, int, int] | None = None
        self._shown = 0.0

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """`done` of `total` bytes have become `tokens` tokens."""
        now = time.monotonic()
        start, done_before, tokens_before = self._begun = self._begun or (now, done, tokens)
        if not sys.stderr.isatty() or (now - self._shown < 0.1 and done < total):
            return
        self._shown = now
        seconds = max(now - start, 1e-9)
        rate = (done - done_before) / seconds
        left = duration((total - done) / rate) if rate else "?"
        filled = round(30 * done / max(total, 1))
        print(
            f"\r{self._title} [{'#' * filled:<30}] {done / max(total, 1):4.0%}  {count(tokens)} tokens"
            f"  {count((tokens - tokens_before) / seconds)} tokens/s  {left} left    ",
            end="\n" if done >= total else "",
            file=sys.stderr,
            flush=True,
        )
