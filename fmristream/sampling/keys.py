"""Keys, and numbers drawn by them: the same on every machine for ever, whatever was drawn before."""

import hashlib

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def key_of(*parts: object) -> int:
    """64-bit key of a text that the parts make up."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "little")


def below(bounds: NDArray[np.int64], items: NDArray[np.int64], *, key: int) -> NDArray[np.int64]:
    """A number in [0, bound) for each item under a key.

    Args:
        bounds: 1 to 2^32 - 1 each; one bound for all, or one for each item.
        items: what is drawn for; equal items get equal numbers.
        key: of this drawing.
    """
    # The upper 32 bits times the bound: no division, and a bias of at most bound / 2^32.
    high = mix(items.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64((key + GOLDEN) & MASK)) >> np.uint64(32)
    return ((high * bounds.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_one(x: int) -> int:
    """The same of one number."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
