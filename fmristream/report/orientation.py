"""What an affine says about directions: which way each voxel axis runs, how large voxels are."""

import numpy as np
from numpy.typing import NDArray

from fmristream.signal.grid import voxel_sizes_mm
from fmristream.signal.orientation import axis_codes, world_axes

__all__ = ["axis_codes", "to_world_order", "voxel_sizes_mm", "world_axes"]


def to_world_order(volume: NDArray[np.float32], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """The volume with its axes turned and flipped so that they run right, front and up; nothing is interpolated."""
    axes = world_axes(affine)
    order = sorted(range(3), key=lambda voxel: axes[voxel][0])
    turned = np.transpose(volume, order)
    flips = tuple(axis for axis, voxel in enumerate(order) if axes[voxel][1] < 0)
    return np.asarray(np.flip(turned, flips), dtype=volume.dtype)
