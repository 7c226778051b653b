"""Runs whose batch size or bans change on the way: the tokens that entered the model, step by step."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataSection
from launcher.data.blocks import Blocks
from launcher.data.mixture import training_order
from launcher.data.store import open_store
from launcher.run.directory import RunDirectory
from tests.conftest import Workplace, metrics, small_run, write_json

RECORD = """
import json, os, signal
from transformers import TrainerCallback

class Record(TrainerCallback):
    '''Writes the rows each rank trains on, and stops the run after the step that follows STOP.'''

    def on_train_begin(self, args, state, control, model, **_):
        file = open(f"rows-{args.process_index}.jsonl", "a")

        def note(module, _, inputs):
            if module.training:
                rows = inputs["input_ids"].tolist()
                print(json.dumps({"step": state.global_step + 1, "rows": rows}), file=file, flush=True)

        model.register_forward_pre_hook(note, with_kwargs=True)

    def on_step_end(self, args, state, control, **_):
        if str(state.global_step) == os.environ.get("STOP") and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGUSR1)
"""

Rows = dict[int, Counter[tuple[int, ...]]]


@pytest.fixture
def recorded(workplace: Workplace) -> Workplace:
    """The workplace, whose runs write down the rows that enter the model."""
    (workplace.folder / "recording.py").write_text(RECORD)
    run = small_run()
    run["train"] |= {"callbacks": ["recording:Record"], "eval_every": 1000}
    run["checkpoint"] = {"every": 5, "keep": 9}
    write_json(workplace.folder / "run.yaml", run)
    return workplace


def rows_of(workplace: Workplace) -> Rows:
    """The rows of each step over all ranks since this was last asked."""
    found: Rows = {}
    for file in workplace.folder.glob("rows-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            found.setdefault(line["step"], Counter()).update(tuple(row) for row in line["rows"])
        file.unlink()
    return found


def expected_rows(directory: Path, samples: dict[int, list[int]]) -> Rows:
    """The rows of these samples, read from the store with nothing but the order's own indexing."""
    run = RunDirectory(directory)
    config, store = run.read_config(), run.read_orders().store
    assert store is not None
    data = DataSection(train=["corpus.txt"])
    blocks = Blocks(open_store(Path(store)), "train", 64, "concat")
    order = training_order(blocks, data, config.seed)
    return {
        step: Counter(tuple(blocks.read(0, order[sample].block).tolist()) for sample in own)
        for step, own in samples.items()
    }


def consecutive(first_step: int, first_sample: int, batch_size: int, steps: int) -> dict[int, list[int]]:
    """Steps, counted from 1, that take one sample after another."""
    return {
        first_step + n: list(range(first_sample + n * batch_size, first_sample + (n + 1) * batch_size))
        for n in range(steps)
    }


