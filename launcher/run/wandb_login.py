"""Whether Weights & Biases would take what a run reports to it: asked before it begins, as in the run."""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from configparser import ConfigParser
from configparser import Error as MalformedError
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from launcher.errors import MachineError

HOST: Final = "https://api.wandb.ai"
UNSENT: Final = frozenset({"offline", "disabled", "dryrun"})
"""Modes in which nothing is sent, and nobody need be logged in."""


def check_wandb(environment: Mapping[str, str]) -> None:
    """Raise MachineError where ranks with this environment could not log in: they would fail one and all."""
    settings = _settings(environment)
    if (environment.get("WANDB_MODE") or settings.get("mode")) in UNSENT:
        return
    given = (environment.get("WANDB_API_KEY"), environment.get("WANDB_IDENTITY_TOKEN_FILE"))
    if any(given) or settings.get("api_key"):
        return
    host = urlsplit(environment.get("WANDB_BASE_URL") or settings.get("base_url") or HOST).netloc
    if not _is_known(host, Path(environment.get("NETRC") or "~/.netrc").expanduser()):
        raise MachineError(
            f"report_to: wandb has no login for {host} here",
            hint="`wandb login`, or set WANDB_API_KEY; WANDB_MODE=offline keeps it on this machine; or take "
            "wandb out of report_to",
        )


def _settings(environment: Mapping[str, str]) -> Mapping[str, str]:
    """What `wandb login` and `wandb offline` wrote down, the folder's over the person's."""
    person = Path(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    files = (person / "settings", Path(environment.get("WANDB_DIR") or ".") / "wandb" / "settings")
    parser = ConfigParser(interpolation=None)
    try:
        parser.read([file.expanduser() for file in files])
    except (OSError, UnicodeDecodeError, MalformedError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _is_known(host: str, file: Path) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False
