"""Shuffling without a buffer: a keyed permutation of 0 .. n-1 that is evaluated at any position in no memory.

A balanced Feistel network permutes [0, 2^k), k even, 2^k >= n; positions that land outside [0, n) are walked on until
they land inside, which keeps it a permutation. Eight rounds of the splitmix64 finaliser and a domain of at least 2^8
were found to pass chi-square tests of position, differences and serial pairs, where 4 rounds and small domains fail.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.keys import GOLDEN, MASK, below, key_of, mix, mix_one

ROUNDS = 8
MIN_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """Several windows of a run close together, so that what is read once for a run serves all of them.

    Attributes:
        windows: that follow one another in stored order and are taken in one visit.
        visits: that are mixed with each other: `windows * visits` windows are in random order among themselves.
    """

    windows: int
    visits: int = 16

    def __post_init__(self) -> None:
        if self.windows < 1 or self.visits < 1:
            raise UsageError(f"locality of {self.windows} windows and {self.visits} visits: expected 1 or more each")


def order_key(selection_digest: str, *, seed: int, epoch: int) -> int:
    """64-bit key of one epoch's order."""
    return key_of("fmristream-order-v1", selection_digest, seed, epoch)


def permute(positions: NDArray[np.int64], *, size: int, key: int) -> NDArray[np.int64]:
    """Image of each position in [0, size) under the permutation that `key` selects."""
    if size == 1:  # found at once; walking there would take some 256 steps
        return np.zeros_like(positions)
    half = max(MIN_BITS, 2 * ((max(size - 1, 1).bit_length() + 1) // 2)) // 2
    keys = _round_keys(key)
    values = _feistel(positions.astype(np.uint64), half, keys)
    outside = values >= np.uint64(size)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def permute_locally(positions: NDArray[np.int64], *, size: int, key: int, locality: Locality) -> NDArray[np.int64]:
    """Image of each position in [0, size) under a permutation that keeps blocks together.

    Blocks of consecutive numbers are permuted, some blocks that come one after the other make a superblock, and the
    numbers of a superblock are permuted among themselves. What does not fill a block joins the last superblock; where
    blocks begin changes with the key, so that it is not always the same numbers.
    """
    length, chunk = locality.windows, locality.windows * locality.visits
    blocks = size // length
    superblocks = max(1, blocks // locality.visits)
    of = np.minimum(positions // chunk, superblocks - 1)
    inside = np.empty_like(positions)
    for number in np.unique(of).tolist():
        mine = of == number
        count = chunk if number < superblocks - 1 else size - number * chunk
        own = mix_one((key + (number + 1) * GOLDEN) & MASK)
        inside[mine] = permute(positions[mine] - number * chunk, size=count, key=own)
    places = of * chunk + inside
    is_whole = places < blocks * length
    if blocks:
        images = permute(places[is_whole] // length, size=blocks, key=mix_one(key ^ MASK))
        places[is_whole] = images * length + places[is_whole] % length
    turned = int(below(np.array([size]), np.zeros(1, dtype=np.int64), key=key)[0]) if size < 2**32 else key % size
    return (places + turned) % size


def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(mix_one((key + (i + 1) * GOLDEN) & MASK)) for i in range(ROUNDS)]


def _feistel(values: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right
