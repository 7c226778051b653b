"""The commands on token stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher import console
from launcher.cli.arguments import AsJson, ClusterFile, Overrides, RunFile, Workers, assembled
from launcher.errors import RequestError

app = typer.Typer(
    help="The token store: prepare it, verify it, look into it.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("prepare", epilog="Example: launcher data prepare run.yaml --units $SLURM_ARRAY_TASK_ID/8")
def data_prepare(
    run: RunFile,
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    workers: Workers = None,
    units: Annotated[
        str,
        typer.Option(
            "--units",
            metavar="I/N",
            help="Do the I-th of N parts; whoever finishes the last one finishes the store.",
        ),
    ] = "1/1",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out records that cannot be read, and record each.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a run's text into its token store, once; training does this itself where it is needed.

    What is finished is kept: the same command goes on where it was stopped. A damaged store is mended."""
    from launcher.data.units import parse_slice
    from launcher.run.assemble import check_prepared
    from launcher.run.preflight import check_folders
    from launcher.run.text import prepare_text

    part = parse_slice(units)
    draft = assembled(run, overrides, cluster)
    check_prepared(draft.run.config)
    check_folders(draft.run.config)
    cores, bar = workers or draft.machine.cores, console.Bar("preparing")
    prepared = prepare_text(draft, cores, bar, console.say, part=part, skip_bad=skip_bad)
    if as_json:
        console.answer_json(
            {"store": str(prepared.store), "vocabulary": prepared.vocabulary} if prepared else None
        )
    elif prepared:
        console.answer(str(prepared.store))


@app.command("verify", epilog="Example: launcher data verify runs/.stores/1f6c...")
def data_verify(
    store: Annotated[
        Path, typer.Argument(metavar="STORE_OR_RUN_DIR", help="A token store, or a run that uses one.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a token store and compare it with its manifest; set damaged files aside."""
    from launcher.data.damage import set_aside, verify_store
    from launcher.run.assemble import store_folder

    found = verify_store(store_folder(store))
    damage = [str(each) for each in found]
    if as_json:
        console.answer_json({"store": str(store), "damage": damage})
    elif not damage:
        console.answer(f"{store}: every file is as it was written")
    for each in damage:
        console.say(f"damaged: {each}")
    if damage:
        set_aside(found)
        raise RequestError(
            f"{store}: {len(damage)} damaged files, which are set aside",
            hint="`launcher data prepare RUN` makes them again, to the same bytes",
        )


@app.command("show", epilog="Example: launcher data show runs/gpt2-shakespeare --step 100")
def data_show(
    given: Annotated[
        Path,
        typer.Argument(
            metavar="STORE_OR_RUN",
            help="A token store; a run's folder, as trained; a run.yaml, as it goes on.",
        ),
    ],
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="A run's optimizer step: which text is in it.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="How many documents to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what is in a token store, or which text is in one step of a run, without running it."""
    from launcher.run.show import show_store
    from launcher.run.show_step import show_step
    from launcher.run.subject import subject_of_folder, subject_of_run

    if given.is_file():
        subject = subject_of_run(assembled(given, overrides, cluster))
    elif overrides or cluster:
        raise RequestError(f"{given} is a folder: KEY=VALUE and --cluster go with a run.yaml")
    else:
        subject = subject_of_folder(given)
    if step is None:
        shown = show_store(subject.store, subject.run, samples)
    else:
        shown = show_step(subject.samples(), subject.steps, step)
    if as_json:
        console.answer_json(shown.as_json)
    else:
        console.answer(shown.text)
