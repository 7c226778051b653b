"""What may stand where a file is named: a path or a URL."""

from __future__ import annotations

import re


def is_url(path: str) -> bool:
    """Whether this names a file through fsspec (`s3://bucket/key`, `zip://member::archive.zip`)."""
    return "://" in path or "::" in path


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
