"""Documents that are in the training text and in the validation text too.

Every document has a key: its length and a few of its tokens, read for many documents at once. Only a training
document with the key of a validation one is read whole and hashed. Held in memory: some 50 bytes for each
validation document, and nothing for a training document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.data.store import Shard, Split, Store

PROBES = 8  # tokens of a document that go into its key
CHUNK = 1 << 16  # documents whose keys are computed at a time
ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Twin:
    """A training document with the tokens of a validation document, each by shard and index."""

    shard: Shard
    document: int
    validation_shard: Shard
    validation_document: int


@dataclass(frozen=True, slots=True)
class Duplicates:
    """How many training documents are in the validation text too, and the first few."""

    documents: int
    examples: list[Twin]


def find_duplicates(store: Store, examples: int) -> Duplicates:
    """Every training document whose tokens are those of a validation document, by a hash of 64 bits."""
    held_out = list(_documents(store, "validation"))
    keys = np.unique(np.concatenate([np.empty(0, np.uint64), *(part.keys for part in held_out)]))
    every = (part.hash(document) for part in held_out for document in range(len(part.keys)))
    hashes = np.fromiter(every, np.uint64)
    order = np.argsort(hashes, kind="stable")
    ends = np.cumsum([len(part.keys) for part in held_out])
    found = 0
    twins: list[Twin] = []
    for part in _documents(store, "train") if len(keys) else ():
        for candidate in np.flatnonzero(np.isin(part.keys, keys)).tolist():
            place = int(np.searchsorted(hashes, part.hash(candidate), sorter=order))
            if place == len(hashes) or hashes[order[place]] != part.hash(candidate):
                continue
            found += 1
            if len(twins) < examples:
                twin = int(order[place])
                number = int(np.searchsorted(ends, twin, side="right"))
                other = held_out[number]
                own = other.first + twin - int(ends[number]) + len(other.keys)
                twins.append(Twin(part.shard, part.first + candidate, other.shard, own))
    return Duplicates(found, twins)


@dataclass(frozen=True, slots=True)
class _Part:
    """Documents of a shard from `first` on: their keys, and where each begins and ends in the shard."""

    store: Store
    shard: Shard
    first: int
    keys: NDArray[np.uint64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def hash(self, document: int) -> int:
        """64 bits of a hash of a document's tokens, by its index in this part."""
        start = int(self.starts[document])
        ids = self.store.tokens(self.shard)[start : start + int(self.lengths[document])]
        return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _documents(store: Store, split: Split) -> Iterator[_Part]:
    for source in store.sources(split):
        for shard in store.shards(split, source):
            tokens, lengths = store.tokens(shard), store.lengths(shard)
            begun = 0
            for first in range(0, len(lengths), CHUNK):
                own = lengths[first : first + CHUNK].astype(np.int64)
                starts = begun + np.cumsum(own) - own
                begun += int(own.sum())
                keys = own.astype(np.uint64)
                for probe in range(PROBES):
                    keys = keys * ODD + tokens[starts + own * probe // PROBES].astype(np.uint64)
                yield _Part(store, shard, first, keys, starts, own)
