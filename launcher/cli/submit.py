"""The commands for SLURM: hand a run in, and read a job script for its faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import console
from launcher.cli.arguments import AsJson, Overrides, RunFile, Workers, assembled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.run.assemble import Assembly
    from launcher.run.directory import RunDirectory

app = typer.Typer()

ThenRuns = Annotated[
    list[Path] | None,
    typer.Option(
        "--then", metavar="RUN", help="A run to start once this one has finished well; may be repeated."
    ),
]
Axes = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=A,B",
        help="One run for each value, as an array of jobs; repeated: each combination.",
    ),
]


@app.command(epilog="Example: launcher submit run.yaml --cluster cluster.yaml --wait")
def submit(
    run: RunFile,
    cluster: Annotated[Path, typer.Option("--cluster", metavar="FILE", help="The cluster.yaml.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job script, and neither write nor submit anything.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the run ends, and exit as it does.")
    ] = False,
    then: ThenRuns = None,
    sweep: Axes = None,
    prepare: Annotated[
        int | None,
        typer.Option(
            "--prepare",
            metavar="N",
            min=1,
            help="Prepare the text in N jobs without GPUs, and train after them.",
        ),
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Train on a SLURM cluster: prepare the text if needed, then hand in a job; again goes on."""
    from launcher.run.beginning import may_begin, write_draft
    from launcher.run.submitting import (
        check_preparation,
        check_slurm,
        check_submission,
        submit_preparation,
        submit_run,
        submit_sweep,
        variations,
    )

    changes = variations(sweep or [])
    drafts = [_varied(run, overrides, cluster, change) for change in changes]
    following = [assembled(each, None, cluster) for each in then or []]
    for draft in (*drafts, *following):
        check_slurm(draft.cluster.config)
    if dry_run:
        _show(drafts, following, _sweep_folder(run, overrides, cluster, drafts) if sweep else None, prepare)
        return
    for draft in (*drafts, *following):
        check_submission(draft, console.say)
    jobs: list[tuple[str, Path]] = []
    if prepare is not None:
        check_preparation(drafts[0], is_sweep=bool(sweep))
        directory = may_begin(drafts[0])
        write_draft(drafts[0], directory, _launcher())
        array = submit_preparation(drafts[0], directory, _launcher(), prepare, console.say)
        jobs.append((array, directory.root))
    elif sweep:
        directories = [_written(draft, workers) for draft in drafts]
        folder = _sweep_folder(run, overrides, cluster, drafts)
        array = submit_sweep(drafts, folder, _launcher())
        jobs += [(f"{array}_{index}", each.root) for index, each in enumerate(directories)]
    else:
        directory = _written(drafts[0], workers)
        array = submit_run(directory, None, console.say)
        jobs.append((array, directory.root))
    for draft in following:
        directory = _written(draft, workers)
        array = submit_run(directory, array, console.say)
        jobs.append((array, directory.root))
    if as_json:
        console.answer_json([{"job": job, "directory": str(root)} for job, root in jobs])
    else:
        for job, root in jobs:
            console.answer(f"{job}  {root}")
    if wait:
        _wait(jobs)


def _varied(run: Path, overrides: list[str] | None, cluster: Path, change: Mapping[str, str]) -> Assembly:
    """The plan of one run of a sweep, under its own name; of the run itself where nothing is changed."""
    from launcher.run.submitting import variation_name

    if not change:
        return assembled(run, overrides, cluster)
    name = variation_name(assembled(run, overrides, cluster).run.config.name, change)
    more = [f"{key}={value}" for key, value in change.items()]
    return assembled(run, [*(overrides or []), *more, f"name={json.dumps(name)}"], cluster)


def _sweep_folder(run: Path, overrides: list[str] | None, cluster: Path, drafts: list[Assembly]) -> Path:
    """Where the script of a sweep goes: beside its runs."""
    from launcher.run.directory import run_directory

    asked = assembled(run, overrides, cluster).run.config.name
    return run_directory(drafts[0].run.config).root.with_name(f"{asked}.sweep")


def _show(drafts: list[Assembly], following: list[Assembly], sweep: Path | None, prepare: int | None) -> None:
    """Print every script that would be handed in, in that order."""
    from launcher.run.directory import run_directory
    from launcher.run.submitting import check_preparation, preparation_script, sweep_script

    if prepare is not None:
        check_preparation(drafts[0], is_sweep=sweep is not None)
        directory = run_directory(drafts[0].run.config)
        console.answer(preparation_script(drafts[0], directory, _launcher(), prepare).rstrip("\n"))
    if sweep is not None:
        console.answer(sweep_script(drafts, sweep, _launcher()).rstrip("\n"))
    for draft in following if sweep else (*drafts, *following):
        console.answer(_script(draft))


def _script(draft: Assembly) -> str:
    from launcher.run.assemble import going_on, rendered_files
    from launcher.run.directory import run_directory

    directory = run_directory(draft.run.config)
    files = rendered_files(going_on(draft, console.say), directory, None, _launcher())
    return files[directory.job].rstrip("\n")


def _launcher() -> str:
    from launcher.run.submitting import launcher_here

    return launcher_here()


def _written(draft: Assembly, workers: int | None) -> RunDirectory:
    """The directory of the run, ready to be supervised."""
    from launcher.run.beginning import begin, may_begin

    may_begin(draft)
    return begin(draft, workers or draft.machine.cores, console.Bar("preparing"), console.say, _launcher())


def _wait(jobs: list[tuple[str, Path]]) -> None:
    """Wait for every job; exit as the first run that did not finish. Raises SystemExit."""
    from launcher.run.directory import RunDirectory
    from launcher.run.submitting import how_it_ended, wait_for

    code = 0
    for job, root in jobs:
        ended = how_it_ended(RunDirectory(root), wait_for(job, console.say))
        console.say(f"{root}: {ended.words}")
        code = code or ended.exit_code
    raise SystemExit(code)


@app.command(epilog="Example: launcher lint train.sbatch")
def lint(
    script: Annotated[Path, typer.Argument(metavar="JOB", help="A job script for sbatch, whoever wrote it.")],
    as_json: AsJson = False,
) -> None:
    """Read a job script for the faults that job scripts have, each with its line and remedy.

    It exits with 1 where it finds any."""
    from dataclasses import asdict

    from launcher.errors import RequestError
    from launcher.render.lint import is_job_script
    from launcher.render.lint import lint as faults_in

    try:
        text = script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{script} cannot be read: {error}", hint="name a job script") from error
    if not is_job_script(text):
        raise RequestError(
            f"{script} is no job script: it has neither #! in its first line nor #SBATCH in another",
            hint="name what sbatch is given",
        )
    found = faults_in(text)
    if as_json:
        console.answer_json([asdict(finding) for finding in found])
    else:
        for finding in found:
            console.answer(
                f"{script}:{finding.line}: {finding.rule}: {finding.message}\n  hint: {finding.remedy}"
            )
    if found:
        raise SystemExit(1)
    console.say(f"{script}: none of the known faults")
