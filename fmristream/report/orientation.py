"""What an affine says about directions: which way each voxel axis runs, how large voxels are."""

import numpy as np
from numpy.typing import NDArray

from fmristream.signal.grid import voxel_sizes_mm

__all__ = ["axis_codes", "to_world_order", "voxel_sizes_mm", "world_axes"]

# World axes of NIfTI: x to the right, y to the front, z up.
_NAMES = (("L", "R"), ("P", "A"), ("I", "S"))


def world_axes(affine: NDArray[np.float64]) -> tuple[tuple[int, int], ...]:
    """For each voxel axis: the world axis that it runs along most closely, and its sign.

    Each world axis is taken once, the clearest pair first; an affine without volume still gets an answer.
    """
    sizes = np.array(voxel_sizes_mm(affine))
    cosines = np.abs(affine[:3, :3] / np.where(sizes > 0, sizes, 1))
    found: dict[int, tuple[int, int]] = {}
    for _ in range(3):
        world, voxel = (int(place) for place in np.unravel_index(int(np.argmax(cosines)), cosines.shape))
        found[voxel] = (world, -1 if affine[world, voxel] < 0 else 1)
        cosines[world, :] = -1
        cosines[:, voxel] = -1
    return tuple(found[axis] for axis in range(3))


def axis_codes(affine: NDArray[np.float64]) -> str:
    """Where each voxel axis runs to, such as `RAS` or `LPS`."""
    return "".join(_NAMES[world][(sign + 1) // 2] for world, sign in world_axes(affine))


def to_world_order(volume: NDArray[np.float32], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """The volume with its axes turned and flipped so that they run right, front and up; nothing is interpolated."""
    axes = world_axes(affine)
    order = sorted(range(3), key=lambda voxel: axes[voxel][0])
    turned = np.transpose(volume, order)
    flips = tuple(axis for axis, voxel in enumerate(order) if axes[voxel][1] < 0)
    return np.asarray(np.flip(turned, flips), dtype=volume.dtype)
