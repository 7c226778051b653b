"""Sizes in bytes as people read them."""

from __future__ import annotations


def size_in_words(size: float) -> str:
    """124,439,808 bytes are `118.7 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
