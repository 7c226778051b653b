"""A run that reports to Weights & Biases needs a login there, or is not begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import pytest

from launcher.config.schema import RunConfig
from launcher.errors import MachineError
from launcher.run import preflight
from launcher.run.preflight import check_run
from tests.conftest import small_run

SETTINGS = ".config/wandb/settings"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MODE", "API_KEY", "BASE_URL", "DIR", "CONFIG_DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    return tmp_path


def check(home: Path, files: Mapping[str, str], environment: Mapping[str, str]) -> None:
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    run = RunConfig.model_validate({**small_run(), "report_to": ["wandb"], "output_dir": str(home)})
    with patch.object(preflight, "find_spec"):  # as if it were installed
        check_run(run, "ddp", environment)


@pytest.mark.parametrize(
    ("files", "environment"),
    [
        ({}, {"WANDB_API_KEY": "k"}),
        ({}, {"WANDB_IDENTITY_TOKEN_FILE": "f"}),
        ({}, {"WANDB_MODE": "offline"}),
        ({}, {"WANDB_MODE": "disabled"}),
        ({"wandb/settings": "[default]\nmode = offline\n"}, {}),
        ({SETTINGS: "[default]\napi_key = k%k\n"}, {}),
        ({".netrc": "machine api.wandb.ai\n login user\n password k\n"}, {}),
        ({"other": "machine api.wandb.ai login user password k\n"}, {"NETRC": "~/other"}),
        (
            {".netrc": "machine w.example:8080 login user password k\n"},
            {"WANDB_BASE_URL": "http://w.example:8080"},
        ),
        (
            {
                ".netrc": "machine w.example login u password k\n",
                SETTINGS: "[default]\nbase_url = https://w.example\n",
            },
            {},
        ),
    ],
)
def test_a_login_or_no_need_of_one(
    home: Path, files: Mapping[str, str], environment: Mapping[str, str]
) -> None:
    check(home, files, environment)


@pytest.mark.parametrize(
    ("files", "environment", "host"),
    [
        ({}, {}, "api.wandb.ai"),
        ({}, {"WANDB_MODE": "online"}, "api.wandb.ai"),
        ({".netrc": "machine github.com login user password k\n"}, {}, "api.wandb.ai"),
        (
            {".netrc": "machine api.wandb.ai login user password k\n"},
            {"WANDB_BASE_URL": "https://w.example"},
            "w.example",
        ),
        ({".netrc": "nonsense\n", SETTINGS: "nonsense\n"}, {}, "api.wandb.ai"),
    ],
)
def test_without_one_nothing_is_begun(
    home: Path, files: Mapping[str, str], environment: Mapping[str, str], host: str
) -> None:
    with pytest.raises(MachineError, match=f"wandb has no login for {host} here") as caught:
        check(home, files, environment)
    assert "WANDB_MODE=offline" in (caught.value.hint or "")
