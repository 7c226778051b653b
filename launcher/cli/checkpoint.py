"""The commands on a run's checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher import console
from launcher.cli.arguments import AsJson, RunFolder

app = typer.Typer(help="The ledger of a run's checkpoints.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list", epilog="Example: launcher checkpoint list runs/gpt2-shakespeare")
def checkpoint_list(
    run_dir: RunFolder,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare it with the manifest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a run's committed checkpoints, oldest first."""
    from datetime import datetime

    from launcher.run.checkpoints import committed
    from launcher.run.directory import RunDirectory

    directory = RunDirectory(run_dir.absolute())
    directory.read_orders()
    found = [(each, each.damage() if verify else None) for each in committed(directory.checkpoints)]
    if as_json:
        console.answer_json(
            [
                {
                    "step": each.step,
                    "samples": each.samples,
                    "bytes": each.bytes,
                    "created": each.created,
                    "folder": str(each.folder),
                    "damage": damage,
                }
                for each, damage in found
            ]
        )
        return
    states = {True: "good", False: "DAMAGED"}
    rows = [
        (
            f"{each.step}",
            f"{each.samples}",
            console.gibibytes(each.bytes),
            datetime.fromtimestamp(each.created).isoformat(" ", "seconds"),
            "not read" if damage is None else states[not damage],
        )
        for each, damage in found
    ]
    console.answer(
        console.table(("step", "samples", "size", "saved", "state"), rows) if rows else "no checkpoint yet"
    )
