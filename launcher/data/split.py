"""Which documents are held out: a hash of the text, so that adding files moves none across the split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPLIT_KEY = b"launcher validation split 1"


class HeldOut:
    """The documents whose hash lies in the lowest `fraction`, from 0 up to but not including 1."""

    def __init__(self, fraction: float) -> None:
        self._limit = int(fraction * 2**64).to_bytes(8, "big")

    def __call__(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """`bool[n]`: which of n texts are for validation."""
        if self._limit == bytes(8):
            return np.zeros(len(texts), dtype=np.bool_)
        hashed = hashlib.blake2b
        return np.fromiter(
            (hashed(text.encode(), digest_size=8, key=SPLIT_KEY).digest() < self._limit for text in texts),
            dtype=np.bool_,
            count=len(texts),
        )

    def digest(self) -> hashlib.blake2b:
        """To hash a text in parts: update it with the UTF-8 of each, then ask `holds`."""
        return hashlib.blake2b(digest_size=8, key=SPLIT_KEY)

    def holds(self, digest: bytes) -> bool:
        """Whether the text that has this digest is for validation."""
        return digest < self._limit
