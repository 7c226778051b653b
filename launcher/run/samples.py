"""Which samples are in which step of a run, told without running it; and what `data.skip` leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.config.values import steps_in
from launcher.data.blocks import Blocks
from launcher.data.mixture import training_order
from launcher.data.order import Order
from launcher.data.phases import Phase, Phases, read_phases
from launcher.data.skipping import bans
from launcher.data.store import open_store
from launcher.errors import RequestError
from launcher.plan.choose import Plan
from launcher.run.checkpoints import committed
from launcher.run.directory import RunDirectory
from launcher.run.saying import Say


@dataclass(frozen=True, slots=True)
class Samples:
    """The training text of a run, and which of it is in each step."""

    blocks: Blocks
    order: Order
    phases: Phases


def as_it_goes_on(run: RunConfig, store: Path, directory: RunDirectory) -> Samples:
    """The samples of `run` were it to go on now, from its newest checkpoint or from its start.

    Raises RequestError for a document in data.skip that is not in the training text.
    """
    blocks = Blocks(open_store(store), "train", run.data.block_size, run.data.packing)
    order = training_order(blocks, run.data, run.seed)
    banned = bans(order, blocks)
    step, past = 0, Phases([], banned)
    if checkpoints := committed(directory.checkpoints):
        step = checkpoints[-1].step
        past = Phases([Phase.from_dict(each) for each in checkpoints[-1].state()["phases"]], banned)
    trained_last = read_phases(directory.phases)
    phases = past.going_on(
        step,
        batch_size=run.train.batch_size,
        steps=run.data.skip.step_numbers,
        documents=run.data.skip.documents,
        in_force=Phases(trained_last, banned) if trained_last else None,
    )
    return Samples(blocks, order, phases)


def as_trained(directory: RunDirectory, store: Path) -> Samples:
    """The samples of the run in `directory` as it was trained last; before it began, as it would be."""
    samples = as_it_goes_on(directory.read_config(), store, directory)
    trained_last = read_phases(directory.phases)
    if not trained_last:
        return samples
    return Samples(samples.blocks, samples.order, Phases(trained_last, bans(samples.order, samples.blocks)))


def say_skip(run: RunConfig, plan: Plan, store: Path, directory: RunDirectory, say: Say) -> None:
    """Say what `data.skip` leaves out of the run from here on, where it names anything.

    Raises RequestError for steps and documents that the run has not, and for steps that were trained before
    its newest checkpoint.
    """
    skip = run.data.skip
    if not skip.steps and not skip.documents:
        return
    assert plan.steps is not None
    beyond = [entry for entry in skip.steps if steps_in(entry)[-1] > plan.steps]
    if beyond:
        raise RequestError(
            f"data.skip.steps: the run has {plan.steps:,} steps, and {beyond[0]} is beyond them",
            hint="steps are counted from 1, as in metrics.jsonl",
            key="data.skip.steps",
        )
    samples = as_it_goes_on(run, store, directory)
    for document in skip.documents:
        samples.blocks.holding(document)
    phases = samples.phases
    begun = phases.phases[-1]
    _check_not_trained(phases, directory)
    taken = phases.consumed(plan.steps) - phases.consumed(begun.first_step)
    left_out = phases.position(plan.steps) - begun.first_sample - taken
    say(
        f"data.skip leaves out {left_out:,} samples from step {begun.first_step + 1:,} on; "
        "those that follow take their places"
    )


def _check_not_trained(phases: Phases, directory: RunDirectory) -> None:
    """Raise RequestError for a step that is named now and was trained before the newest checkpoint."""
    checkpoints = committed(directory.checkpoints)
    newest = checkpoints[-1].step if checkpoints else 0
    known = phases.before(newest).phases
    named = phases.phases[-1].skip.steps.keys() - (known[-1].skip.steps.keys() if known else set())
    trained = sorted(step for step in named if step <= newest)
    if not trained:
        return
    older = [checkpoint.step for checkpoint in checkpoints if checkpoint.step < trained[0]]
    raise RequestError(
        f"data.skip.steps: step {trained[0]:,} was trained before the newest checkpoint, of step {newest:,}, "
        "and cannot be taken back",
        hint=f"to go back to step {older[-1]:,}, move the checkpoints after it out of {directory.checkpoints}"
        if older
        else "no checkpoint from before it is left: give a new run another name, or take the step out",
        key="data.skip.steps",
    )
