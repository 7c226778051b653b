"""What several commands take, and the plan that they begin with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launcher.run.assemble import Assembly

RunFile = Annotated[Path, typer.Argument(metavar="RUN", help="The run.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.steps=100.")
]
ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="The cluster.yaml; without it, this machine as found."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run, such as runs/NAME.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes to tokenise with; without it, one per core.")
]


def assembled(run: Path, overrides: list[str] | None, cluster: Path | None) -> Assembly:
    """What the files and overrides become on this machine. Raises what reading and planning them raises."""
    from launcher.config.load import load_files
    from launcher.run.assemble import assemble
    from launcher.run.machine import find_machine

    return assemble(*load_files(run, overrides or [], cluster), find_machine())
