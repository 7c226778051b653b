"""What a checkpoint says of its data, and who is refused for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.config.schema import RunConfig
from launcher.data.blocks import Blocks
from launcher.data.order import Order
from launcher.data.phases import Phase, Phases, phases_text
from launcher.errors import RequestError
from launcher.plan.batch import Done
from launcher.plan.choose import Place, make_plan
from launcher.plan.hardware import find_gpu
from launcher.run import checkpoints as ledger
from launcher.run.directory import RunDirectory
from launcher.worker.dataset import StoredRows, TrainingRows
from launcher.worker.resume import CERTIFIED, check_length, data_state, go_on


def rows(blocks: int = 1000, seed: int = 1) -> TrainingRows:
    return StoredRows(cast("Blocks", None), Order([(blocks, 1.0)], seed), 800)


def asked(batch_size: int = 8, **skip: list[str]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "small",
            "model": {"name": "gpt2"},
            "data": {"train": ["text"], "skip": skip},
            "train": {"batch_size": batch_size, "tokens": 800, "warmup": 0},
        }
    )


def saved(directory: RunDirectory, phases: Phases, step: int, **changed: Any) -> ledger.Checkpoint:
    temporary = ledger.begin(directory.checkpoints, step)
    state = {"store": "/stores/0123", **data_state(rows(), phases, step), "cursors": {}, **changed}
    (temporary / ledger.STATE).write_text(json.dumps(state))
    return ledger.commit(temporary, step=step, samples=phases.consumed(step), world_size=1, created=0.0)


def test_a_run_goes_on_by_the_phases_of_its_checkpoint(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    begun = go_on(directory, asked(), rows(), None)
    assert [(p.first_step, p.first_sample, p.batch_size) for p in begun.phases] == [(0, 0, 8)]
    checkpoint = saved(directory, begun, 10)
    assert go_on(directory, asked(), rows(), checkpoint).phases == begun.phases
    larger = go_on(directory, asked(12), rows(), checkpoint)
    assert [(p.first_step, p.first_sample, p.batch_size) for p in larger.phases[1:]] == [(10, 80, 12)]
    assert go_on(directory, asked(12), rows(), saved(directory, larger, 15)).phases == larger.phases


def test_a_step_that_is_banned_is_what_the_run_held_when_it_was_trained_last(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    begun = go_on(directory, asked(), rows(), None)
    checkpoint = saved(directory, begun, 10)
    once = go_on(directory, asked(steps=["13"]), rows(), checkpoint)
    assert once.phases[-1].skip.steps == {13: ((96, 104),)}
    directory.phases.write_text(phases_text(once.phases))
    # From the same old checkpoint, which knows nothing of the first ban.
    twice = go_on(directory, asked(steps=["13-14"]), rows(), checkpoint)
    assert twice.phases[-1].skip.steps == {13: ((96, 104),), 14: ((112, 120),)}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"next": "0"}, "next was 0, is "),
        ({"trained": "0"}, "trained was 0, is "),
        ({"position": 81}, "position was 81, is 80"),
    ],
)
def test_a_checkpoint_whose_samples_are_not_these_is_refused(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    directory = RunDirectory(tmp_path)
    checkpoint = saved(directory, go_on(directory, asked(), rows(), None), 10, **changed)
    with pytest.raises(RequestError, match="order has changed since step-00000010 was saved") as refused:
        go_on(directory, asked(), rows(), checkpoint)
    assert named in refused.value.message
    assert "/stores/0123" in (refused.value.hint or "")


@pytest.mark.parametrize("other", [rows(500), rows(seed=2)])
def test_other_text_or_another_seed_is_refused(tmp_path: Path, other: TrainingRows) -> None:
    directory = RunDirectory(tmp_path)
    checkpoint = saved(directory, go_on(directory, asked(), rows(), None), 10)
    with pytest.raises(RequestError, match="order has changed"):
        go_on(directory, asked(), other, checkpoint)


@pytest.mark.parametrize("batch_size", [7, 512, 2 * CERTIFIED])
def test_a_certificate_covers_enough_and_not_all(batch_size: int) -> None:
    phases = rows().phases([Phase.from_dict(START | {"batch_size": batch_size})])
    state = data_state(rows(), phases, 10**7)
    covered = (10**7 - state["trained_from"]) * batch_size
    assert CERTIFIED <= covered < CERTIFIED + batch_size + 2 * batch_size
    order = Order([(1000, 1.0)], 1)
    start = state["trained_from"] * batch_size
    assert state["trained"] == order.certificate([range(start, start + covered)])
    assert data_state(rows(), phases, 1)["trained"] == order.certificate([range(batch_size)])


START: dict[str, Any] = {"first_step": 0, "first_sample": 0, "skip": {"steps": {}, "documents": []}}


def test_a_plan_from_a_checkpoint_that_turned_out_damaged_is_made_anew(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    begun = go_on(directory, asked(), rows(), None)
    older, newer = saved(directory, begun, 10), saved(directory, begun, 20)
    place = Place("here", 1, 1, find_gpu("cpu"))
    run = asked(40)
    run = run.model_copy(update={"data": run.data.model_copy(update={"block_size": 1})})
    plan = make_plan(run, place, shape=None, positions=None, blocks=None, done=Done(20, 160, 0))
    check_length(go_on(directory, run, rows(), newer), plan, 20)
    with pytest.raises(
        RequestError, match="36 steps are to hold 800 samples, and hold 1,120 from step 10"
    ) as no:
        check_length(go_on(directory, run, rows(), older), plan, 10)
    assert "launcher train" in (no.value.hint or "")
