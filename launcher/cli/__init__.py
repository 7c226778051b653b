"""The commands: parse, call, print. Whatever they need is imported where it is needed, so that
help is quick."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

# pydantic would look through every installed package for plugins at each start; launcher uses none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from launcher import __version__, console
from launcher.cli import checkpoint, data, run, submit, supervise, watch
from launcher.errors import Interrupted, LauncherError, MachineError

OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""A disk that is full, or a folder that may not be written to: nobody needs a traceback for that."""

app = typer.Typer(
    name="launcher",
    help="Train GPT-2-family and other Hugging Face causal language models out of one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(run.app)
app.add_typer(submit.app)
app.add_typer(supervise.app)
app.add_typer(watch.app)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train GPT-2-family and other Hugging Face causal language models out of one YAML file."""
    if version:
        console.answer(__version__)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted("interrupted")


def main() -> None:
    """Run one command and exit with its code."""
    # Else the interpreter looks through every object once more as it ends: 80 ms rather than 13.
    atexit.register(gc.freeze)
    # Closed by a shell's `>&-`: what is said there goes nowhere, and no file takes the stream's place.
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # It may stand behind the command too.
    debug = "--debug" in sys.argv[1:]
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="launcher")
    except LauncherError as error:
        if debug:
            traceback.print_exception(error)
        console.show_error(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug or error.errno not in OF_THE_MACHINE:
            raise
        remedy = "have it made readable for you, and writable where something is to be written"
        if error.errno not in (errno.EACCES, errno.EPERM):
            remedy = "make room there, or make it writable for you"
        console.show_error(
            MachineError(
                f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}",
                hint=f"{remedy}, then give the same command again",
            )
        )
        sys.exit(MachineError.exit_code)
