"""How a run goes on: what a checkpoint says of its data, and the phases of what comes next."""

from __future__ import annotations

from typing import Any

from launcher.config.schema import RunConfig
from launcher.data.phases import Phase, Phases, read_phases
from launcher.errors import RequestError
from launcher.plan.choose import Plan
from launcher.run.checkpoints import Checkpoint
from launcher.run.directory import RunDirectory
from launcher.worker.dataset import TrainingRows

CERTIFIED = 1 << 14
"""Samples before a checkpoint that its certificate covers, at least: a few milliseconds to compute."""


def data_state(rows: TrainingRows, phases: Phases, step: int) -> dict[str, Any]:
    """What the checkpoint of `step` says of its data: all that must be so again where it is taken up.

    `position`: the first sample not taken yet. `trained`: a certificate of the steps before `step`, from
    `trained_from` on. `next`: one of the step to come.
    """
    steps_covered = -(-CERTIFIED // phases.phases[-1].batch_size)
    first = max(0, step - steps_covered)
    return {
        "phases": [phase.as_dict() for phase in phases.phases],
        "position": phases.position(step),
        "trained_from": first,
        "trained": rows.certificate(phases.samples(first, step)),
        "next": rows.certificate(phases.samples(step, step + 1)),
    }


def go_on(
    directory: RunDirectory,
    run: RunConfig,
    rows: TrainingRows,
    checkpoint: Checkpoint | None,
) -> Phases:
    """The phases of a run that goes on from `checkpoint`, or begins; `rows` are made ready for them.

    Raises RequestError where the checkpoint's samples are not what these rows and the order give.
    """
    past = rows.phases([])
    if checkpoint is not None:
        state = checkpoint.state()
        past = rows.phases([Phase.from_dict(each) for each in state["phases"]])
        _check_same_order(state, data_state(rows, past, checkpoint.step), checkpoint)
        rows.take_up(state["cursors"])
    trained_last = read_phases(directory.phases)
    return past.going_on(
        0 if checkpoint is None else checkpoint.step,
        batch_size=run.train.batch_size,
        steps=run.data.skip.step_numbers,
        documents=run.data.skip.documents,
        in_force=rows.phases(trained_last) if trained_last else None,
    )


def check_length(phases: Phases, plan: Plan, start_step: int) -> None:
    """Raise RequestError if the plan's steps do not hold its samples.

    They do not where the newest checkpoint was damaged, and an older one of another batch size is used.
    """
    assert plan.steps is not None
    samples = phases.consumed(plan.steps)
    if samples != plan.samples:
        raise RequestError(
            f"the plan's {plan.steps:,} steps are to hold {plan.samples:,} samples, and hold {samples:,} "
            f"from step {start_step} on, where the newest good checkpoint is",
            hint="run `launcher train` again: it plans anew from there",
        )


def _check_same_order(saved: dict[str, Any], found: dict[str, Any], checkpoint: Checkpoint) -> None:
    wrong = [f"{name} was {saved[name]}, is {now}" for name, now in found.items() if saved[name] != now]
    if wrong:
        raise RequestError(
            f"the text or its order has changed since {checkpoint.folder.name} was saved: {'; '.join(wrong)}",
            hint=(f"the checkpoint was made with {saved['store']}; " if saved["store"] else "")
            + "give a run on other text another name",
        )
