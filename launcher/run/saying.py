"""How a person is told what is done, while it is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TypeAlias

Say: TypeAlias = Callable[[str], None]


def warn(text: str) -> None:
    """Say it to the person as far as there is room: a job's log may be on the disk that is full."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
