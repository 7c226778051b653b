from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RequestError
from launcher.run import journal
from launcher.run.cluster_checks import as_time, file_system
from launcher.run.directory import RunDirectory
from launcher.run.submitting import how_it_ended, variation_name, variations


def test_no_axis_is_one_run_as_it_is() -> None:
    assert variations([]) == [{}]


def test_several_axes_are_every_combination() -> None:
    found = variations(["train.learning_rate=1e-4,3e-4", "train.betas=[0.9,0.95],[0.8,0.9]"])
    assert [tuple(each.values()) for each in found] == [
        ("1e-4", "[0.9,0.95]"),
        ("1e-4", "[0.8,0.9]"),
        ("3e-4", "[0.9,0.95]"),
        ("3e-4", "[0.8,0.9]"),
    ]


@pytest.mark.parametrize("axes", [["train.steps"], ["=1,2"], ["a="], ["a=1,1"], ["a=1", "a=2"]])
def test_what_is_no_axis(axes: list[str]) -> None:
    with pytest.raises(RequestError):
        variations(axes)


def test_a_run_of_a_sweep_is_named_for_what_differs() -> None:
    assert (
        variation_name("gpt2", {"train.learning_rate": "1e-4", "seed": "7"})
        == "gpt2-learning_rate=1e-4-seed=7"
    )
    assert "/" not in variation_name("gpt2", {"model.name": "/models/a"})


def test_the_supervisors_last_word_says_how_it_ended(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    journal.record(directory.journal, "submitted", job="1", after=None)
    journal.record(directory.journal, "ended", outcome="STOPPED", step=5, reason="cancelled", exit_code=130)
    assert how_it_ended(directory, None).exit_code == 130
    journal.record(directory.journal, "submitted", job="2", after=None)
    again = how_it_ended(directory, None)
    assert again.exit_code == 1
    assert "forgotten" in again.words


@pytest.mark.parametrize(("seconds", "text"), [(3600, "01:00:00"), (90061, "1-01:01:01")])
def test_a_time_as_slurm_writes_it(seconds: int, text: str) -> None:
    assert as_time(seconds) == text


def test_the_file_system_of_a_folder() -> None:
    """As the kernel's own list of mounts has it."""
    assert file_system(Path("/proc/self")) == ("/proc", "proc")
    assert file_system(Path("/"))[0] == "/"
