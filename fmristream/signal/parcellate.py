"""From voxels to parcels: an atlas on its own grid becomes weights on a run's voxels. Pure arrays in, arrays out.

Positions go through millimetres, by elementwise sums that no library adds up in an order of its own, and are snapped to
2^-20 of a voxel: a centre that lies between two voxels of the atlas belongs to the same one on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fmristream.signal.grid import Grid, Shape3, stored_order

AtlasKind = Literal["labels", "probabilities"]

# Of a voxel; far below what an affine in float32 says, far above the rounding of float64.
_SNAP = 2.0**-20
# Below this share of a parcel in the mask, its series is that of a rest.
LOW_COVERAGE = 0.5

_BLOCK = 2**18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Atlas:
    """Parcels on a grid of their own.

    Attributes:
        kind: `labels` (each voxel in at most one parcel) or `probabilities` (a map of weights for each).
        grid: the atlas's own.
        labels: (p,) the numbers of the parcels, rising.
        indptr: (p + 1,) where each parcel's voxels begin in `positions`.
        positions: (n,) voxels in C order of (x, y, z), rising within a parcel.
        weights: (n,) float32, above 0; 1 for labels.
    """

    kind: AtlasKind
    grid: Grid
    labels: NDArray[np.int64]
    indptr: NDArray[np.int64]
    positions: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """Which voxels of a space make up which parcel, and how much each counts.

    Attributes:
        indptr: (p + 1,) where each parcel's voxels begin.
        voxels: (n,) places along the last axis of the run's arrays, rising within a parcel.
        weights: (n,) float32, above 0.
        coverage: (p,) float32: share of the atlas's weight of the parcel that lies in stored voxels, 0 to 1.
    """

    indptr: NDArray[np.int64]
    voxels: NDArray[np.int64]
    weights: NDArray[np.float32]
    coverage: NDArray[np.float32]

    @property
    def parcels(self) -> int:
        """How many there are, those without a voxel among them."""
        return len(self.indptr) - 1

    @property
    def empty(self) -> int:
        """Parcels without a stored voxel: their series are NaN."""
        return int((np.diff(self.indptr) == 0).sum())


def atlas_of_labels(volume: NDArray[np.int64], grid: Grid) -> Atlas:
    """An atlas of (x, y, z) whole numbers; 0 and less is background."""
    flat = np.ascontiguousarray(volume).reshape(-1)
    inside = np.flatnonzero(flat > 0)
    order = np.argsort(flat[inside], kind="stable")
    positions = inside[order]
    labels, counts = np.unique(flat[inside], return_counts=True)
    return Atlas(
        kind="labels",
        grid=grid,
        labels=labels.astype(np.int64),
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        positions=positions.astype(np.int64),
        weights=np.ones(len(positions), dtype=np.float32),
    )


def atlas_of_maps(maps: Iterator[NDArray[Any]], grid: Grid) -> Atlas:
    """An atlas of (x, y, z) maps, numbered from 1; what is not above 0 weighs nothing."""
    positions, weights = [], []
    for volume in maps:
        flat = np.ascontiguousarray(volume, dtype=np.float32).reshape(-1)
        inside = np.flatnonzero(flat > 0)
        positions.append(inside.astype(np.int64))
        weights.append(flat[inside])
    sizes = [len(inside) for inside in positions]
    return Atlas(
        kind="probabilities",
        grid=grid,
        labels=np.arange(1, len(sizes) + 1, dtype=np.int64),
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        positions=np.concatenate(positions) if positions else np.empty(0, dtype=np.int64),
        weights=np.concatenate(weights) if weights else np.empty(0, dtype=np.float32),
    )


def weights_on(atlas: Atlas, grid: Grid, mask: NDArray[np.bool_]) -> Weights:
    """The atlas on the voxels of a space: labels by the nearest voxel, probabilities by trilinear interpolation.

    Args:
        atlas: on any grid.
        grid: of the space.
        mask: (x, y, z) its stored voxels.
    """
    to_atlas = np.linalg.inv(atlas.grid.matrix()) @ grid.matrix()
    stored = stored_order(mask)
    if atlas.kind == "labels":
        indptr, voxels, weights = _nearest_labels(atlas, grid.shape, stored, to_atlas)
    else:
        indptr, voxels, weights = _interpolated_maps(atlas, grid.shape, stored, to_atlas)
    return Weights(indptr=indptr, voxels=voxels, weights=weights, coverage=_coverage(atlas, grid, mask))


def centres_mm(weights: Weights, mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(p, 3) where each parcel lies: the weighted mean position of its stored voxels; NaN for parcels without one.

    Args:
        weights: on the voxels of `mask`.
        mask: (x, y, z).
        affine: (4, 4), voxel to mm.
    """
    parcel = np.repeat(np.arange(weights.parcels), np.diff(weights.indptr))
    axes = [axis[weights.voxels].astype(np.float64) for axis in np.nonzero(mask)]
    sums = [np.bincount(parcel, weights=weights.weights * axis, minlength=weights.parcels) for axis in axes]
    total = np.bincount(parcel, weights=weights.weights, minlength=weights.parcels)
    means = np.full((weights.parcels, 3), np.nan)
    np.divide(np.stack(sums, axis=1), total[:, None], out=means, where=total[:, None] > 0)
    return means @ affine[:3, :3].T + affine[:3, 3]


