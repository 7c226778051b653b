from __future__ import annotations

import json
import time
from pathlib import Path

from launcher.run import journal
from launcher.run.directory import RunDirectory, write_text
from launcher.run.node_check import failures, findings, record
from launcher.run.nodes import Findings


def test_what_libraries_print_is_no_answer(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    write_text(directory.environment, json.dumps({"versions": {}}))
    answer = {"host": "n1", "sees": True, "free": 9, "gpus": 0, "versions": {}, "pairs": []}
    said = ["loaded", '{"level": "INFO"}', "3", json.dumps(answer), '{"host": "n2"']
    command = ["printf", "%s\\n", *said]
    found = findings(directory, command, "word", ["n1", "n2", "n3"], room=1, gpus=0, own_versions=True)
    assert found == Findings(("n2 did not answer", "n3 did not answer"), ())


def test_nobody_is_waited_for_where_the_nodes_cannot_meet(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    write_text(directory.environment, json.dumps({"versions": {}}))
    answer = {"host": "n1", "sees": True, "free": 9, "gpus": 0, "versions": {}, "pairs": [], "taken": 21000}
    command = ["sh", "-c", f"echo '{json.dumps(answer)}'; exec sleep 60"]
    begun = time.monotonic()
    found = findings(directory, command, "word", ["n1", "n2"], room=1, gpus=0, own_versions=True)
    assert found.culprits == ("n1",)
    assert time.monotonic() - begun < 30


def test_a_run_that_is_submitted_again_has_its_nodes_tried_anew(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for _ in range(3):
        record(directory, ["n1", "n2"], Findings(("n1 did not answer",), ("n1",)), 0.0)
    assert failures(directory) == 3
    journal.record(directory.journal, "ended", outcome="NO_PROGRESS")
    assert failures(directory) == 0
