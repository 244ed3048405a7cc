"""Random numbers that depend on what they are for and on nothing else: the same on any rank, any device, after any resume.

A number is a hash of a key and a counter, so nothing has to be drawn in an order. torch's and numpy's generators promise no equal
streams across devices and releases.
"""

import hashlib
import math

import torch

# splitmix64 (Steele, Lea and Flood 2014): the finaliser, and the golden ratio that separates counters.
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 2**64


def key_of(*words: int | str) -> int:
    """64 bits that stand for these words."""
    digest = hashlib.sha256("|".join(["fmristream-draw-v1", *map(str, words)]).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniforms(key: int, count: int) -> list[float]:
    """`count` numbers in [0, 1), 53 bits each."""
    return [(_finalize((key + (place + 1) * _GOLDEN) % _BITS) >> 11) * 2.0**-53 for place in range(count)]


def normals(key: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) float32 standard normal numbers, made where they are used.

    Box and Muller's method on 24 bits of each hash: no number lies beyond 5.8 SD. Devices may differ in the last bits of a
    logarithm.
    """
    half = (count + 1) // 2
    bits = torch.arange(1, half + 1, device=device, dtype=torch.int64)
    bits.mul_(_signed(_GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        # int64 shifts copy the sign; what they copy is masked off.
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            bits.mul_(_signed(factor))
    radius = (((bits >> 40) & 0xFFFFFF).float() + 1).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = ((bits >> 16) & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _finalize(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) % _BITS
    x = ((x ^ (x >> 27)) * _SECOND) % _BITS
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 with these bits."""
    return x - _BITS if x >= _BITS // 2 else x
