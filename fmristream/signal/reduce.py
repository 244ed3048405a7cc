"""Fewer values a frame: cubes of the grid, boxes of it, parcels. Where the values of a space go, and how much each counts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import SpaceError, UsageError
from fmristream.signal import recipe_kernels
from fmristream.signal.parcellate import Weights
from fmristream.signal.prepared import Layout
from fmristream.signal.steps import Crop, Pool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeansOp:
    """(t, v) to (t, p): weighted means of finite values."""

    weights: Weights

    def __call__(self, values: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """A new array."""
        chosen = self.weights
        means = np.empty((len(values), chosen.parcels))
        recipe_kernels.weighted_means(
            np.ascontiguousarray(values), chosen.indptr, chosen.voxels, chosen.weights, means
        )  # fmt: skip
        return means

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """Stays."""
        return fill


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TakeOp:
    """(t, v) to (t, w): some of the voxels."""

    voxels: NDArray[np.int64]

    def __call__(self, values: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """A new array."""
        return values[:, self.voxels]

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """Stays."""
        return fill


def pooled(layout: Layout, step: Pool) -> tuple[MeansOp, Layout]:
    """Cubes that hold a stored voxel, the last ones cut by the edge of the grid, and the grid of them.

    Raises:
        SpaceError: there is no grid.
    """
    mask, affine = _grid(layout, step.text)
    size = step.size
    shape = tuple(-(-edge // size) for edge in mask.shape)
    place = np.ravel_multi_index(tuple(axis // size for axis in np.nonzero(mask)), shape)
    cubes, counts = np.unique(place, return_counts=True)
    weights = Weights(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        voxels=np.argsort(place, kind="stable").astype(np.int64),
        weights=np.ones(len(place), dtype=np.float32),
        coverage=(counts / size**3).astype(np.float32),
    )
    coarse = np.zeros(int(np.prod(shape)), dtype=bool)
    coarse[cubes] = True
    matrix = affine.copy()
    matrix[:3, :3] *= size
    matrix[:3, 3] += affine[:3, :3] @ np.full(3, (size - 1) / 2)
    return MeansOp(weights=weights), Layout(voxels=len(cubes), mask=coarse.reshape(shape), affine=matrix)


def cropped(layout: Layout, step: Crop) -> tuple[TakeOp, Layout]:
    """The voxels in a box, and its grid.

    Raises:
        SpaceError: there is no grid.
        UsageError: the box holds no voxel.
    """
    mask, affine = _grid(layout, step.text)
    box = tuple(slice(start, stop) for start, stop in step.cuts)
    inside = np.zeros(mask.shape, dtype=bool)
    inside[box] = True
    small = np.ascontiguousarray(mask[box])
    if not small.any():
        raise UsageError(f"{step.text}: no stored voxel of the {mask.shape} grid lies in the box; cut less")
    starts = [range(edge)[cut][0] for edge, cut in zip(mask.shape, box, strict=True)]
    matrix = affine.copy()
    matrix[:3, 3] += affine[:3, :3] @ np.array(starts, dtype=np.float64)
    voxels = np.flatnonzero(inside[mask])
    return TakeOp(voxels=voxels), Layout(voxels=len(voxels), mask=small, affine=matrix)


def parcelled(layout: Layout, weights: Weights, *, what: str) -> tuple[MeansOp, Layout]:
    """Parcels whose weights are on this layout's voxels.

    Raises:
        SpaceError: they are on others.
    """
    if len(weights.voxels) and int(weights.voxels.max()) >= layout.voxels:
        raise SpaceError(f"{what}: the atlas's weights are for more voxels than the {layout.voxels} there are")
    return MeansOp(weights=weights), Layout(voxels=weights.parcels)


def _grid(layout: Layout, step: str) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    if layout.mask is None or layout.affine is None:
        raise SpaceError(
            f"{step}: needs volumes, these are {layout.voxels} values without a grid (grayordinates, parcels or components)"
        )
    return layout.mask, layout.affine
