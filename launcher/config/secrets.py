"""What looks like a secret: a password, a token or a key, by its name or by how it is written.

What a run is asked with is copied to its directory and repeated in messages, so nothing that looks like one
is taken; and of what looks like one only the name is ever said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote_plus

from launcher.config.addresses import is_url
from launcher.config.document import KeyPath, Value, dotted
from launcher.errors import Fault

NO_SECRETS = (
    "this is copied to the run directory and the token store: let the file system find its own credentials "
    "(environment variables, ~/.aws, ~/.netrc, hf auth login)"
)
_HAND_ON = (
    "this is copied to the run directory: export it in the shell that starts launcher "
    "(for the Hub, `hf auth login`); ranks and jobs inherit it"
)
_PRIVATE = re.compile(
    r"((^|[_.-])(TOKEN|SECRET|CREDENTIALS?|(ACCESS|SECRET|PRIVATE)[_-]?KEY)"
    r"|PASSWORD|PASSWD|PASSPHRASE|API[_-]?KEY)[_\d]*$",
    re.IGNORECASE,
)
_PRIVATE_VARIABLE = re.compile(r"((^|_)(KEY(_ID)?|PAT|AUTH)|_PWD|(?<!BY)(?<!COM)PASS)[_\d]*$")
"""Words that mean a secret only where a name is an environment variable's."""
_SIGNING = re.compile(
    r"^(x-amz-|x-goog-)|(^|[-_])(sig|signature|token|secret|password|passwd|pwd|credentials?|auth|authorization)$"
    r"|^(api|access)?[-_]?key([-_]id)?$|^awsaccesskeyid$|^googleaccessid$|^key-pair-id$",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16}|gh[opsur]_[A-Za-z0-9]{16}|github_pat_\w{16}|(AKIA|ASIA)[A-Z0-9]{16}"
    r"|sk-([a-z0-9]{1,20}-){0,2}(?=[a-z_]{0,40}[A-Z0-9])\w{16})|\bBearer\s+[\w.~+/=-]{8}"
)
"""Tokens of Hugging Face, GitHub, AWS and OpenAI, and of a header."""
_NAMED = re.compile(
    r"(?<![\w/?&.])([A-Za-z_][\w.-]{0,60})"
    r"([\"']?\]?[ \t]{0,4}=|[\"'][ \t]{0,4}:|:[ \t])(?=[ \t]{0,4}(\S{1,12}))"
)
"""NAME=VALUE, ["NAME"]=VALUE, `NAME: VALUE`, "NAME": VALUE, outside paths and URLs; and how VALUE begins."""
_NO_SECRET = re.compile(
    r"[\"']*($|\\?\$[\w{(]|`|<|(0|1|true|false|yes|no|on|off)(?![^\s\"';)]))", re.IGNORECASE
)
"""What the shell puts in when the line is run, a switch, or nothing."""

_NO_USERS = ("zip", "docker")
"""Where an @ is part of a name."""


def is_private(name: str) -> bool:
    """Whether a key or variable of this (dotted) name holds a secret, which is neither written nor shown."""
    return _PRIVATE.search(name) is not None or _PRIVATE_VARIABLE.search(name) is not None


def is_secret(name: str, value: str) -> bool:
    """Whether the value of a variable of this name is, or looks like, a secret."""
    return is_private(name) and _NO_SECRET.match(value) is None


def secret_in(text: str) -> str | None:
    """What in a text is, or looks like, a secret, without saying it; None for nothing."""
    if found := next(_in_urls(text), None):
        return found
    if _TOKEN.search(text):
        return "it holds what looks like a token"
    names = (match[1] for match in _NAMED.finditer(text) if is_secret(match[1], match[3]))
    return next((f"{name} looks like a secret" for name in names), None)


def secrets_in(value: Value, path: KeyPath = ()) -> Iterator[Fault]:
    """A fault, without a place, for each text in `value` that holds a secret."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from secrets_in(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, (*path, index))
    elif isinstance(value, str) and (secret := secret_in(value)):
        yield Fault(dotted(path), secret, hint=NO_SECRETS if path[0] == "data" else _HAND_ON)


def _in_urls(text: str) -> Iterator[str]:
    words = [text] if re.match(r"[\w+.-]+(://|::)", text) else re.split(r"[\s\"'`]+", text)
    for url in (part for word in words if is_url(word) for part in word.split("::")):
        # No urlsplit: it refuses brackets, which are a wildcard here.
        scheme, _, rest = url.partition("://")
        user, _, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
        if not scheme.endswith(_NO_USERS) and _is_login(user, web=scheme.endswith(("http", "https"))):
            yield "a user's name or password is written into the URL"
        for name, given in _named_values(url):
            if _SIGNING.search(name) and not _NO_SECRET.match(given):
                yield f"the URL is signed, or holds a secret ({name}=...)"


def _is_login(user: str, *, web: bool) -> bool:
    """Whether what stands before the @ has a password; on the web a name is enough, which may be a token."""
    name, colon, password = user.partition(":")
    return bool(colon or (web and name)) and not _NO_SECRET.match(password or name)


def _named_values(url: str) -> Iterator[tuple[str, str]]:
    """All that a URL gives as NAME=VALUE: in its query, its fragment, or after a semicolon."""
    for part in re.split(r"[?#;&]", url)[1:]:
        name, _, given = part.partition("=")
        yield unquote_plus(name), given
