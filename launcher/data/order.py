"""Which block is sample p: a pure function of the configuration and p, with nothing to store or to skip.

Sources take turns by integer quotas in a fixed cycle of samples. Within a source, the samples are cut
into epochs of as many samples as it has blocks, and each epoch visits its blocks through a permutation of
its own: a Feistel network on the smallest even number of bits that holds the block count, walked until it
lands on a block (cycle-walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Fewer
than four walks are needed on average. Its round function is the splitmix64 finaliser (Steele, Lea and
Flood, "Fast Splittable Pseudorandom Number Generators", 2014) of the half block plus a round key: it
mixes every bit into every other, and costs the same few integer operations in Python and in numpy. The
round keys come from BLAKE2b of (seed, source, epoch), so no two epochs share a permutation.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CYCLE = 65_536  # samples in which every source gets its quota: shares are exact to 1 in 65,536
ROUNDS = 8
MASK = (1 << 64) - 1


class Sample(NamedTuple):
    """Where a sample comes from: source index, epoch of that source from 0, block index in the source."""

    source: int
    epoch: int
    block: int


class Turns:
    """Which source each sample comes from, for sources of these weights, each above zero."""

    def __init__(self, weights: Sequence[float]) -> None:
        quotas = cycle_quotas(weights)
        common = gcd(*quotas)
        self.quotas = [quota // common for quota in quotas]
        self.cycle = CYCLE // common
        self._turn, self._rank = _turns(self.quotas)

    def turn(self, p: int) -> tuple[int, int]:
        """The source of sample `p`, from 0 without end, and how many samples that source had before it."""
        if p < 0:
            raise IndexError("samples are counted from 0")
        cycle, place = divmod(p, self.cycle)
        source = int(self._turn[place])
        return source, cycle * self.quotas[source] + int(self._rank[place])


class Order(Turns):
    """The order of samples over sources of `(blocks, weight)`, for a seed of 0 <= seed < 2**64.

    Raises ValueError for no source, a source without blocks, or a weight that is not above zero.
    """

    def __init__(self, sources: Sequence[tuple[int, float]], seed: int) -> None:
        if not sources or any(blocks < 1 or not weight > 0 for blocks, weight in sources):
            raise ValueError("every source needs at least one block and a weight above zero")
        super().__init__([weight for _, weight in sources])
        self.blocks = [blocks for blocks, _ in sources]
        self.seed = seed

    def __getitem__(self, p: int) -> Sample:
        """Sample `p`, from 0 without end."""
        source, nth = self.turn(p)
        epoch, position = divmod(nth, self.blocks[source])
        block = permute(position, self.blocks[source], round_keys(self.seed, source, epoch))
        return Sample(source, epoch, block)

    def map(self, samples: ArrayLike) -> NDArray[np.int64]:
        """`int64[n, 3]`: source, epoch and block of each of n samples; row i equals `self[samples[i]]`."""
        p = np.asarray(samples, dtype=np.int64)
        if p.size and p.min() < 0:
            raise IndexError("samples are counted from 0")
        cycle, place = np.divmod(p, self.cycle)
        source = self._turn[place].astype(np.int64)
        nth = cycle * np.asarray(self.quotas, dtype=np.int64)[source] + self._rank[place]
        epoch, position = np.divmod(nth, np.asarray(self.blocks, dtype=np.int64)[source])
        block = np.empty_like(position)
        by_epoch = np.lexsort((epoch, source))
        change = np.diff(source[by_epoch]) != 0
        change |= np.diff(epoch[by_epoch]) != 0
        for own in np.split(by_epoch, np.flatnonzero(change) + 1) if p.size else ():
            s, e = int(source[own[0]]), int(epoch[own[0]])
            block[own] = _permute_all(position[own], self.blocks[s], round_keys(self.seed, s, e))
        return np.stack([source, epoch, block], axis=1)

    def samples_of(self, source: int, blocks: ArrayLike, before: int) -> NDArray[np.int64]:
        """`int64[n]`, ascending: the samples below `before` that are one of these blocks of a source.

        Each block is one sample an epoch, found by walking the permutation backwards.
        """
        wanted = np.asarray(blocks, dtype=np.int64)
        size, quota = self.blocks[source], self.quotas[source]
        places = np.flatnonzero(self._turn == source)
        cycles, rest = divmod(before, self.cycle)
        turns = cycles * quota + int(np.searchsorted(places, rest))
        found = [np.empty(0, dtype=np.int64)]
        for epoch in range(-(-turns // size) if wanted.size else 0):
            keys = round_keys(self.seed, source, epoch)
            nth = epoch * size + _permute_all(wanted, size, keys, backwards=True)
            cycle, rank = np.divmod(nth[nth < turns], quota)
            found.append(np.sort(cycle * self.cycle + places[rank]))
        return np.concatenate(found)

    def certificate(self, samples: Iterable[ArrayLike]) -> str:
        """A hash of where these samples come from, in order, however they are parted into arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for part in samples:
            digest.update(self.map(part).astype("<i8").tobytes())
        return digest.hexdigest()


