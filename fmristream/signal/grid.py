"""Grids and masks: when two runs share a grid, which voxels are stored and in which order, how a grid is padded or cut."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Two affines are one grid when no corner voxel moves by more than this.
SAME_GRID_MM = 1e-3

# A computed mask smaller than this is not believed: nilearn finds no voxel at all in several small real runs.
MIN_MASK_FRACTION = 0.01
MIN_MASK_VOXELS = 100

Shape3 = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Voxels in the order of the file: native axes, no reorientation."""

    shape: Shape3
    affine: tuple[float, ...]  # 4x4, row by row, voxel to mm

    def matrix(self) -> NDArray[np.float64]:
        """The affine as (4, 4)."""
        return np.array(self.affine, dtype=np.float64).reshape(4, 4)


def corner_shift_mm(one: Grid, other: Grid) -> float:
    """How far the corner voxel that moves most lies apart in the two grids, in mm; infinite if the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    corners = np.array([[*corner, 1.0] for corner in product(*((0, n - 1) for n in one.shape))])
    moved = corners @ (one.matrix() - other.matrix()).T
    return float(np.sqrt((moved[:, :3] ** 2).sum(axis=1)).max())


def same_grid(one: Grid, other: Grid) -> bool:
    """Equal shape, and affines that put every corner voxel in the same place."""
    return corner_shift_mm(one, other) <= SAME_GRID_MM


def is_believable(mask: NDArray[np.bool_]) -> bool:
    """Whether a computed mask holds enough voxels to be used."""
    inside = int(mask.sum())
    return inside >= MIN_MASK_VOXELS and inside >= MIN_MASK_FRACTION * mask.size


def voxel_sizes_mm(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Edge lengths of a voxel under a (4, 4) affine."""
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def volume_of(values: NDArray[Any], shape: Shape3) -> NDArray[Any]:
    """(v,) values of a whole grid, C order of (x, y, z), seen as a (z, y, x) volume, which is a NIfTI file's order; no copy."""
    return values.reshape(shape).transpose(2, 1, 0)


def in_byte_order(frame: NDArray[Any], *, big_endian: bool) -> NDArray[Any]:
    """A contiguous little-endian frame with its bytes in the order of a file; bits of NaN are moved, never computed with."""
    if not big_endian or frame.dtype.itemsize == 1:
        return frame
    return frame.view(f"<u{frame.dtype.itemsize}").byteswap()


def stored_order(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions of the mask's voxels in a C-ordered (x, y, z) grid, z fastest: the order of the last axis on disk."""
    return np.flatnonzero(np.ascontiguousarray(mask).reshape(-1))


def fortran_positions(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """The same voxels in the same order, as positions in a NIfTI volume, where x is fastest."""
    x, y, z = np.nonzero(mask)
    positions: NDArray[Any] = x + mask.shape[0] * (y + mask.shape[1] * z)
    return positions.astype(np.uint64)


def masked_columns(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(c, 4), the mask as pieces of its columns along z: place in a plane, first z, number among the stored voxels, length.

    Along z what is stored lies side by side and what is read lies a plane apart; columns that are neighbours along x
    come one after the other, so that the cache lines which the first of them brought serve those that follow.
    """
    size_x, size_y, size_z = mask.shape
    # Each column with a 0 behind it, all of them one after the other: pieces begin and end where the value changes.
    columns = np.zeros((size_x, size_y, size_z + 1), dtype=bool)
    columns[..., :-1] = mask
    flat = columns.reshape(-1)
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    starts, length = changes[::2], np.diff(changes)[::2]
    row, z = np.divmod(starts, size_z + 1)
    x, y = np.divmod(row, size_y)
    along = np.argsort(y, kind="stable")
    pieces = np.stack([x + size_x * y, z, np.cumsum(length) - length, length], axis=1)[along]
    return pieces.astype(np.uint64)  # signed indices are slower


def pad_before(size: int, target: int) -> int:
    """Voxels put before an axis to centre it in `target`; negative: voxels cut off.

    The larger half comes first, which reproduces the literal paddings that SwiFT's loader has for HCP (75, 93, 81) and
    UK Biobank (91, 109, 91) at 96 voxels; its ABCD axis of 97 is cut on the other side there.
    """
    difference = target - size
    half = (abs(difference) + 1) // 2
    return half if difference > 0 else -half


def target_positions(mask: NDArray[np.bool_], target: Shape3) -> NDArray[np.int64]:
    """Where each stored voxel lies in a C-ordered target grid; -1 where the target cuts it off.

    Shape: (v,). The target is the native grid, centred, padded or cut axis by axis.
    """
    before = [pad_before(size, wanted) for size, wanted in zip(mask.shape, target, strict=True)]
    coordinates = [axis + shift for axis, shift in zip(np.nonzero(mask), before, strict=True)]
    inside = np.ones(len(coordinates[0]), dtype=bool)
    for axis, wanted in zip(coordinates, target, strict=True):
        inside &= (axis >= 0) & (axis < wanted)
    x, y, z = coordinates
    positions: NDArray[Any] = (x * target[1] + y) * target[2] + z
    return np.where(inside, positions, -1).astype(np.int64)


def stretches_of(positions: NDArray[np.int64]) -> NDArray[np.uint32]:
    """(n, 3) first voxel, place, length: voxels that follow each other in a frame and in the grid; places rise.

    Args:
        positions: (v,) where each voxel lies in the grid; negative: cut off.
    """
    inside = np.flatnonzero(positions >= 0)
    voxels = inside[np.argsort(positions[inside], kind="stable")]
    places = positions[voxels]
    starts = np.flatnonzero(np.diff(voxels, prepend=-2) != 1) if len(voxels) else np.zeros(0, dtype=np.int64)
    starts = np.union1d(starts, np.flatnonzero(np.diff(places, prepend=-2) != 1)).astype(np.int64)
    lengths = np.diff(starts, append=len(voxels))
    return np.ascontiguousarray(np.stack([voxels[starts], places[starts], lengths], axis=1).astype(np.uint32))
