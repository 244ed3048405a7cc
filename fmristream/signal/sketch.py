"""A run's fingerprint: about 1 kB by which a copy of it is known again, however it was written.

Values are summed in blocks of a lattice that is fixed in the world (24 mm), so that cropping, another mask or another
voxel size change little. Changes from frame to frame of these sums, which are white where the sums themselves drift alike
in all runs, are added up with random signs into a few courses; of each only the sign at every frame is kept. Scaling,
dtype and slow drifts do not touch signs, and dropped first frames shift them. A coarse mean image lies beside.
"""

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError
from fmristream.signal.grid import Grid, stored_order

BLOCK_MM = 24.0
# Of changes from frame to frame, all courses together; the longest runs keep two courses of their first frames.
MAX_BITS = 4096
MAX_FRAMES = 2049
MAX_COURSES = 32
# Edge of the mean image in blocks: 192 mm hold a head.
IMAGE_BLOCKS = 8
# Fewer signs in common say nothing: unrelated runs agree by chance to about 1/sqrt(bits).
MIN_BITS = 64
# Blocks whose courses are handled at once.
_GROUP = 64
# In robust SDs: what is beyond is motion or a first frame, which many runs share.
_CLIP = 3.0

_MAGIC = b"fsk1"
_HEADER = struct.Struct("<4sHB3h")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sketch:
    """A fingerprint, decoded.

    Attributes:
        signs: (k, t) bool of courses at each change from a frame to the next; (0, 0) where a run is too short or constant.
        origin: block of the world's lattice at which the image begins.
        image: (8, 8, 8) uint8 mean of each block, the largest 255.
    """

    signs: NDArray[np.bool_]
    origin: tuple[int, int, int]
    image: NDArray[np.uint8]

    def encode(self) -> bytes:
        """As it is stored."""
        courses, length = self.signs.shape
        header = _HEADER.pack(_MAGIC, length, courses, *self.origin)
        return header + np.packbits(self.signs, axis=1).tobytes() + self.image.tobytes()

    @classmethod
    def decode(cls, data: bytes) -> "Sketch":
        """A stored sketch.

        Raises:
            CorruptDataError: it is none.
        """
        image_bytes = IMAGE_BLOCKS**3
        magic, length, courses, *origin = (
            _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (b"", 0, 0, 0, 0, 0)
        )
        packed = -(-length // 8)
        if magic != _MAGIC or len(data) != _HEADER.size + courses * packed + image_bytes:
            raise CorruptDataError(f"{len(data)} bytes that are no sketch of a run; restore the object from a copy")
        bits = np.frombuffer(data, dtype=np.uint8, count=courses * packed, offset=_HEADER.size)
        signs = np.unpackbits(bits.reshape(courses, packed), axis=1, count=length).astype(bool)
        image = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size + courses * packed)
        x, y, z = origin
        return cls(signs=signs, origin=(x, y, z), image=image.reshape((IMAGE_BLOCKS,) * 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """How alike two runs are.

    Attributes:
        time: correlation of their courses as their signs tell it, at the best lag; about 1 for copies, 0 for unrelated
            runs, NaN where there are too few frames.
        lag: first frames that the second lacks (negative: the first lacks) at which they agree best.
        image: correlation of the mean images; runs of one scanner and space are alike here, whoever is in it.
        bits: how many signs were compared.
    """

    time: float
    lag: int
    image: float
    bits: int


class RunSketch:
    """The sketch of a run, fed frame by frame; memory is one number a block and frame, of 2,049 frames at most.

    Args:
        grid: of the run.
        mask: (x, y, z) its stored voxels.
        frames: how many will come.
    """

    def __init__(self, grid: Grid, mask: NDArray[np.bool_], *, frames: int) -> None:
        # Imported here: reading a dataset needs no compiler.
        from fmristream.signal import kernels

        self._add_up, self._add_up_small = kernels.block_sums, kernels.block_sums_of_small_integers
        places = _block_of(stored_order(mask), grid)
        # As one number each, in the order of (x, y, z): rows are found much slower.
        keys = (places[0] + 2**15 << 32) + (places[1] + 2**15 << 16) + places[2] + 2**15
        # Voxels next to each other lie in one block mostly: stretches of them are summed.
        is_start = np.diff(keys, prepend=-1) != 0
        is_start[:: kernels.BLOCK] = True
        starts = np.flatnonzero(is_start)
        found, of_stretch = np.unique(keys[starts], return_inverse=True)
        self._blocks = (np.stack([found >> 32, found >> 16 & 0xFFFF, found & 0xFFFF], axis=1) - 2**15).astype(np.int16)
        self._starts = np.append(starts, len(keys)).astype(np.int32)
        self._block_of_stretch = of_stretch.reshape(-1).astype(np.int32)
        volume_mm3 = abs(float(np.linalg.det(grid.matrix()[:3, :3])))
        voxels = np.bincount(self._block_of_stretch, weights=np.diff(self._starts), minlength=len(found))
        self._share = voxels * (volume_mm3 / BLOCK_MM**3)
        self._sums = np.zeros((min(frames, MAX_FRAMES), len(self._blocks)), dtype=np.float32)
        self._volume_mm3 = volume_mm3
        self._count = 0

    def add(self, values: NDArray[Any]) -> None:
        """Count one frame, (v,) stored values."""
        if self._count < len(self._sums):
            is_small = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
            add_up = self._add_up_small if is_small else self._add_up
            add_up(values, self._starts, self._block_of_stretch, self._sums[self._count])
        self._count += 1

    def finish(self) -> Sketch:
        """The sketch of what was counted; some blocks at a time, so that the longest runs take no more memory than others."""
        sums = self._sums[: self._count]
        means, courses = [], _Courses(frames=len(sums))
        for first in range(0, len(self._blocks), _GROUP):
            group = slice(first, first + _GROUP)
            with np.errstate(over="ignore"):  # what does not fit is no signal of a scanner, or is cut at 3 SD anyway
                some = sums[:, group].astype(np.float64) * self._volume_mm3
                np.nan_to_num(some, copy=False, posinf=0, neginf=0)
                courses.add(some, self._share[group], self._blocks[group])
                means.append(some.mean(axis=0))
        return Sketch(signs=courses.signs(), **_image(np.concatenate(means), self._blocks))


def similarity(one: Sketch, other: Sketch, *, max_lag: int = 16) -> Similarity:
    """Compare two runs, also where one lacks up to `max_lag` first frames of the other."""
    courses = min(len(one.signs), len(other.signs))
    first, second = (sketch.signs[:courses].astype(np.int16) * 2 - 1 for sketch in (one, other))
    longest = courses * min(first.shape[1], second.shape[1])
    best = Similarity(time=math.nan, lag=0, image=_image_correlation(one, other), bits=0)
    for lag in sorted(range(-max_lag, max_lag + 1), key=abs):
        here, there = (first[:, lag:], second) if lag >= 0 else (first, second[:, -lag:])
        length = min(here.shape[1], there.shape[1])
        bits = courses * length
        if bits < max(MIN_BITS, longest // 2):
            continue
        found = _correlation(float((here[:, :length] * there[:, :length]).sum()) / bits)
        if not found <= best.time:
            best = Similarity(time=found, lag=lag, image=best.image, bits=bits)
    return best


def near_duplicates(
    sketches: Sequence[Sketch], *, threshold: float = 0.5, max_lag: int = 8
) -> Iterator[tuple[int, int, Similarity]]:
    """Pairs of runs that are alike: (place of the one, of the other, how alike), in order.

    Every pair is compared: some seconds for thousands of runs, hours for a hundred thousand.

    Args:
        sketches: of the runs; those without signs are passed over.
        threshold: of `Similarity.time`.
        max_lag: how many first frames one of them may lack.
    """
    usable = [place for place, sketch in enumerate(sketches) if sketch.signs.size >= MIN_BITS]
    if len(usable) < 2:
        return
    courses = min(len(sketches[place].signs) for place in usable)
    lengths = np.array([sketches[place].signs.shape[1] for place in usable])
    signs = np.zeros((len(usable), courses, int(lengths.max()) + 2 * max_lag), dtype=np.float32)
    for row, place in enumerate(usable):
        signs[row, :, max_lag : max_lag + lengths[row]] = sketches[place].signs[:courses] * 2.0 - 1.0
    least = _agreement(threshold) - 3 / math.sqrt(MIN_BITS)  # of few courses; the full comparison decides
    for row, place in enumerate(usable):
        for other in _candidates(signs, lengths, row, least=least, max_lag=max_lag):
            found = similarity(sketches[place], sketches[usable[other]], max_lag=max_lag)
            if found.time >= threshold:
                yield place, usable[other], found


def _candidates(
    signs: NDArray[np.float32], lengths: NDArray[np.int64], row: int, *, least: float, max_lag: int
) -> list[int]:
    """Later rows that agree with this one at some lag; `signs` has `max_lag` zeros before and behind."""
    others, courses = signs[row + 1 :], signs.shape[1]
    if not len(others):
        return []
    flat = others.reshape(len(others), -1)
    found = np.zeros(len(others), dtype=bool)
    for lag in range(-max_lag, max_lag + 1):
        moved = np.roll(signs[row], -lag, axis=1).reshape(-1)
        first = lengths[row] - lag if lag > 0 else lengths[row]
        second = lengths[row + 1 :] + min(lag, 0)
        overlap = courses * np.minimum(first, second)
        found |= flat @ moved >= least * np.maximum(overlap, 1)
    return [row + 1 + int(place) for place in np.flatnonzero(found)]


def _correlation(agreement: float) -> float:
    """Of two Gaussian courses whose signs agree so much more often than not (Sheppard): sin(pi/2 x agreement)."""
    return math.sin(math.pi / 2 * agreement)


def _agreement(correlation: float) -> float:
    return 2 / math.pi * math.asin(correlation)


def _block_of(stored: NDArray[np.int64], grid: Grid) -> list[NDArray[np.int64]]:
    """Block of the world's lattice that the centre of each voxel lies in: three axes."""
    places = np.unravel_index(stored, grid.shape)
    return [_along(row, places, grid.shape) for row in grid.matrix()[:3]]


def _along(row: NDArray[np.float64], places: Sequence[NDArray[Any]], shape: Sequence[int]) -> NDArray[np.int64]:
    """Block along one axis of the world."""
    on = np.flatnonzero(row[:3])
    if len(on) <= 1:  # axes of grid and world are parallel: one number a slice, in place of one a voxel
        axis = int(on[0]) if len(on) else 0
        blocks: NDArray[np.int64] = _lattice(row[axis] * np.arange(shape[axis]) + row[3])[places[axis]]
        return blocks
    x, y, z = places
    return _lattice(row[0] * x + row[1] * y + row[2] * z + row[3])


def _lattice(position_mm: NDArray[np.float64]) -> NDArray[np.int64]:
    # Snapped, so that a centre on an edge does not fall here in one file and there in the next.
    block = np.floor(np.round(position_mm * 1024) / 1024 / BLOCK_MM)
    places: NDArray[np.int64] = np.clip(block, -(2**14), 2**14).astype(np.int64)
    return places


class _Courses:
    """Changes of the blocks' sums, added up with random signs."""

    def __init__(self, *, frames: int) -> None:
        length = max(0, frames - 1)
        self._mixed = np.zeros((length, min(MAX_COURSES, max(2, MAX_BITS // max(1, length)))))

    def add(self, sums: NDArray[np.float64], share: NDArray[Any], blocks: NDArray[Any]) -> None:
        """Add blocks: (t, b) sums, how much of each block was seen, and where it lies."""
        if not len(self._mixed):
            return
        changes = np.diff(sums, axis=0)
        changes -= np.median(changes, axis=0)
        scale = 1.4826 * np.median(np.abs(changes), axis=0)
        scale = np.where(scale > 0, scale, changes.std(axis=0))
        z = np.divide(changes, scale, out=np.zeros_like(changes), where=(scale > 0) & np.isfinite(scale))
        z = np.clip(np.nan_to_num(z), -_CLIP, _CLIP)
        weights = _random_signs(blocks, self._mixed.shape[1]) * np.minimum(share, 1.0)[:, None]
        self._mixed += np.einsum("tb,bk->tk", z, weights)  # BLAS would add in an order of its own, with buffers of its own

    def signs(self) -> NDArray[np.bool_]:
        """(k, t - 1) of every course; (0, 0) where there is nothing to tell."""
        if not self._mixed.any():
            return np.zeros((0, 0), dtype=bool)
        return np.ascontiguousarray(self._mixed.T > 0)


def _random_signs(blocks: NDArray[Any], courses: int) -> NDArray[Any]:
    """(b, k) of -1 and 1, by the place of the block alone: absent blocks change nothing for the others."""
    digests = b"".join(
        hashlib.sha256(b"fmristream-sketch-v1" + block.astype("<i2").tobytes()).digest() for block in blocks
    )
    bits = np.unpackbits(np.frombuffer(digests, dtype=np.uint8).reshape(len(blocks), 32), axis=1)
    return bits[:, :courses] * 2.0 - 1.0


def _image(mean: NDArray[np.float64], blocks: NDArray[Any]) -> dict[str, Any]:
    """The mean of 8 x 8 x 8 blocks around the centre of mass, and where it begins."""
    mass = np.clip(np.nan_to_num(mean), 0, None)
    mass = mass / mass.max() if mass.any() else mass  # a sum of huge means would not fit
    total = mass.sum()
    centre = (mass @ (blocks + 0.5)) / total if total > 0 else np.zeros(3)
    origin = np.round(centre - IMAGE_BLOCKS / 2).astype(np.int64)
    places = blocks - origin
    inside = ((places >= 0) & (places < IMAGE_BLOCKS)).all(axis=1)
    image = np.zeros((IMAGE_BLOCKS,) * 3)
    image[tuple(places[inside].T)] = mass[inside]
    peak = image.max()
    scaled = np.rint(image / peak * 255) if peak > 0 else image
    x, y, z = (int(start) for start in origin)
    return {"image": scaled.astype(np.uint8), "origin": (x, y, z)}


def _image_correlation(one: Sketch, other: Sketch) -> float:
    """Over all blocks of both; what one lacks is 0."""
    low = np.minimum(one.origin, other.origin)
    high = np.maximum(one.origin, other.origin) + IMAGE_BLOCKS
    if (high - low > 4 * IMAGE_BLOCKS).any():
        return 0.0
    placed = []
    for sketch in (one, other):
        whole = np.zeros(tuple(high - low))
        start = np.array(sketch.origin) - low
        whole[tuple(slice(s, s + IMAGE_BLOCKS) for s in start)] = sketch.image
        placed.append(whole.reshape(-1) - whole.mean())
    norm = math.sqrt(float((placed[0] ** 2).sum() * (placed[1] ** 2).sum()))
    return float(placed[0] @ placed[1]) / norm if norm > 0 else 0.0