def _nearest_labels(
    atlas: Atlas, shape: Shape3, stored: NDArray[np.int64], to_atlas: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    parcel_of = np.full(int(np.prod(atlas.grid.shape)), -1, dtype=np.int32)
    parcel_of[atlas.positions] = np.repeat(np.arange(len(atlas.labels)), np.diff(atlas.indptr))
    parcels = np.full(len(stored), -1, dtype=np.int32)
    for start in range(0, len(stored), _BLOCK):
        here = _transformed(stored[start : start + _BLOCK], shape, to_atlas)
        nearest, inside = _positions([np.floor(axis + 0.5) for axis in here], atlas.grid.shape)
        parcels[start : start + _BLOCK] = np.where(inside, parcel_of[nearest], -1)
    voxels = np.flatnonzero(parcels >= 0)
    order = np.argsort(parcels[voxels], kind="stable")
    counts = np.bincount(parcels[voxels], minlength=len(atlas.labels))
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return indptr, voxels[order].astype(np.int64), np.ones(len(voxels), dtype=np.float32)


def _interpolated_maps(
    atlas: Atlas, shape: Shape3, stored: NDArray[np.int64], to_atlas: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    dense = np.zeros(int(np.prod(atlas.grid.shape)), dtype=np.float64)
    voxels: list[list[NDArray[np.int64]]] = [[] for _ in atlas.labels]
    weights: list[list[NDArray[np.float32]]] = [[] for _ in atlas.labels]
    # Block by block: the eight neighbours of all voxels of a fine grid would be gigabytes.
    for start in range(0, len(stored), _BLOCK):
        corners = _corners(stored[start : start + _BLOCK], atlas, shape, to_atlas)
        for parcel in range(len(atlas.labels)):
            span = slice(int(atlas.indptr[parcel]), int(atlas.indptr[parcel + 1]))
            dense[atlas.positions[span]] = atlas.weights[span]
            found = np.zeros(len(corners[0][0]))
            for place, share in corners:
                found += share * dense[place]
            dense[atlas.positions[span]] = 0
            rounded = found.astype(np.float32)
            inside = np.flatnonzero(rounded > 0)
            voxels[parcel].append(start + inside)
            weights[parcel].append(rounded[inside])
    sizes = [sum(len(block) for block in blocks) for blocks in voxels]
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    all_voxels = np.concatenate([block for blocks in voxels for block in blocks]).astype(np.int64)
    return indptr, all_voxels, np.concatenate([block for blocks in weights for block in blocks])


def _corners(
    stored: NDArray[np.int64], atlas: Atlas, shape: Shape3, to_atlas: NDArray[np.float64]
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """The eight neighbours of each position in the atlas, and how much each counts; 0 beyond its edges."""
    here = _transformed(stored, shape, to_atlas)
    lower = [np.floor(axis) for axis in here]
    beyond = [axis - low for axis, low in zip(here, lower, strict=True)]
    found = []
    for corner in product((0, 1), repeat=3):
        place, inside = _positions([low + step for low, step in zip(lower, corner, strict=True)], atlas.grid.shape)
        share = np.ones(len(stored))
        for part, step in zip(beyond, corner, strict=True):
            share = share * (part if step else 1 - part)
        found.append((place, np.where(inside, share, 0.0)))
    return found


def _coverage(atlas: Atlas, grid: Grid, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Share of each parcel's weight whose voxels have their centre in a stored voxel."""
    to_grid = np.linalg.inv(grid.matrix()) @ atlas.grid.matrix()
    flat = np.ascontiguousarray(mask).reshape(-1)
    here = _transformed(atlas.positions, atlas.grid.shape, to_grid)
    nearest, inside = _positions([np.floor(axis + 0.5) for axis in here], grid.shape)
    covered = np.where(inside & flat[nearest], atlas.weights, 0).astype(np.float64)
    parcel = np.repeat(np.arange(len(atlas.labels)), np.diff(atlas.indptr))
    whole = np.bincount(parcel, weights=atlas.weights, minlength=len(atlas.labels))
    part = np.bincount(parcel, weights=covered, minlength=len(atlas.labels))
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0).astype(np.float32)


def _transformed(flat: NDArray[np.int64], shape: Shape3, matrix: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Positions in C order of a grid, in the voxel coordinates of another: three axes."""
    x, y, z = np.unravel_index(flat, shape)
    found = []
    for row in matrix[:3]:
        moved = row[0] * x + row[1] * y + row[2] * z + row[3]
        found.append(np.round(moved / _SNAP) * _SNAP)
    return found


def _positions(axes: list[NDArray[np.float64]], shape: Shape3) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Places in C order of whole coordinates, and which of them lie in the grid; place 0 for the others."""
    inside = np.ones(len(axes[0]), dtype=bool)
    for axis, size in zip(axes, shape, strict=True):
        inside &= (axis >= 0) & (axis < size)
    x, y, z = (np.where(inside, axis, 0).astype(np.int64) for axis in axes)
    return (x * shape[1] + y) * shape[2] + z, inside


class ParcelSeries:
    """Weighted means of parcels over the frames of a run, fed frame by frame.

    Args:
        weights: of the run's space.
        frames: how many will come.
    """

    def __init__(self, weights: Weights, *, frames: int) -> None:
        # Imported here: reading a dataset needs no compiler.
        from fmristream.signal import kernels

        self._means = kernels.parcel_means
        self._weights = weights
        self._series = np.empty((frames, weights.parcels), dtype=np.float32)
        self._count = 0

    def add(self, values: NDArray[Any]) -> None:
        """Count one frame, (v,) stored values."""
        chosen = self._weights
        self._means(values, chosen.indptr, chosen.voxels, chosen.weights, self._series[self._count])
        self._count += 1

    def finish(self) -> NDArray[np.float32]:
        """(t, p) stored units, before slope and intercept; NaN where a parcel has no finite voxel."""
        assert self._count == len(self._series)
        return self._series


def robust_statistics(series: NDArray[np.float32]) -> NDArray[np.float32]:
    """(2, p) median and interquartile range over time of (t, p) series, linear interpolation; NaN does not count."""
    wide = series.astype(np.float64)
    wide[~np.isfinite(wide)] = np.nan
    found = np.full((2, series.shape[1]), np.nan)
    there = ~np.isnan(wide).all(axis=0)
    if there.any():
        low, middle, high = np.nanpercentile(wide[:, there], (25, 50, 75), axis=0)
        found[:, there] = middle, high - low
    return found.astype(np.float32)
