"""Whole runs straight from text: the same for any world, stopped or killed, and nothing written."""

from __future__ import annotations

import json
import os

import pytest

from launcher.run.directory import RunDirectory
from tests.conftest import Workplace, losses, sentences, small_run, weights, write_json
from tests.long import LONG

ENDINGS = """
import os, signal
from transformers import TrainerCallback

class End(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        asked, step = os.environ.get("END", "none 0").split()
        first = os.environ["LAUNCHER_ATTEMPT"] == "1" and state.is_world_process_zero
        if state.global_step == int(step) and first:
            os.kill(os.getpid(), getattr(signal, asked))
"""


@pytest.fixture
def streaming(workplace: Workplace) -> Workplace:
    """The workplace with text enough for four streams."""
    (workplace.folder / "corpus.txt").write_text("\n".join(sentences(20_000)) + "\n", encoding="utf-8")
    (workplace.folder / "mine.py").write_text(ENDINGS)
    run = small_run()
    run["data"]["mode"] = "stream"
    run["train"]["callbacks"] = ["mine:End"]
    write_json(workplace.folder / "run.yaml", run)
    return workplace


def test_any_world_and_split_trains_on_the_same_text_and_writes_none_of_it(streaming: Workplace) -> None:
    one = streaming.train("name=one", "train.micro_batch=4")
    two = streaming.train("name=two", "train.micro_batch=1", "--cluster", "two.yaml")
    ours, theirs = losses(one), losses(two)
    assert ours.keys() == theirs.keys()
    assert len([key for key in ours if key[1] == "loss"]) == 20
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4
    assert ours[20, "loss"] < ours[1, "loss"] - 0.5, "nothing was learned"
    assert ours[20, "eval_loss"] < ours[10, "eval_loss"]
    (source,) = json.loads((one / "stream.json").read_text())["sources"]
    assert source["streams"] == 4

    stores = streaming.folder / "runs" / ".stores"
    assert {path.name for path in stores.iterdir()} == {"tokenizers"}
    large = [path for path in one.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert all(path.suffix in {".safetensors", ".pt"} for path in large), large


@pytest.mark.parametrize(
    ("ending", "ranks", "ranks_after"),
    [
        pytest.param("SIGUSR1 7", 1, 1, id="stopped", marks=LONG),
        pytest.param("SIGKILL 13", 2, 2, id="killed, two ranks"),
        pytest.param("SIGUSR1 12", 2, 1, id="stopped with two ranks, gone on with one"),
    ],
)
def test_ended_and_taken_up_again_it_is_the_same_run(
    streaming: Workplace, ending: str, ranks: int, ranks_after: int
) -> None:
    cluster = {1: (), 2: ("--cluster", "two.yaml")}
    whole = streaming.train("name=whole", *cluster[ranks_after])
    ended = streaming.run("train", "run.yaml", "name=parts", *cluster[ranks], END=ending)
    assert ended.returncode == (0 if "SIGKILL" in ending else 130), ended.stderr
    parts = streaming.train("name=parts", *cluster[ranks_after])
    ours, theirs = losses(whole), losses(parts)
    assert ours.keys() == theirs.keys()
    if ranks == ranks_after:
        assert ours == theirs
        assert weights(whole) == weights(parts)
    else:
        assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4


def test_text_that_changed_is_named_and_there_is_nothing_to_prepare_or_show(streaming: Workplace) -> None:
    ended = streaming.run("train", "run.yaml", END="SIGUSR1 7")
    assert ended.returncode == 130, ended.stderr
    os.utime(streaming.folder / "corpus.txt", (1, 1))
    changed = streaming.run("train", "run.yaml")
    assert changed.returncode == 2
    assert "has changed since it began" in changed.stderr
    assert "corpus.txt of source 'text' is not as it was" in changed.stderr

    directory = RunDirectory(streaming.folder / "runs" / "small")
    shown = (("show", str(directory.root), "--step", "3"), ("verify", str(directory.root)))
    for command in (*shown, ("show", "run.yaml", "--step", "3"), ("prepare", "run.yaml")):
        done = streaming.run("data", *command)
        assert done.returncode == 2
        assert "straight from the text (data.mode: stream)" in done.stderr
        assert "set data.mode: prepared" in done.stderr


def test_validation_text_without_a_block_is_refused_before_the_first_step(streaming: Workplace) -> None:
    done = streaming.run("train", "run.yaml", "data.validation=1e-9")
    assert done.returncode == 2, done.stderr
    assert "the validation text has not one block of 64 tokens" in done.stderr
    assert "data.validation: 0" in done.stderr
    streaming.train("data.validation=0", "train.steps=2", "name=none")
