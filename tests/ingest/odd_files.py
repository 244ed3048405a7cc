"""NIfTI files of every kind that the standard allows and programs write, made by seed: what an export must give back."""

import itertools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ingest.nifti_files import DATATYPES, bold_like, comment_extension, nifti_bytes

Rng = np.random.Generator

# Each file takes the next combination: 10 dtypes x 2 byte orders x 2 versions in every 40 files.
KINDS = tuple(itertools.product(DATATYPES, "<>", (1, 2)))

# Text, unused bytes, and numbers that no reader needs: any bits may stand there.
_FREE = {
    1: ((4, 39), (39, 40), (50, 56), (56, 68), (74, 76), (96, 108), (120, 123), (124, 148), (148, 252), (328, 344)),
    2: ((56, 80), (80, 104), (144, 168), (192, 240), (240, 344), (496, 500), (508, 524), (524, 540)),
}
_SCALINGS = (
    (1.0, 0.0), (0.0, 0.0), (0.024958, 818.25), (-1.5, 3.0), (float("nan"), float("nan")), (float("inf"), 0.0),
    (1e-42, 0.0), (7e20, -1.0), (-0.0, 5.0), (1.0, -0.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OddFile:
    """One image, not compressed, and what was put into it."""

    image: bytes
    stored: "np.ndarray[Any, Any]"  # (x, y, z, t), little-endian
    data_offset: int
    big_endian: bool


def odd_file(number: int, *, well_formed: bool = False) -> OddFile:
    """File `number` of the endless row; `well_formed` ones have no extensions that other readers stumble over."""
    rng = np.random.default_rng([number, 2024])
    dtype, order, version = KINDS[number % len(KINDS)]
    shape = tuple(int(size) for size in (*rng.integers(1, 8, 3), rng.integers(1, 22)))
    stored = bold_like(shape, dtype, seed=number)
    if rng.random() < 0.2:
        stored[..., : max(1, shape[3] // 2)] = stored[..., :1]
    extension = _extensions(rng, order, 4 if well_formed else 7)
    slope, inter = _SCALINGS[int(rng.integers(len(_SCALINGS)))]
    lies: dict[str, Any] = {
        "scl_slope": slope,
        "scl_inter": inter,
        "sform_code": int(rng.choice([1, 2, 3, 4])),
        "qform_code": int(rng.choice([0, 0, 1, 2, 77])),
        "quaternion": tuple(rng.normal(0, 0.7, 3)),  # at times no rotation
        "qoffset": tuple(rng.normal(0, 100, 3)),
        "pixdim": (float(rng.choice([1, -1, 0, 3.5])), *rng.uniform(0.5, 4, 3), float(rng.choice([0, 0.72, 2000, -1])), 0, 0, 0),
        "xyzt_units": int(rng.choice([0, 2, 8, 10, 18, 26, 255])),
        "bitpix": int(rng.choice([0, 8 * stored.dtype.itemsize])),
    }  # fmt: skip
    if rng.random() < 0.3:  # the qform decides, or a code that NIfTI does not know
        lies |= {"sform_code": int(rng.choice([0, 99])), "quaternion": tuple(rng.uniform(-0.5, 0.5, 3))}
    image = bytearray(nifti_bytes(stored, version=version, order=order, extension=extension, **lies))
    for start, stop in _FREE[version]:
        if rng.random() < 0.6:
            image[start:stop] = rng.bytes(stop - start)
    head = 348 if version == 1 else 540
    if rng.random() < 0.2 and not well_formed:
        image[head : head + 4] = rng.bytes(4)
    return OddFile(image=bytes(image), stored=stored, data_offset=head + 4 + len(extension), big_endian=order == ">")


def odd_run_name(number: int) -> str:
    """As a run and, with a suffix, as a file."""
    return f"sub-{number:03}_task-odd_bold"


def _extensions(rng: Rng, order: str, kinds: int) -> bytes:
    kind = int(rng.integers(kinds))
    one, other = (comment_extension(int(rng.integers(1, 200)), order) for _ in range(2))
    xml = rng.bytes(int(rng.integers(1, 5)) * 16 - 8)
    return {
        0: b"",
        1: one,
        2: one + other,
        3: struct.pack(order + "2i", len(xml) + 8, 32) + xml + other,
        4: one + rng.bytes(24),  # what follows is no extension
        5: bytes(16 * int(rng.integers(1, 4))),  # padding
        6: struct.pack(order + "2i", 100_000, 4) + rng.bytes(100_000 - 8),
    }[kind]
