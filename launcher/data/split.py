"""Which documents are held out: a hash of the text, so that adding files moves none across the split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import xxhash
from numpy.typing import NDArray

SEED = 0x6C61756E63686572  # another one would hold out other documents


class HeldOut:
    """The documents whose hash (XXH3, 64 bits, of the UTF-8 text) lies in the lowest `fraction`, from 0 up
    to but not including 1."""

    def __init__(self, fraction: float) -> None:
        self._limit = np.uint64(int(fraction * 2**64))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """`bool[n]`: which of n texts are for validation."""
        if self.nothing:
            return np.zeros(len(texts), dtype=np.bool_)
        hashes = map(partial(xxhash.xxh3_64_intdigest, seed=SEED), map(str.encode, texts))
        return np.fromiter(hashes, dtype=np.uint64, count=len(texts)) < self._limit

    @property
    def nothing(self) -> bool:
        """Whether no document is held out, so that none need be hashed."""
        return not self._limit

    def digest(self) -> xxhash.xxh3_64:
        """To hash a text in parts: update it with the UTF-8 of each, then ask `holds`."""
        return xxhash.xxh3_64(seed=SEED)

    def holds(self, digest: xxhash.xxh3_64) -> bool:
        """Whether the text that was hashed in parts is for validation."""
        return digest.intdigest() < int(self._limit)
