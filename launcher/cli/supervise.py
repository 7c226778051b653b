"""`launcher supervise`: what `train` ends in, and a job script."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from shlex import quote
from typing import TYPE_CHECKING

import typer

from launcher import console
from launcher.cli.arguments import RunFolder

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory
    from launcher.run.launching import Launching

app = typer.Typer()

TRIED = "its nodes were tried"
"""What a job does once its text is there, before its ranks run."""


@app.command(epilog="Example: launcher supervise runs/gpt2-shakespeare")
def supervise(run: RunFolder) -> None:
    """Train a run directory as it is written, until it ends: what `train` and a job script do."""
    from launcher.run.beginning import begin_in_job, is_draft
    from launcher.run.directory import RunDirectory
    from launcher.run.holding import only_supervisor
    from launcher.run.in_time import in_time
    from launcher.run.preparing import stoppable
    from launcher.run.requests import forget_all_but_persons
    from launcher.run.slurm import own_job
    from launcher.run.submitting import launcher_here

    directory = RunDirectory(run.absolute())
    with launching_of(directory) as launching:
        if own_job() is not None and is_draft(directory):
            forget_all_but_persons(directory)
            with stoppable(directory, launching, console.say):
                begin_in_job(directory, console.Bar("preparing"), console.say, launcher_here())
        with only_supervisor(directory, launching, console.say):
            forget_all_but_persons(directory)
            with in_time(directory, launching, TRIED, console.say):
                launching.check_nodes()
            train_to_the_end(directory, launching)


@contextmanager
def launching_of(directory: RunDirectory) -> Iterator[Launching]:
    """How the ranks of a written run are started here. Raises RequestError where they cannot be."""
    from launcher.config.load import load_cluster
    from launcher.errors import RequestError
    from launcher.run.local import Local
    from launcher.run.slurm_ranks import Slurm

    plan, cluster = directory.read_orders().plan, load_cluster(directory.cluster).config
    if cluster.launch == "slurm":
        with Slurm(directory, cluster).in_touch() as launching:
            yield launching
    elif plan.nodes > 1:
        raise RequestError(
            f"this run is planned for {plan.nodes} nodes",
            hint=f"on each of the {plan.nodes} nodes: sh {quote(str(directory.launch))} NODE HOST PORT",
        )
    else:
        yield Local(directory, cluster.env)


def train_to_the_end(directory: RunDirectory, launching: Launching) -> None:
    """Supervise the run, which is held, and say where its model is. Raises what `run.supervise` does."""
    from launcher.run.supervise import is_finished, supervise

    plan = directory.read_orders().plan
    if is_finished(directory, plan.steps):
        console.say(f"run {plan.name} is finished; its model is in {directory.model}")
        return
    step = supervise(directory, launching, console.say)
    console.say(f"finished at step {step}; the model is in {directory.model}")
    console.say(f"next: launcher generate {quote(str(directory.root))}")
