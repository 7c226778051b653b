from __future__ import annotations

from itertools import combinations

import pytest

from launcher.run.nodes import Findings, NodeReport, Pair, judge, rounds

GIB = 1 << 30
HOSTS = ("n1", "n2", "n3", "n4")


def report(host: str, **change: object) -> NodeReport:
    pairs = change.pop("pairs", ())
    fields = {
        "sees": True,
        "free": 100 * GIB,
        "gpus": 8,
        "versions": {"torch": "2.13", "launcher": "0.1"},
        **change,
    }
    assert isinstance(pairs, tuple)
    return NodeReport(host, pairs=pairs, **fields)  # type: ignore[arg-type]


def timed(times: dict[tuple[str, str], float | None]) -> list[NodeReport]:
    """Reports of four nodes whose pairs take 0.1 s but for those in `times`."""
    return [
        report(
            host,
            pairs=tuple(
                Pair((host, other), times.get((min(host, other), max(host, other)), 0.1))
                for other in HOSTS
                if other != host
            ),
        )
        for host in HOSTS
    ]


@pytest.mark.parametrize("count", range(1, 12))
def test_every_pair_meets_once_and_nobody_twice_at_a_time(count: int) -> None:
    found = rounds(count)
    assert sorted(pair for each in found for pair in each) == list(combinations(range(count), 2))
    for each in found:
        nodes = [node for pair in each for node in pair]
        assert len(nodes) == len(set(nodes))


def test_sound_nodes() -> None:
    assert judge(timed({}), HOSTS, GIB) == Findings()


def test_a_port_that_is_taken_is_no_fault_of_nodes_that_therefore_meet_nobody() -> None:
    found = judge([report("n1", taken=21000)], HOSTS[:2], GIB)
    assert found == Findings(("port 21000, at which the nodes meet, is taken on n1",), ("n1",))


def test_a_node_with_another_version() -> None:
    reports = [*timed({})[:3], report("n4", versions={"torch": "2.12", "launcher": "0.1"})]
    found = judge(reports, HOSTS, GIB)
    assert found.faults == ("n4 has torch 2.12, and it should be 2.13",)
    assert found.culprits == ("n4",)


def test_of_two_nodes_the_first_is_right() -> None:
    reports = [report("n1"), report("n2", versions={"torch": None, "launcher": "0.1"})]
    found = judge(reports, HOSTS[:2], GIB)
    assert found == Findings(("n2 has no torch, and it should be 2.13",), ("n2",))


def test_what_the_run_was_submitted_with_is_right() -> None:
    reports = [report("n1", versions={"torch": "2.12"}), report("n2", versions={"torch": "2.13"})]
    assert judge(reports, HOSTS[:2], GIB, {"torch": "2.13"}).culprits == ("n1",)
    assert judge(reports, HOSTS[:2], GIB, {"torch": "2.14"}).culprits == (), "then both are wrong"


def test_a_node_that_does_not_see_the_run_directory() -> None:
    found = judge([*timed({})[:3], report("n4", sees=False, free=0)], HOSTS, GIB)
    assert found.culprits == ("n4",)
    assert "shared file system" in found.faults[0]


def test_where_most_do_not_see_it_no_node_is_to_blame() -> None:
    found = judge([report("n1"), *(report(host, sees=False) for host in HOSTS[1:])], HOSTS, GIB)
    assert len(found.faults) == 3
    assert found.culprits == ()


def test_a_node_that_has_lost_a_gpu() -> None:
    found = judge([*timed({})[:3], report("n4", gpus=7)], HOSTS, GIB, gpus=8)
    assert found == Findings(("torch finds 7 GPUs on n4, and its ranks need 8",), ("n4",))


def test_a_node_that_does_not_answer() -> None:
    found = judge(timed({})[:3], HOSTS, GIB)
    assert found == Findings(("n4 did not answer",), ("n4",))


def test_no_room_is_no_nodes_fault() -> None:
    found = judge(timed({}), HOSTS, 200 * GIB)
    assert found.culprits == ()
    assert found.faults == (
        "there are 100.0 GiB left for the run directory, and a checkpoint takes 200.0 GiB",
    )


@pytest.mark.parametrize(("seconds", "word"), [(None, "cannot reach"), (9.0, "take 9.0 s, others 0.10 s")])
def test_a_node_that_is_bad_with_everybody_is_named(seconds: float | None, word: str) -> None:
    bad = {(min(host, "n3"), max(host, "n3")): seconds for host in HOSTS if host != "n3"}
    found = judge(timed(bad), HOSTS, GIB)
    assert found.culprits == ("n3",)
    assert len(found.faults) == 3
    assert all(word in fault for fault in found.faults)


def test_a_single_bad_pair_blames_nobody() -> None:
    found = judge(timed({("n1", "n2"): None}), HOSTS, GIB)
    assert found == Findings(("n1 and n2 cannot reach each other",), ())


def test_a_report_comes_as_a_line() -> None:
    line = '{"host": "n1", "sees": true, "free": 5, "gpus": 8, "versions": {"torch": null}, '
    line += '"pairs": [{"with": "n2", "seconds": 0.5}]}'
    assert NodeReport.from_line(line) == NodeReport(
        "n1", True, 5, 8, {"torch": None}, (Pair(("n1", "n2"), 0.5),)
    )


def test_a_node_that_nobody_meets_is_named() -> None:
    """n4 cannot reach the first, where all meet; the others tell that it was not there."""
    missed: dict[tuple[str, str], float | None] = {(host, "n4"): None for host in HOSTS[:3]}
    reports = [*timed(missed)[:3], report("n4", pairs=(Pair(("n4", "n1"), None),))]
    found = judge(reports, HOSTS, GIB)
    assert found.culprits == ("n4",)
    silent = judge(timed(missed)[:3], HOSTS, GIB)
    assert silent == Findings(("n4 did not answer",), ("n4",)), "and nothing of its pairs"


def test_where_all_meet_may_be_the_bad_one() -> None:
    first = report("n1", pairs=tuple(Pair(("n1", host), None) for host in HOSTS[1:]))
    found = judge(
        [first, *(report(host, pairs=(Pair((host, "n1"), None),)) for host in HOSTS[1:])], HOSTS, GIB
    )
    assert found.culprits == ("n1",)
