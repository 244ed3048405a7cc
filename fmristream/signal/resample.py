"""Other grids and other repetition times: weights by additions and multiplications alone, so that every machine gets the same.

In space a target voxel is the mean of points spread evenly over it, no further apart than source voxels, each found by
linear interpolation: plain linear interpolation where the target is as fine as the source, an average over its volume where
it is coarser. In time a target frame is a weighted sum of the source frames around it, by a windowed sinc.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.signal import kernels
from fmristream.signal.grid import Grid, voxel_sizes_mm

# Two repetition times are one when they differ by no more than this part; headers hold float32.
SAME_TR = 1e-6
# Of the kernel in time, on either side, in units of the longer of the two repetition times.
HALF_WIDTH = 8
# Kaiser window for 60 dB (beta = .1102 (60 - 8.7)); its transition band is .45 of the lower Nyquist frequency wide.
BETA = 5.65326
# Slowing down, the transition ends at the new Nyquist frequency; else it lies about the source's, and nothing folds.
SLOWING_CUTOFF = 0.775
# What a change of these rules changes values by.
SPACE_METHOD = "linear-mean-1"
TIME_METHOD = "kaiser-sinc-1"

# A target voxel more than this many source voxels wide is a mistake.
MAX_POINTS = 32
_MAX_FRAME_BYTES = 2**30
_AT_THE_END = 1e-6


def resized(grid: Grid, edge_mm: float) -> Grid:
    """The same field of view about the same centre with cubic voxels of this edge length, axes as they are."""
    sizes = voxel_sizes_mm(grid.matrix())
    shape = tuple(
        max(1, math.floor(n * size / edge_mm + 0.5 + 1e-4)) for n, size in zip(grid.shape, sizes, strict=True)
    )
    rows = []
    for i in range(3):
        source = grid.affine[4 * i : 4 * i + 4]
        axes = [source[j] * (edge_mm / sizes[j]) for j in range(3)]
        origin = source[3]
        for j in range(3):
            origin += source[j] * ((grid.shape[j] - 1) / 2) - axes[j] * ((shape[j] - 1) / 2)
        rows += [*axes, origin]
    x, y, z = shape
    return Grid(shape=(x, y, z), affine=(*rows, 0.0, 0.0, 0.0, 1.0))


def is_finite_grid(grid: Grid) -> bool:
    """Whether the grid has a volume, and frames of it can be held."""
    return _determinant(grid.affine) != 0 and math.prod(grid.shape) * 4 <= _MAX_FRAME_BYTES


@dataclass(frozen=True, slots=True)
class SpaceWeights:
    """Sparse weights: target voxel t (Fortran order) is the sum of weights[k] x source[places[k]] for k from starts[t] on."""

    starts: NDArray[np.int64]
    places: NDArray[np.uint32]
    weights: NDArray[np.float32]
    shape: tuple[int, int, int]

    def apply(self, volume: NDArray[Any], slope: float, inter: float, out: NDArray[np.float64]) -> None:
        """Resample a stored (x, y, z) volume in Fortran order, scaled; `out` is flat, Fortran order.

        Nothing is there outside the source's field of view: 0. NaN goes to the voxels that it is part of.
        """
        kernels.apply_sparse(volume.reshape(-1, order="F"), self.starts, self.places, self.weights, slope, inter, out)


def points_of(source: Grid, target: Grid) -> tuple[int, int, int]:
    """How many points along each axis a target voxel is the mean of.

    Raises:
        ValueError: the source's affine has no inverse, or target voxels are more than 32 source voxels wide.
    """
    steps, _ = _steps(source.affine, target.affine)
    x, y, z = (max(1, math.ceil(max(abs(steps[i][j]) for i in range(3)) - 1e-6)) for j in range(3))
    if max(x, y, z) > MAX_POINTS:
        raise ValueError(f"target voxels are {max(x, y, z)} voxels of the source wide, at most {MAX_POINTS} are taken")
    return x, y, z


@lru_cache(maxsize=2)
def space_weights(source: Grid, target: Grid) -> SpaceWeights:
    """The weights from one grid to another, kept for the runs that follow.

    Raises:
        ValueError: a grid has no volume, or target voxels are more than 32 source voxels wide.
    """
    steps, origin = _steps(source.affine, target.affine)
    points = points_of(source, target)
    matrix = np.array([[*steps[i], origin[i]] for i in range(3)])
    shape = np.array(source.shape, dtype=np.int64)
    size, counts = np.array(target.shape, dtype=np.int64), np.array(points, dtype=np.int64)
    starts = np.zeros(math.prod(target.shape) + 1, dtype=np.int64)
    nothing = np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.float32)
    kernels.sparse_weights(matrix, shape, size, counts, starts, *nothing, False)
    np.cumsum(starts, out=starts)
    places, weights = np.empty(starts[-1], dtype=np.uint32), np.empty(starts[-1], dtype=np.float32)
    kernels.sparse_weights(matrix, shape, size, counts, starts, places, weights, True)
    return SpaceWeights(starts=starts, places=places, weights=weights, shape=target.shape)


def frames_after(frames: int, tr_s: float, new_tr_s: float) -> int:
    """How many frames at the new repetition time begin no later than the last of the source."""
    return math.floor((frames - 1) * (tr_s / new_tr_s) + 1e-9) + 1


def time_weights(frames: int, tr_s: float, new_tr_s: float) -> Iterator[list[tuple[int, float]]]:
    """For each target frame its source frames with their weights, which add up to 1.

    Before the first and after the last frame the series goes on as its mirror image about that frame.
    """
    step = new_tr_s / tr_s
    scale = max(1.0, step)  # the longer repetition time, in source frames
    cutoff = SLOWING_CUTOFF if step > 1 else 1.0
    half = HALF_WIDTH * scale + _AT_THE_END  # a frame at the very end of the window counts on either side, or on none
    for target in range(frames_after(frames, tr_s, new_tr_s)):
        centre = target * step
        found: dict[int, float] = {}
        for frame in range(math.ceil(centre - half), math.floor(centre + half) + 1):
            weight = _kernel((frame - centre) / scale, cutoff)
            place = _mirrored(frame, frames)
            found[place] = found.get(place, 0.0) + weight
        total = 0.0
        for place in sorted(found):
            total += found[place]
        yield [(place, found[place] / total) for place in sorted(found)]


class TimeResampler:
    """Frames in, frames at another repetition time out, each as soon as its last source frame is there.

    Memory: a sum in double precision for each target frame that a source frame takes part in: 17 of them where the
    repetition time gets longer, 16 x old / new where it gets shorter.

    Args:
        frames: of the source.
        tr_s: of the source.
        new_tr_s: wanted.
        voxels: of a frame.
    """

    def __init__(self, *, frames: int, tr_s: float, new_tr_s: float, voxels: int) -> None:
        self._coming = enumerate(time_weights(frames, tr_s, new_tr_s))
        self._next = next(self._coming, None)
        self._open: list[tuple[dict[int, float], int, NDArray[np.float64]]] = []
        self._spare: list[NDArray[np.float64]] = []
        self._voxels = voxels
        self._frame = 0

    def add(self, volume: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
        """Take the next flat frame; yields the target frames that it completes, valid until the next of them is asked for."""
        while self._next is not None and self._next[1][0][0] <= self._frame:
            weights = dict(self._next[1])
            sums = self._spare.pop() if self._spare else np.empty(self._voxels)
            sums[:] = 0
            self._open.append((weights, max(weights), sums))
            self._next = next(self._coming, None)
        for weights, _, sums in self._open:
            if self._frame in weights:
                kernels.add_weighted(volume, weights[self._frame], sums)
        while self._open and self._open[0][1] <= self._frame:
            _, _, sums = self._open.pop(0)
            yield sums
            self._spare.append(sums)
        self._frame += 1


def _kernel(x: float, cutoff: float) -> float:
    """sinc(cutoff x) under a Kaiser window that ends at the half width; x in units of the longer repetition time."""
    inside = 1 - (x / HALF_WIDTH) * (x / HALF_WIDTH)
    return _sinc(cutoff * x) * _bessel_i0(BETA * math.sqrt(max(inside, 0.0)))


# Written out, because the last bit of a library's sine differs between libraries, and digests must not.
def _sinc(x: float) -> float:
    whole = math.floor(x + 0.5)
    rest = (x - whole) * math.pi
    if x == 0:
        return 1.0
    term = total = rest
    for n in range(1, 12):
        term *= -rest * rest / ((2 * n) * (2 * n + 1))
        total += term
    return (-total if whole % 2 else total) / (math.pi * x)


def _bessel_i0(x: float) -> float:
    term = total = 1.0
    for n in range(1, 40):
        term *= (x / (2 * n)) * (x / (2 * n))
        total += term
    return total


def _mirrored(frame: int, frames: int) -> int:
    if frames == 1:
        return 0
    place = frame % (2 * frames - 2)
    return place if place < frames else 2 * frames - 2 - place


def _determinant(a: tuple[float, ...]) -> float:
    return (
        a[0] * (a[5] * a[10] - a[6] * a[9])
        - a[1] * (a[4] * a[10] - a[6] * a[8])
        + a[2] * (a[4] * a[9] - a[5] * a[8])
    )  # fmt: skip


def _steps(source: tuple[float, ...], target: tuple[float, ...]) -> tuple[list[list[float]], list[float]]:
    """Where a target voxel index lies in voxels of the source: steps (source axis, target axis) and origin."""
    a, determinant = source, _determinant(source)
    if determinant == 0:
        raise ValueError("the source's affine has no inverse")
    adjugate = [
        [a[5] * a[10] - a[6] * a[9], a[2] * a[9] - a[1] * a[10], a[1] * a[6] - a[2] * a[5]],
        [a[6] * a[8] - a[4] * a[10], a[0] * a[10] - a[2] * a[8], a[2] * a[4] - a[0] * a[6]],
        [a[4] * a[9] - a[5] * a[8], a[1] * a[8] - a[0] * a[9], a[0] * a[5] - a[1] * a[4]],
    ]
    inverse = [[value / determinant for value in row] for row in adjugate]
    columns = [[target[4 * i + j] for i in range(3)] for j in range(4)]
    columns[3] = [columns[3][i] - source[4 * i + 3] for i in range(3)]
    steps = [[_dot(inverse[i], columns[j]) for j in range(4)] for i in range(3)]
    return [row[:3] for row in steps], [row[3] for row in steps]


def _dot(row: list[float], column: list[float]) -> float:
    # Not `sum`, whose rounding differs between releases of Python.
    return row[0] * column[0] + row[1] * column[1] + row[2] * column[2]


def is_same_tr(one: float, other: float) -> bool:
    """Whether two repetition times are the same."""
    return abs(one - other) <= SAME_TR * other
