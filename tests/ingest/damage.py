"""Damaged, lying and hostile sources by seed: real ways in which NIfTI files go wrong, each beside what it was before."""

import gzip
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.ingest.nifti_files import DATATYPES, bold_like, comment_extension, gzip_members, nifti_bytes

# `refused`: must not be accepted. `equal`: a flipped bit may lie where nothing depends on it; accepted only if every voxel
# is what it was. `valid`: unusual, but whole; must be accepted.
Verdict = Literal["refused", "equal", "valid"]

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """One file of the corpus."""

    name: str  # of the file
    kind: str
    verdict: Verdict
    stored: "np.ndarray[Any, Any]"  # what it held before it was damaged


@dataclass(frozen=True, slots=True)
class Victim:
    """A healthy run, as an array and as bytes."""

    stored: "np.ndarray[Any, Any]"
    version: int
    draw: random.Random

    def raw(self, **lies: Any) -> bytes:
        return nifti_bytes(self.stored, version=self.version, **lies)

    @property
    def packed(self) -> bytes:
        raw = self.raw()
        cuts = sorted(self.draw.sample(range(1, len(raw)), self.draw.choice([0, 0, 0, 2])))
        return gzip_members(raw, cuts, level=self.draw.choice([1, 6, 9]))

    def cut(self, data: bytes) -> bytes:
        return data[: self.draw.randrange(1, len(data))]

    def flipped(self, data: bytes, start: int, stop: int) -> bytes:
        damaged = bytearray(data)
        damaged[self.draw.randrange(start, stop)] ^= 1 << self.draw.randrange(8)
        return bytes(damaged)


