from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from launcher.run.nodes import NodeReport

FORKED = """
import os, sys
from datetime import timedelta
from launcher.worker import node

node.STARTING = timedelta(seconds=3)
for number in range(3):
    if os.fork() == 0:
        os.environ["SLURM_NODEID"] = str(number)
        os.environ["SLURMD_NODENAME"] = ("localhost", "n2", "n3")[number]
        os._exit(node.main(sys.argv[1:]))
for _ in range(3):
    os.wait()
"""


def test_the_first_says_at_once_that_the_port_is_taken_on_it(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "launcher.worker.node", str(tmp_path), "word", "n1,n2", str(port)]
        environment = os.environ | {"SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"}
        said = subprocess.run(
            [*command, "gloo"], capture_output=True, env=environment, timeout=100, check=True
        )
    report = NodeReport.from_line(said.stdout.decode())
    assert (report.host, report.taken, report.pairs) == ("n1", port, ())


def test_the_nodes_that_are_there_answer_without_one_that_is_not(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
    arguments = [str(tmp_path), "word", "localhost,n2,n3,n4", str(port), "gloo"]
    command = [sys.executable, "-c", FORKED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    said = {each["host"]: each["pairs"] for each in map(json.loads, done.stdout.splitlines())}
    assert set(said) == {"localhost", "n2", "n3"}, done.stderr
    for pairs in said.values():
        gone, *there = pairs
        assert gone == {"with": "n4", "seconds": None}
        assert len(there) == 2
        assert all(each["seconds"] > 0 for each in there), done.stderr
