"""What may stand where a file is named: a path or a URL, and no secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote_plus

NO_SECRETS = (
    "this is copied to the run directory and the token store: let the file system find its own credentials "
    "(environment variables, ~/.aws, ~/.netrc, hf auth login)"
)
_SIGNING = re.compile(
    r"^(x-amz-|x-goog-)|(^|[-_])(sig|signature|token|secret|password|passwd|pwd|credentials?|auth|authorization)$"
    r"|^(api|access)?[-_]?key([-_]id)?$|^awsaccesskeyid$|^googleaccessid$|^key-pair-id$",
    re.IGNORECASE,
)


def is_url(path: str) -> bool:
    """Whether this names a file through fsspec (`s3://bucket/key`, `zip://member::archive.zip`)."""
    return "://" in path or "::" in path


def secret_in(path: str) -> str | None:
    """What in a URL is, or looks like, a secret, without saying it; None for nothing, as in any path."""
    if not is_url(path):
        return None
    for url in path.split("::"):
        # No urlsplit: it refuses brackets, which are a wildcard here.
        scheme, _, rest = url.partition("://")
        if "@" in re.split(r"[/?#]", rest, maxsplit=1)[0] and scheme != "zip":
            return "a user's name or password is written into the URL"
        for name in _named_values(url):
            if _SIGNING.search(name):
                return f"the URL is signed, or holds a secret ({name}=...)"
    return None


def no_pattern_in(path: str) -> tuple[str, str] | None:
    """What in a path or URL is neither a pattern nor a name, and what to write instead; None: nothing."""
    for url in path.split("::"):
        scheme, _, rest = url.partition("://")
        host = re.split(r"[/?#]", rest, maxsplit=1)[0]
        if scheme in ("http", "https") and not {"[", "]"}.isdisjoint(host):
            return f"a bracket in the name of a host, {host}", "patterns go behind the host: write that out"
    parts = [] if "::" in path else path.split("/")
    if any("**" in part and part != "**" for part in parts):
        return (
            "** with other letters between two slashes",
            "** stands for folders: write it as FOLDER/**/*.txt",
        )
    return None


def _named_values(url: str) -> Iterator[str]:
    """The names of all that a URL gives as NAME=VALUE: in its query, its fragment, or after a semicolon."""
    for part in re.split(r"[?#;&]", url)[1:]:
        name, given, _ = part.partition("=")
        if given:
            yield unquote_plus(name)
