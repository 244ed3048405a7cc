"""Which slices of a volume are shown: three orientations where the grid is a head, slices side by side where it is flat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmristream.report.orientation import to_world_order, voxel_sizes_mm, world_axes

MAX_MOSAIC = 4
MARGIN_SHARE = 0.04

# Below these a second orientation shows lines, not anatomy.
MIN_VOXELS = 6
MIN_EXTENT_SHARE = 0.25

# Ends of the world axes, low and high.
_ENDS = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A plane of a volume whose axes run right, front and up: `axis` is across it, the others in order along it."""

    axis: int
    index: int
    width_mm: float
    height_mm: float

    @property
    def across(self) -> tuple[int, int]:
        """World axes along the picture's width and height."""
        first, second = (axis for axis in range(3) if axis != self.axis)
        return first, second

    @property
    def sides(self) -> tuple[str, str]:
        """What lies on the left and right edge of the picture: neurological, left is left."""
        return _ENDS[self.across[0]]

    def of(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        """The pixels, rows from the bottom up."""
        return np.asarray(np.take(volume, self.index, axis=self.axis).T)


def cropped(volumes: Sequence[NDArray[np.float32]], affine: NDArray[np.float64]) -> list[NDArray[np.float32]]:
    """Volumes in world order, cut to the box around what the first one shows, with a margin."""
    turned = [to_world_order(volume, affine) for volume in volumes]
    shown = np.isfinite(turned[0])
    box = []
    for axis, count in enumerate(shown.shape):
        filled = np.flatnonzero(shown.any(axis=tuple(other for other in range(3) if other != axis)))
        first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, count - 1)
        margin = max(1, round(MARGIN_SHARE * (last - first + 1)))
        box.append(slice(max(0, first - margin), min(count, last + 1 + margin)))
    return [volume[tuple(box)] for volume in turned]


def choose_slices(volume: NDArray[np.float32], affine: NDArray[np.float64]) -> list[Slice]:
    """Slices of a volume in world order, through its middle; NaN is background."""
    sizes_mm = voxel_sizes_mm(affine)
    by_world = {world: sizes_mm[voxel] or 1.0 for voxel, (world, _) in enumerate(world_axes(affine))}
    extent = [count * by_world[world] for world, count in enumerate(volume.shape)]

    def cut(axis: int, index: int) -> Slice:
        width, height = (extent[other] for other in range(3) if other != axis)
        return Slice(axis=axis, index=index, width_mm=width, height_mm=height)

    shown = np.isfinite(volume)
    if min(volume.shape) >= MIN_VOXELS and min(extent) >= MIN_EXTENT_SHARE * max(extent):
        return [cut(axis, _middle(shown, axis)) for axis in range(3)]
    thin = int(np.argmin(extent))
    filled = np.flatnonzero(shown.any(axis=tuple(axis for axis in range(3) if axis != thin)))
    filled = filled if len(filled) else np.arange(volume.shape[thin])
    count = min(MAX_MOSAIC, len(filled))
    # The middle of equal parts: neither the first nor the last slice, where there are more than fit.
    places = ((np.arange(count) + 0.5) * len(filled) / count).astype(int)
    return [cut(thin, int(filled[place])) for place in places]


def _middle(shown: NDArray[np.bool_], axis: int) -> int:
    counts = shown.sum(axis=tuple(other for other in range(3) if other != axis))
    if not counts.any():
        return int(shown.shape[axis]) // 2
    return round(float(np.average(np.arange(len(counts)), weights=counts)))
