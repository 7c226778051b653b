"""From a draft to a written run directory, wherever that is done: by `submit`, or in the job itself."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from launcher.config.load import load_cluster, load_run
from launcher.data.prepare import Progress
from launcher.errors import RequestError, RunDirectoryError
from launcher.plan.choose import Plan
from launcher.run.assemble import Assembly, Text, assemble, write_rendered, write_run
from launcher.run.checkpoints import committed
from launcher.run.directory import (
    RunDirectory,
    check_goes_on,
    check_same_run,
    has_begun,
    hold,
    run_directory,
)
from launcher.run.environment import describe_environment
from launcher.run.machine import find_machine
from launcher.run.preflight import check_run
from launcher.run.queue import find_job, find_preparation
from launcher.run.samples import say_skip
from launcher.run.saying import Say
from launcher.run.supervise import is_finished
from launcher.run.text import ready_text


def may_begin(draft: Assembly) -> RunDirectory:
    """The directory of a run that may be handed in. Raises what keeps it from that; nothing is written."""
    directory = run_directory(draft.run.config)
    check_run(draft.run.config, draft.plan.strategy, draft.cluster.config.env)
    check_same_run(directory, draft.run.config)
    for found in (find_job(directory), find_preparation(directory)):
        if found is not None and not found.is_over:
            raise RunDirectoryError(
                f"job {found.job} of this run is {found.state}: {directory.root}",
                hint=f"wait for it, or end it: launcher stop {quote(str(directory.root))}",
            )
    return directory


def begin(draft: Assembly, workers: int, progress: Progress, say: Say, launcher: str) -> RunDirectory:
    """Prepare the text where it is not, plan, and write the run directory, ready to be supervised.

    `launcher`: the command's path on the nodes. Raises what preparing and planning raise, and RequestError
    for a run that is finished.
    """
    directory = _begin(draft, workers, progress, say, launcher)
    # Whoever hands it in wants it trained, whatever was asked of it before.
    directory.stop_request.unlink(missing_ok=True)
    return directory


def _begin(draft: Assembly, workers: int, progress: Progress, say: Say, launcher: str) -> RunDirectory:
    directory = run_directory(draft.run.config)
    text = ready_text(draft, workers, progress, say)
    final = planned_anew(draft, text, directory, say)
    directory.root.mkdir(parents=True, exist_ok=True)
    with hold(directory.lock, directory, "another command"):
        if is_finished(directory, final.plan.steps):
            raise RequestError(
                f"run {final.plan.name} is finished; its model is in {directory.model}",
                hint="to train it further, make it longer; one that early stopping ended needs another name",
            )
        write_run(final, directory, text, describe_environment(final.machine, Path.cwd()), launcher)
    return directory


def planned_anew(draft: Assembly, text: Text, directory: RunDirectory, say: Say) -> Assembly:
    """The plan of the draft's run, now that its text is ready. Says what `data.skip` leaves out of it.

    Raises RunDirectoryError for a run that has begun and may not go on so, RequestError for one that early
    stopping has ended, and what `say_skip` raises.
    """
    final = assemble(draft.run, draft.cluster, draft.machine, text)
    check_goes_on(directory, final.plan, text.store)
    _check_takes_steps(directory, final.plan)
    if text.store:
        say_skip(final.run.config, final.plan, text.store, directory, say)
    return final


def _check_takes_steps(directory: RunDirectory, plan: Plan) -> None:
    """Raise RequestError where a run that early stopping has ended is planned for another length."""
    newest = next((each for each in reversed(committed(directory.checkpoints)) if not each.misfits()), None)
    if newest is None or not newest.state()["best"]["is_final"]:
        return
    if plan.steps != directory.read_orders().plan.steps:
        raise RequestError(
            f"run {plan.name} was ended at step {newest.step} by train.early_stopping, and takes no more "
            "steps",
            hint="give the longer run another name, and train.early_stopping more patience or null",
            key="train.early_stopping",
        )


def write_draft(draft: Assembly, directory: RunDirectory, launcher: str) -> None:
    """Write the directory of a run whose text is prepared elsewhere: `begin_in_job` plans it anew.

    Raises RunDirectoryError for a run that has begun.
    """
    if has_begun(directory):
        raise RunDirectoryError(
            f"run {directory.root.name!r} has begun: its text is prepared",
            hint="leave --prepare out",
        )
    write_rendered(draft, directory, None, launcher)


def is_draft(directory: RunDirectory) -> bool:
    """Whether a run is only drafted: it is planned in its job, once its text is there."""
    return directory.read_orders().store is None and directory.read_config().data.mode != "stream"


def begin_in_job(directory: RunDirectory, progress: Progress, say: Say, launcher: str) -> None:
    """Plan a drafted run, in the job that waited for its text. What of that is not prepared yet is prepared
    here."""
    machine = find_machine()
    draft = assemble(load_run(directory.config), load_cluster(directory.cluster), machine)
    _begin(draft, machine.cores, progress, say, launcher)
