"""The commands on a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import console
from launcher.cli.arguments import AsJson, RunFolder
from launcher.errors import RequestError
from launcher.sizes import size_in_words

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory

app = typer.Typer(help="The ledger of a run's checkpoints.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list", epilog="Example: launcher checkpoint list runs/gpt2-shakespeare")
def checkpoint_list(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """List a run's committed checkpoints, oldest first."""
    from datetime import datetime

    from launcher.run.checkpoints import committed

    found = committed(_directory(run_dir).checkpoints)
    if as_json:
        console.answer_json(
            [
                {
                    "step": each.step,
                    "samples": each.samples,
                    "bytes": each.bytes,
                    "created": each.created,
                    "folder": str(each.folder),
                }
                for each in found
            ]
        )
        return
    rows = [
        (
            f"{each.step}",
            f"{each.samples}",
            size_in_words(each.bytes),
            datetime.fromtimestamp(each.created).isoformat(" ", "seconds"),
        )
        for each in found
    ]
    console.answer(console.table(("step", "samples", "size", "saved"), rows) if rows else "no checkpoint yet")


@app.command("verify", epilog="Example: launcher checkpoint verify runs/gpt2-shakespeare 500")
def checkpoint_verify(
    run_dir: RunFolder,
    step: Annotated[
        int | None, typer.Argument(metavar="[STEP]", min=1, help="The checkpoint's step; without it, all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of the checkpoints and compare it with what was written; exit 1 where any differs."""
    from launcher.run.checkpoints import damages

    found = damages(_directory(run_dir).checkpoints, step)
    if as_json:
        console.answer_json(
            [
                {"checkpoint": name, "damage": damage or [], "removed": damage is None}
                for name, damage in found.items()
            ]
        )
    else:
        for name, damage in found.items():
            state = "removed meanwhile" if damage is None else "DAMAGED" if damage else "good"
            console.answer("\n".join([f"{name}: {state}", *(f"  {d}" for d in damage or [])]))
        if not found:
            console.answer("no checkpoint yet")
    if any(found.values()):
        raise SystemExit(1)


@app.command("export", epilog="Example: launcher checkpoint export runs/gpt2-shakespeare --step 500")
def checkpoint_export(
    run_dir: RunFolder,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="The checkpoint's step; without it, the newest.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Where to; without it, RUN_DIR/exports/step-NNNNNNNN."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one Hugging Face model of a checkpoint, whichever engine saved it and however many ranks."""
    import subprocess
    import sys

    from launcher.run.checkpoints import good_at

    directory = _directory(run_dir)
    found = good_at(directory.checkpoints, step)
    target = (to or directory.exports / found.folder.name).absolute()
    if target.exists():
        raise RequestError(f"{target} exists", hint="name another folder with --to: nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "launcher.worker.export"]
    command += [str(directory.root), str(found.folder), str(target)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)  # what DeepSpeed tells of its files
    if done.returncode:
        raise SystemExit(done.returncode)
    if as_json:
        console.answer_json({"step": found.step, "model": str(target)})
    else:
        console.answer(str(target))


def _directory(run_dir: Path) -> RunDirectory:
    from launcher.run.directory import RunDirectory

    directory = RunDirectory(run_dir.absolute())
    directory.require(directory.orders)
    return directory
