from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import console
from launcher.errors import ConfigError, DataError, Fault, Interrupted, LauncherError, RequestError
from launcher.sizes import size_in_words

ESCAPE = "\033"

SPEAKS = """
from launcher import console
from launcher.errors import RequestError
console.answer(console.section("what it becomes", [("strategy", "ddp")]))
console.show_error(RequestError("it is wrong", hint="mend it"))
bar = console.Bar("preparing")
bar(50, 100, 10)
bar(100, 100, 20)
"""


def on_a_terminal(**environment: str) -> str:
    """What a person sees: both streams on one pseudo-terminal."""
    ours, theirs = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run(
        [sys.executable, "-c", SPEAKS], stdout=theirs, stderr=theirs, env={**plain, **environment}, check=True
    )
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 1 << 16):
            seen += part
    except OSError:
        pass  # the end of a pseudo-terminal on Linux
    os.close(ours)
    return seen.decode()


def test_colour_and_a_bar_on_a_terminal() -> None:
    seen = on_a_terminal()
    assert f"{console.BOLD}what it becomes{console.RESET}" in seen
    assert f"{console.RED}error:{console.RESET} it is wrong" in seen
    assert "\rpreparing [##############################] 100%  20 tokens" in seen


def test_no_color_is_honoured_on_a_terminal() -> None:
    seen = on_a_terminal(NO_COLOR="1")
    assert ESCAPE not in seen
    assert "error: it is wrong" in seen
    assert "100%" in seen, "a bar is no colour"
    assert ESCAPE in on_a_terminal(NO_COLOR=""), "empty means unset: no-color.org"


def test_elsewhere_neither_colour_nor_bar() -> None:
    done = subprocess.run([sys.executable, "-c", SPEAKS], capture_output=True, text=True, check=True)
    assert done.stdout == "what it becomes\n  strategy                ddp\n"
    assert done.stderr == "error: it is wrong\n  hint: mend it\n"


CELLS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


@given(rows=st.lists(st.tuples(CELLS, st.integers(0, 10**9).map(str)), min_size=1, max_size=6))
def test_columns_line_up_and_numbers_stand_to_the_right(rows: list[tuple[str, str]]) -> None:
    lines = console.table(("what", "count"), rows).split("\n")
    assert [line.split() for line in lines[1:]] == [list(row) for row in rows]
    assert len({len(line) for line in lines}) == 1, "the last column ends where its header ends"
    if not all(name[0].isdigit() for name, _ in rows):
        assert all(line.startswith(name) for line, (name, _) in zip(lines[1:], rows, strict=True))


def test_text_stands_to_the_left_without_spaces_after_it() -> None:
    assert console.table(("step", "state"), [("10", "good"), ("1000", "DAMAGED")]) == (
        "step  state\n  10  good\n1000  DAMAGED"
    )


Captured = pytest.CaptureFixture[str]


def test_every_fault_is_printed_with_its_place_and_hint(capsys: Captured) -> None:
    faults = [Fault(f"train.key_{n}", f"wrong {n}", f"run.yaml:{n}", f"mend {n}") for n in range(7)]
    console.show_error(ConfigError([*faults, Fault("seed", "not a number")]))
    out, said = capsys.readouterr()
    assert out == ""
    for n in range(7):
        assert f"error: train.key_{n}: wrong {n} (run.yaml:{n})\n  hint: mend {n}\n" in said
    assert said.endswith("error: seed: not a number\n")
    assert said.count("error:") == 8


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RequestError("it is wrong"), "error: it is wrong\n"),
        (
            DataError("not UTF-8", file="a.txt", line=3, offset=17, hint="convert it"),
            "error: a.txt:3, byte 17: not UTF-8\n  hint: convert it\n",
        ),
        (Interrupted("stopped safely", hint="go on"), "stopped safely\n  hint: go on\n"),
    ],
)
def test_an_error_is_said_once(capsys: Captured, error: LauncherError, said: str) -> None:
    console.show_error(error)
    assert capsys.readouterr() == ("", said)


def test_answers_and_talk_are_kept_apart(capsys: Captured) -> None:
    console.say("by the way")
    console.answer_json({"name": "naïve", "nothing": None})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"name": "naïve", "nothing": None}
    assert "naïve" in out
    assert err == "by the way\n"


@pytest.mark.parametrize(
    ("say", "value", "said"),
    [
        (size_in_words, 0, "0 B"),
        (size_in_words, 1023, "1023 B"),
        (size_in_words, 1024, "1.0 KiB"),
        (size_in_words, 1536 * 2**20, "1.5 GiB"),
        (size_in_words, 2048 * 2**40, "2048.0 TiB"),
        (console.count, 0, "0"),
        (console.count, 9999, "9,999"),
        (console.count, 10_000, "10.0 k"),
        (console.count, 124_439_808, "124.4 M"),
        (console.count, 2.5e9, "2.5 G"),
        (console.count, 3e12, "3.0 T"),
    ],
)
def test_numbers_as_a_person_reads_them(say: Callable[[float], str], value: float, said: str) -> None:
    assert say(value) == said


@given(
    parts=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2**40), min_size=1),
    available=st.none() | st.integers(1, 2**41),
)
def test_bars_are_to_one_scale_and_never_longer_than_it(parts: dict[str, int], available: int | None) -> None:
    whole = max(available or 0, sum(parts.values()), 1)
    there = {name: size for name, size in parts.items() if size}
    for (name, drawn), size in zip(console.bars(parts, available), there.values(), strict=True):
        assert parts[name] == size
        assert abs(drawn.count("#") - 40 * size / whole) <= 0.5
        assert drawn.rstrip().endswith(size_in_words(size))
        assert len(drawn) == 40 + 1 + max(10, len(size_in_words(size)))


def test_a_bar_says_nothing_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = console.Bar("preparing")
    for done in range(0, 101, 10):
        bar(done, 100, done)
    bar(0, 0, 0)
    assert stream.getvalue() == ""


def test_a_bar_counts_from_where_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1010.0, 8300.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    bar = console.Bar("preparing")
    # Half was there: the speed is that of what was done since.
    for done in (500, 750, 999):
        bar(done, 1000, done)
    first, second, last = stream.getvalue().split("\r")[1:]
    assert "? left" in first
    assert "25 tokens/s  10 s left" in second
    assert last.split("]")[1].split()[0] == "100%"


def test_durations() -> None:
    said = [console.duration(seconds) for seconds in (0.4, 99, 100, 3599, 5000, 360_000)]
    assert said == ["0 s", "99 s", "2 min", "1 h 00 min", "1 h 23 min", "100 h 00 min"]


def test_a_live_answer_is_drawn_in_place() -> None:
    drawn = """
from launcher import console
with console.live_answer() as show:
    for step in ("step 1", "step 2"):
        show(console.section("small: running", [("progress", step)]))
"""
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", drawn], stdout=theirs, env={**os.environ, "TERM": "xterm"}, check=True
    )
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    first, _, _ = seen.partition("step 2")
    assert "step 1" in first
    assert f"{ESCAPE}[1A" in first, "it went back up over what stood there"
