from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launcher.run.environment import DIFF_CHARACTERS, PACKAGES, describe_environment, versions
from launcher.run.machine import FoundGPU, Machine

GPU = FoundGPU(0, "GPU-aa", "NVIDIA H200", 1 << 37, "h200-sxm-141gb")
MACHINE = Machine("node-7", 8, 2**34, (GPU,), "580.1")


def git(folder: Path, *arguments: str) -> str:
    who = {
        **{
            f"GIT_{role}_{what}": "someone@example.com"
            for role in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        },
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "PATH": os.environ["PATH"],
    }
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], env=who, capture_output=True, text=True, check=True
    ).stdout


def described(folder: Path, machine: Machine = MACHINE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(describe_environment(machine, folder))
    return found


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_repository(repository: Path) -> None:
    assert described(repository)["git"] == {
        "commit": git(repository, "rev-parse", "HEAD").strip(),
        "diff": "",
    }


def test_what_was_changed_and_not_committed_is_kept_and_applies_again(repository: Path) -> None:
    (repository / "code.py").write_text("x = 2  # naïve\n")
    (repository / "new.py").write_text("y = 3\n")
    git(repository, "add", "new.py")
    diff = described(repository / ".")["git"]["diff"]
    git(repository, "reset", "-q", "--hard")
    (repository / ".patch").write_text(diff, encoding="utf-8")
    git(repository, "apply", ".patch")
    assert (repository / "code.py").read_text() == "x = 2  # naïve\n"
    assert (repository / "new.py").read_text() == "y = 3\n"


def test_a_very_large_diff_is_cut(repository: Path) -> None:
    (repository / "code.py").write_text("x" * (2 * DIFF_CHARACTERS))
    assert len(described(repository)["git"]["diff"]) == DIFF_CHARACTERS


def test_a_line_that_looks_like_a_secret_is_left_out(repository: Path) -> None:
    secrets = ("HF_TOKEN = 'abc123'", "api_key: abc123", "x = 'hf_abcdefghijklmnop'", "password=abc123")
    (repository / "code.py").write_text("\n".join(["x = 2", *secrets, "y = 3", ""]))
    diff = described(repository)["git"]["diff"]
    assert "+x = 2\n" in diff
    assert "+y = 3\n" in diff
    assert "abc" not in diff


def test_outside_a_repository_before_a_first_commit_and_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert described(tmp_path)["git"] is None
    git(tmp_path, "init", "-q")
    assert described(tmp_path)["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert described(tmp_path)["git"] is None


def test_the_machine_and_what_is_installed(tmp_path: Path) -> None:
    found = described(tmp_path)
    assert found["host"] == "node-7"
    assert (found["cores"], found["memory_bytes"]) == (8, 2**34)
    assert (found["gpus"], found["driver"]) == (["NVIDIA H200"], "580.1")
    assert found["python"] == platform.python_version()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert tuple(versions()) == PACKAGES


def test_no_variable_of_the_environment_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert "hf_secretsecret" not in describe_environment(MACHINE, tmp_path)
