"""What a check of a machine or a cluster comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `missing` stops a run, `warning` may slow or surprise it.

    `key` is that of the cluster file that is at fault, where one is.
    """

    name: str
    state: Literal["ok", "warning", "missing"]
    found: str
    remedy: str | None = None
    key: str | None = None
