from __future__ import annotations

from pathlib import Path

from launcher.run.directory import RunDirectory
from launcher.run.excluding import HOURS, avoid, excludable, nodes_to_avoid


def test_a_node_is_avoided_for_the_stated_time(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert nodes_to_avoid(directory, 0.0) == ()
    avoid(directory, ["n2", "n1"], "did not answer", 1000.0)
    avoid(directory, ["n2"], "did not answer", 2000.0)
    assert nodes_to_avoid(directory, 3000.0) == ("n2", "n1")
    assert nodes_to_avoid(directory, 1000.0 + HOURS * 3600) == ("n2",)
    assert nodes_to_avoid(directory, 2000.0 + HOURS * 3600) == ()


def test_no_node_is_given_up_that_the_job_cannot_do_without() -> None:
    nodes = ("n1", "n2", "n3")
    assert excludable(("n1",), (), nodes, 2) == ("n1",)
    assert excludable(("n1",), (), nodes, 3) == ()
    assert excludable(("n1",), ("n2",), nodes, 2) == ()