def corpus(folder: Path, *, seed: int, count: int) -> list[Damaged]:
    """Write so many files, every kind about as often, and say what they are."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(KINDS)
    made = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        verdict, suffix, make = KINDS[kind]
        dtype = draw.choice(["u1", "i2", "u2", "i4", "f4", "f8"])
        shape = tuple(draw.randrange(3, 9) for _ in range(3))
        # Values that deflate can pack, as real ones: then a damaged stream goes on for a while before it breaks.
        stored = bold_like((*shape, draw.randrange(4, 20)), dtype, seed=seed * 1000 + number)
        if dtype not in ("f4", "f8"):
            stored = np.asfortranarray(stored // np.array(16, stored.dtype))
        victim = Victim(stored, draw.choice([1, 1, 2]), draw)
        name = f"sub-{number:03d}_{kind.replace(' ', '')}_bold{suffix}"
        (folder / name).write_bytes(make(victim))
        made.append(Damaged(name=name, kind=kind, verdict=verdict, stored=stored))
    return made


def _flip_in_trailer(victim: Victim, start: int) -> bytes:
    packed = gzip_members(victim.raw())
    return victim.flipped(packed, len(packed) + start, len(packed) + start + 4)


def _junk(victim: Victim) -> bytes:
    size = victim.draw.choice([1, 2, 7, 8, 512, 70_000])
    kind = victim.draw.choice(["zeros", "noise", "magic", "text"])
    junk = {
        "zeros": bytes(size),
        "noise": b"\x7f" + victim.draw.randbytes(size),
        "magic": b"\x1f\x8b" + victim.draw.randbytes(size),
        "text": b"\n" * size,
    }
    return victim.packed + junk[kind]


def _sizes(victim: Victim) -> bytes:
    x, y, z, t = victim.stored.shape
    lies = [
        (4, x, y, z, t + 1), (4, x, y, z, t - 1), (4, x + 1, y, z, t), (4, 32767, 32767, 32767, 32767),
        (4, x, y, z, 30000), (4, x, y, 0, t), (4, x, -y, z, t), (4, -x, -y, z, t), (0, x, y, z, t), (9, x, y, z, t),
        (-1, x, y, z, t),
    ]  # fmt: skip
    if victim.version == 2:
        lies += [
            (4, 2**62, 2**62, 2**62, 2**62),
            (4, 2**32, 2**32, 1, 1),
            (4, 2**63 - 1, 3, 1, 1),
            (4, -(2**63), 1, 1, 1),
        ]
    rank, *sizes = victim.draw.choice(lies)
    return victim.raw(dim=(rank, *sizes, 1, 1, 1))


def _datatype(victim: Victim) -> bytes:
    others = {code for dtype, code in DATATYPES.items() if np.dtype(dtype).itemsize != victim.stored.dtype.itemsize}
    return victim.raw(datatype=victim.draw.choice(sorted(others | {0, 1, 3, 32, 128, 1536, 2304, -4, 9999})))


def _offset(victim: Victim) -> bytes:
    if victim.version == 2:
        return victim.raw(vox_offset=victim.draw.choice([0, -1, 543, -(2**62), 2**62, 2**63 - 1, 10**7]))
    offsets = [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 351.0, 352.5, 3e38, 1e9, -3e38, 4096.0]
    return victim.raw(vox_offset=victim.draw.choice(offsets))


def _bomb(victim: Victim) -> bytes:
    zeros = gzip.compress(bytes(64 * MIB), mtime=0)
    return gzip.compress(victim.raw(), mtime=0) + zeros * victim.draw.choice([1, 8, 40])


def _bomb_in_extension(victim: Victim) -> bytes:
    zeros = gzip.compress(bytes(64 * MIB), mtime=0)
    head = victim.raw(vox_offset=65 * MIB + 16)[: 352 if victim.version == 1 else 544]
    return gzip.compress(head, mtime=0) + zeros * 3


def _giant_frame(victim: Victim) -> bytes:
    """Sizes that the gzip could hold, of zeros; one frame of them is more than a machine should give."""
    head = Victim(victim.stored, 2, victim.draw).raw(dim=(4, 1400, 1400, 1400, 1, 1, 1, 1), datatype=16)[:544]
    return gzip.compress(head, mtime=0) + gzip.compress(bytes(64 * MIB), mtime=0) * 180


def _empty_members(victim: Victim) -> bytes:
    return gzip.compress(b"", mtime=0) * victim.draw.randrange(200, 20_000) + victim.packed


def _many_members(victim: Victim) -> bytes:
    raw = victim.raw()
    cuts = sorted(victim.draw.sample(range(1, len(raw)), min(len(raw) - 1, victim.draw.randrange(1, 60))))
    return gzip_members(raw, cuts) + gzip.compress(b"", mtime=0) * victim.draw.choice([0, 0, 1])


def _wrong_header(victim: Victim) -> bytes:
    raw = bytearray(victim.raw())
    if victim.draw.random() < 0.5:
        raw[:4] = struct.pack("<i", victim.draw.choice([0, 1, 349, -1, 540 if victim.version == 1 else 348]))
    else:
        place = slice(344, 348) if victim.version == 1 else slice(4, 12)
        raw[place] = victim.draw.randbytes(place.stop - place.start)
    return bytes(raw)


KINDS: dict[str, tuple[Verdict, str, Callable[[Victim], bytes]]] = {
    "flip in the stream": (
        "equal",
        ".nii.gz",
        lambda v: (lambda p: v.flipped(p, 10, len(p) - 8))(gzip_members(v.raw())),
    ),
    "flip anywhere": ("equal", ".nii.gz", lambda v: (lambda p: v.flipped(p, 0, len(p)))(v.packed)),
    "cut gzip": ("refused", ".nii.gz", lambda v: v.cut(gzip_members(v.raw()))),
    "cut before trailer": ("refused", ".nii.gz", lambda v: gzip_members(v.raw())[: -v.draw.randrange(1, 9)]),
    "cut plain": ("refused", ".nii", lambda v: v.cut(v.raw())),
    "bad crc": ("refused", ".nii.gz", lambda v: _flip_in_trailer(v, -8)),
    "wrong isize": ("refused", ".nii.gz", lambda v: _flip_in_trailer(v, -4)),
    "junk after gzip": ("refused", ".nii.gz", _junk),
    "junk after plain": ("refused", ".nii", lambda v: v.raw() + v.draw.randbytes(v.draw.randrange(1, 900))),
    "junk within gzip": ("refused", ".nii.gz", lambda v: gzip_members(v.raw() + bytes(v.draw.randrange(1, 900)))),
    "sizes that lie": ("refused", ".nii", _sizes),
    "sizes that lie packed": ("refused", ".nii.gz", lambda v: gzip_members(_sizes(v))),
    "type that lies": ("refused", ".nii", _datatype),
    "type that lies packed": ("refused", ".nii.gz", lambda v: gzip_members(_datatype(v))),
    "offset that lies": ("refused", ".nii", _offset),
    "offset that lies packed": ("refused", ".nii.gz", lambda v: gzip_members(_offset(v))),
    "wrong header": ("refused", ".nii", _wrong_header),
    "bomb": ("refused", ".nii.gz", _bomb),
    "bomb in extension": ("refused", ".nii.gz", _bomb_in_extension),
    "giant frame": ("refused", ".nii.gz", _giant_frame),
    "empty members": ("refused", ".nii.gz", _empty_members),
    "empty file": ("refused", ".nii.gz", lambda v: b""),
    "empty gzip": ("refused", ".nii.gz", lambda v: gzip.compress(b"", mtime=0)),
    "gzip named nii": ("refused", ".nii", lambda v: v.packed),
    "plain named gzip": ("refused", ".nii.gz", lambda v: v.raw()),
    "not an image": ("refused", ".nii.gz", lambda v: gzip.compress(v.draw.randbytes(4000), mtime=0)),
    "many members": ("valid", ".nii.gz", _many_members),
    "extension": (
        "valid",
        ".nii.gz",
        lambda v: gzip_members(v.raw(extension=comment_extension(v.draw.randrange(1, 9000)))),
    ),
}
# What is refused for what it says or would unpack to: quickly, and before memory is asked for.
HOSTILE = ("sizes", "type", "offset", "bomb", "giant", "empty members")