def noted(directory: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of its data."""
    text = (directory / "checkpoints" / f"step-{step:08d}" / "launcher.json").read_text()
    return {key: value for key, value in json.loads(text).items() if key not in ("store", "best")}


def stopped(workplace: Workplace, after: int, *arguments: str) -> None:
    done = workplace.run("train", "run.yaml", *arguments, STOP=str(after))
    assert done.returncode == 130, done.stderr


def test_batch_size_and_world_change_on_the_way_and_no_sample_is_lost_or_repeated(
    recorded: Workplace,
) -> None:
    length = ("train.tokens=10240", "train.schedule=linear", "train.warmup=0.1")
    stopped(recorded, 8, *length)
    directory = recorded.folder / "runs" / "small"
    assert rows_of(recorded) == expected_rows(directory, consecutive(1, 0, 8, 9))

    stopped(recorded, 12, *length, "train.batch_size=16", "--cluster", "two.yaml")
    assert rows_of(recorded) == expected_rows(directory, consecutive(10, 72, 16, 4))
    # 160 samples are asked for; 72 + 4 x 16 are trained: 24 are left, which is 6 steps of 4.
    recorded.train(*length, "train.batch_size=4")
    assert rows_of(recorded) == expected_rows(directory, consecutive(14, 136, 4, 6))

    listed = json.loads(recorded.run("checkpoint", "list", str(directory), "--json").stdout)
    assert [(each["step"], each["samples"]) for each in listed] == [
        *((5, 40), (9, 72), (10, 88), (13, 136), (15, 144), (19, 160)),
    ]
    rates = {line["step"]: line["learning_rate"] for line in metrics(directory) if "loss" in line}
    trained = {step: 8 * step for step in range(1, 10)}
    trained |= {0: 0} | {9 + n: 72 + 16 * n for n in range(1, 5)} | {13 + n: 136 + 4 * n for n in range(1, 7)}
    assert rates.keys() == trained.keys() - {0}
    for step in range(3, 20):  # two steps of warmup, then a line to zero over the samples
        whole = 168 if 10 <= step <= 13 else 160  # at 16 a step the last one would go over
        assert rates[step] == pytest.approx(1e-3 * (whole - trained[step - 1]) / (whole - 16))
    for step, samples in ((9, range(64, 72)), (11, range(88, 104)), (19, range(156, 160))):
        shown = json.loads(recorded.run("data", "show", str(directory), "--step", str(step), "--json").stdout)
        assert [row["sample"] for row in shown["rows"]] == list(samples)
    again = recorded.run("train", "run.yaml", *length, "train.batch_size=4")
    assert "is finished" in again.stderr


def test_text_is_banned_after_a_spike_and_stays_so_on_any_world(recorded: Workplace) -> None:
    directory = recorded.train()
    rows_of(recorded)
    late = recorded.run("train", "run.yaml", "data.skip.steps=[12,14-15]")
    assert late.returncode == 2
    assert "step 12 was trained before the newest checkpoint, of step 20" in late.stderr
    assert "to go back to step 10, move the checkpoints after it out of" in late.stderr
    beyond = recorded.run("train", "run.yaml", "data.skip.steps=[14-21]")
    assert "the run has 20 steps, and 14-21 is beyond them" in beyond.stderr
    nowhere = recorded.run("train", "run.yaml", "data.skip.documents=[train-00000:99999]")
    assert nowhere.returncode == 2
    assert "there is no document train-00000:99999 in the train text" in nowhere.stderr

    unplanned = recorded.run("plan", "run.yaml", "data.skip.documents=[train-00000:99999]")
    assert unplanned.returncode == 2
    assert "there is no document train-00000:99999 in the train text" in unplanned.stderr
    planned = recorded.run("plan", "run.yaml", "data.skip.steps=[22]", "train.steps=25")
    assert planned.returncode == 0, planned.stderr
    assert "data.skip leaves out 8 samples from step 21 on" in planned.stderr

    for step in (15, 20):
        shutil.move(directory / "checkpoints" / f"step-{step:08d}", recorded.folder)
    shutil.copytree(directory, recorded.folder / "runs" / "one")
    skip = "data.skip.steps=[12,14-15]"
    went_on = recorded.run("train", "run.yaml", skip)
    assert went_on.returncode == 0, went_on.stderr
    assert "data.skip leaves out 24 samples from step 11 on" in went_on.stderr
    left = {11: range(80, 88), 12: range(96, 104), 13: range(120, 128)}
    after = {step: list(samples) for step, samples in left.items()} | consecutive(14, 128, 8, 7)
    assert rows_of(recorded) == expected_rows(directory, after)

    shown = json.loads(recorded.run("data", "show", str(directory), "--step", "13", "--json").stdout)
    assert [row["sample"] for row in shown["rows"]] == after[13]
    for given in (str(directory), "run.yaml"):
        further = recorded.run("data", "show", given, "--step", "21")
        assert (further.returncode, "the run has 20 steps" in further.stderr) == (2, True)

    # The same, stopped and taken up on two ranks with no skip in the way that they could find by themselves.
    for each in ("config.yaml", "plan.json"):
        text = (recorded.folder / "runs" / "one" / each).read_text()
        (recorded.folder / "runs" / "one" / each).write_text(text.replace("name: small", "name: one"))
    stopped(recorded, 13, "name=one", skip)
    two = recorded.train("name=one", skip, "--cluster", "two.yaml")
    taken = rows_of(recorded)
    assert taken == expected_rows(two, after)
    assert noted(two, 15) == noted(directory, 15)
    assert noted(two, 20) == noted(directory, 20)

    # Later a document is banned too: from there on, and what was banned before stays as it was.
    place = RunDirectory(directory)
    store = open_store(Path(str(place.read_orders().store)))
    blocks = Blocks(store, "train", 64, "concat")
    order = training_order(blocks, DataSection(train=["corpus.txt"]), 1337)
    spiky = blocks.describe(0, order[190].block)[1].name
    grown = recorded.run("train", "run.yaml", "train.steps=24", skip, f"data.skip.documents=[{spiky}]")
    assert grown.returncode == 0, grown.stderr
    holding = set(blocks.holding(spiky)[1].tolist())
    free = [p for p in range(184, 300) if order[p].block not in holding][:32]
    assert 190 not in free
    assert rows_of(recorded) == expected_rows(
        directory, {21 + n: free[8 * n : 8 * (n + 1)] for n in range(4)}
    )
