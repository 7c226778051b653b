from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from launcher.run import journal


def test_events_come_back_in_order_with_their_facts(tmp_path: Path) -> None:
    file = tmp_path / "run" / "journal.jsonl"
    assert journal.read(file) == []
    journal.record(file, "attempt_started", attempt=1)
    journal.record(file, "attempt_ended", attempt=1, outcome="FINISHED")
    events = journal.read(file)
    assert [event["event"] for event in events] == ["attempt_started", "attempt_ended"]
    assert events[1]["outcome"] == "FINISHED"
    assert events[0]["time"] <= events[1]["time"]
    assert journal.events(file, "attempt_ended") == events[1:]
    assert journal.events(file, "attempt_ended", "attempt_started") == events


def test_a_line_cut_by_a_crash_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    journal.record(file, "one")
    journal.record(file, "two")
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert [event["event"] for event in journal.read(file)] == ["one"]
    journal.record(file, "three")
    assert [event["event"] for event in journal.read(file)] == ["one", "three"]


def test_a_line_cut_after_a_brace_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    journal.record(file, "one")
    journal.record(file, "two", reason="KeyError: {1}")
    file.write_bytes(file.read_bytes()[:-3])
    assert file.read_bytes().endswith(b"{1}")
    journal.record(file, "three")
    assert [event["event"] for event in journal.read(file)] == ["one", "three"]


def test_an_event_is_on_disk_before_what_it_tells_of_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "journal.jsonl"
    synced: list[bytes] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    for event in ("one", "two"):
        journal.record(file, event)
        assert synced.pop() == file.read_bytes(), "whole, and last"


def test_every_event_is_told_of_in_the_documentation() -> None:
    root = Path(__file__).parents[2]
    written = {
        str(call.args[1].value)
        for module in (root / "launcher").rglob("*.py")
        for call in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("journal.record", "journal.note")
        if isinstance(call.args[1], ast.Constant)
    }
    page = (root / "docs" / "concepts" / "runs.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\w+)` \|", page.partition("## The journal")[2], re.MULTILINE)
    assert sorted(written) == sorted(told)
