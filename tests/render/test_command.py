"""`launch.sh` run by a real shell, with an `accelerate` that tells how it was called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.render.command import launch_command, render_launch
from launcher.run.directory import write_files

TELLS = """\
import json, os, sys
with open(os.environ["TOLD"], "w", encoding="utf-8") as stream:
    json.dump({"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}, stream)
sys.exit(int(os.environ.get("EXIT", "0")))
"""
AWKWARD = (
    "plain",
    "two words",
    "it's",
    'say "yes"',
    "$HOME ${HOME} $(id)",
    "a;b & c | d > e",
    "`id`",
    "back\\slash\\n",
    "two\nlines\n",
    "*?[a]~!#",
    "-leading",
    "",
    "naïve 你好 \t tab",
)
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
"""What a path or a variable can hold."""


class Shell:
    """Runs a rendered script with /bin/sh and a stub `accelerate` first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stub = folder / "bin" / "accelerate"
        stub.parent.mkdir()
        (folder / "tells.py").write_text(TELLS)
        stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{folder}/tells.py" "$@"\n')
        stub.chmod(0o755)

    def run(self, script: str, **environment: str) -> tuple[int, dict[str, Any], int]:
        """Exit code, what the stub was given, and the shell's process id."""
        told = self.folder / "told.json"
        told.unlink(missing_ok=True)
        file = self.folder / "launch.sh"
        write_files([(file, script)])
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["/bin/sh", str(file)], env={"PATH": path, "TOLD": str(told), **environment}, cwd="/"
        )
        code = process.wait(timeout=20)
        return code, json.loads(told.read_text(encoding="utf-8")), process.pid


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("shell"))


def check(shell: Shell, directory: str, environment: Mapping[str, str]) -> None:
    code, told, shells = shell.run(render_launch(directory, environment, nodes=1))
    assert code == 0
    assert told["argv"] == [
        *("launch", "--config_file", f"{directory}/accelerate.yaml"),
        *("-m", "launcher.worker", directory),
    ]
    assert {name: told["env"].get(name) for name in environment} == environment
    assert told["pid"] == shells, "signals to the script must reach accelerate: exec"


@pytest.mark.parametrize("text", AWKWARD)
def test_a_shell_passes_on_exactly_what_is_there(shell: Shell, text: str) -> None:
    check(shell, f"/runs/{text}", {"AWKWARD": text, "NEXT": "still here"})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    directory=st.text(CHARACTERS, min_size=1),
    values=st.lists(st.text(CHARACTERS), max_size=3),
)
def test_any_path_and_any_value(shell: Shell, directory: str, values: list[str]) -> None:
    check(shell, directory, {f"VALUE_{n}": value for n, value in enumerate(values)})


def test_the_script_ends_as_accelerate_does(shell: Shell) -> None:
    code, _, _ = shell.run(render_launch("/runs/small", {}, nodes=1), EXIT="7")
    assert code == 7


def test_the_argument_vector_needs_no_shell(shell: Shell, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    for directory in AWKWARD:
        command = launch_command(directory, accelerate=str(shell.folder / "bin" / "accelerate"))
        subprocess.run(command, env={**os.environ, "TOLD": str(told)}, check=True)
        assert json.loads(told.read_text())["argv"][1:3] == ["--config_file", f"{directory}/accelerate.yaml"]
        assert json.loads(told.read_text())["argv"][-1] == directory


def test_it_may_be_run_by_those_who_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "launch.sh"
    write_files([(file, render_launch("/runs/small", {}, nodes=1))])
    mode = file.stat().st_mode
    assert mode & 0o111 == (mode & 0o444) >> 2 != 0