def cycle_quotas(weights: Sequence[float]) -> list[int]:
    """Samples of each source in a cycle: shares of CYCLE rounded by largest remainder, each at least 1.

    Exact rational arithmetic, so the same on every machine. Raises ValueError for more than CYCLE sources.
    """
    if len(weights) > CYCLE:
        raise ValueError(f"a mixture has at most {CYCLE:,} sources")
    exact = [Fraction(weight) for weight in weights]
    shares = [CYCLE * weight / sum(exact) for weight in exact]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: CYCLE - sum(quotas)]:
        quotas[i] += 1
    for i, quota in enumerate(quotas):
        if quota == 0:
            quotas[quotas.index(max(quotas))] -= 1
            quotas[i] = 1
    return quotas


def _turns(quotas: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """For each place in a cycle, whose turn it is, and how many turns that source had before in the cycle.

    The j-th of q turns is due at (2j+1)/2q of the cycle: evenly spread. Two due times that differ do so by
    more than a rounding error, and equal ones round equally, so ties always go to the earlier source.
    """
    source = np.repeat(np.arange(len(quotas), dtype=np.int32), quotas)
    rank = np.concatenate([np.arange(quota, dtype=np.int64) for quota in quotas])
    due = (2 * rank + 1) / (2 * np.asarray(quotas, dtype=np.int64)[source])
    by_due = np.lexsort((source, due))
    return source[by_due], rank[by_due]


@lru_cache(64)
def round_keys(*identity: int) -> tuple[int, ...]:
    """ROUNDS keys of 64 bits for one permutation, such as (seed, source, epoch): others have other keys."""
    packed = struct.pack(f"<{len(identity)}Q", *identity)
    digest = hashlib.blake2b(packed, digest_size=8 * ROUNDS).digest()
    return struct.unpack(f"<{ROUNDS}Q", digest)


def permute(position: int, size: int, keys: Sequence[int]) -> int:
    """Where a keyed permutation of `[0, size)` sends `position`."""
    half = _half_bits(size)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            # As `_mix_all`, and not in a function of its own: calling it would take as long as it does.
            x = (right + key) & MASK
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
            left, right = right, left ^ ((x ^ (x >> 31)) & mask)
        position = left << half | right
        if position < size:
            return position


def _permute_all(
    positions: NDArray[np.int64], size: int, keys: Sequence[int], *, backwards: bool = False
) -> NDArray[np.int64]:
    """`permute` of each position; backwards, what `permute` sends to each."""
    half = np.uint64(_half_bits(size))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = positions.astype(np.uint64)
    walking = np.arange(len(result))
    while walking.size:
        left, right = result[walking] >> half, result[walking] & mask
        if backwards:
            for key in reversed(keys):
                left, right = right ^ (_mix_all(left + np.uint64(key)) & mask), left
        else:
            for key in keys:
                left, right = right, left ^ (_mix_all(right + np.uint64(key)) & mask)
        result[walking] = left << half | right
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)


def _half_bits(size: int) -> int:
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _mix_all(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
