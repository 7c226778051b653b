"""What `launcher data show` is pointed at: a token store, a run directory, or a run.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.errors import RequestError, RunDirectoryError
from launcher.run.assemble import Assembly, assemble, check_prepared, store_folder
from launcher.run.directory import RunDirectory, check_same_run, run_directory
from launcher.run.samples import Samples, as_it_goes_on, as_trained
from launcher.run.text import find_text


@dataclass(frozen=True, slots=True)
class Subject:
    """A token store, and the run that reads it where one was given: its configuration and steps."""

    store: Path
    directory: RunDirectory
    run: RunConfig | None = None
    steps: int | None = None
    trained: bool = False
    """Whether what was given is the run as it was trained, not as it would go on."""

    def samples(self) -> Samples:
        """Which samples are in which step. Raises RunDirectoryError for a store alone."""
        if self.run is None:
            raise RunDirectoryError(
                f"{self.directory.root} is not a run directory, and a step belongs to a run",
                hint="give a run.yaml, or the folder that `launcher train` made, such as runs/NAME",
            )
        if self.trained:
            return as_trained(self.directory, self.store)
        return as_it_goes_on(self.run, self.store, self.directory)


def subject_of_folder(given: Path) -> Subject:
    """A store's folder or a run's. Raises RunDirectoryError for a run whose text is not prepared."""
    directory = RunDirectory(given.absolute())
    if not directory.orders.is_file():
        return Subject(given, directory)
    plan = directory.read_orders().plan
    return Subject(store_folder(given), directory, directory.read_config(), plan.steps, trained=True)


def subject_of_run(draft: Assembly) -> Subject:
    """The run that a run.yaml asks for, as `launcher train` would begin it or go on with it.

    Raises RequestError where its text is not prepared, RunDirectoryError where another run has its name.
    """
    run = draft.run.config
    directory = run_directory(run)
    check_prepared(run)
    check_same_run(directory, run)
    prepared = find_text(draft)
    if prepared is None:
        raise RequestError(
            f"the text of run {run.name!r} is not prepared", hint="run `launcher data prepare RUN` first"
        )
    plan = assemble(draft.run, draft.cluster, draft.machine, prepared).plan
    return Subject(prepared.store, directory, run, plan.steps)
