"""Which way voxel axes run, and how a grid is turned to run another way: whole axes only, nothing is interpolated."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import SpaceError, UsageError
from fmristream.signal.grid import Shape3, target_positions, voxel_sizes_mm

# World axes of NIfTI: x to the right, y to the front, z up.
_NAMES = (("L", "R"), ("P", "A"), ("I", "S"))
_WORLD = {
    letter: (world, sign) for world, pair in enumerate(_NAMES) for letter, sign in zip(pair, (-1, 1), strict=True)
}

Axes = tuple[tuple[int, int], ...]  # for each axis of a grid: the world axis it runs along, and its sign


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """How a grid is turned: axis i of the result is axis `order[i]` of the grid, backwards where `flipped[i]`."""

    order: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)

    def shape(self, shape: Shape3) -> Shape3:
        """Sizes of the turned grid."""
        x, y, z = (shape[axis] for axis in self.order)
        return x, y, z

    def matrix(self, affine: NDArray[np.float64]) -> NDArray[np.float64]:
        """(4, 4) columns of an affine in the order and direction of the turned axes; its origin stays behind."""
        turned = affine.copy()
        signs = np.where(self.flipped, -1.0, 1.0)
        turned[:3, :3] = affine[:3, list(self.order)] * signs
        return turned

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        """A volume (x, y, z), turned; a view."""
        return np.flip(np.transpose(volume, self.order), tuple(axis for axis, flip in enumerate(self.flipped) if flip))


def world_axes(affine: NDArray[np.float64]) -> Axes:
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


def tells_directions(affine: NDArray[np.float64]) -> bool:
    """Whether an affine spans a volume: one that does not says nothing of left and right."""
    return bool(np.isfinite(affine).all() and np.linalg.det(affine[:3, :3]) != 0)


def axes_of_codes(codes: str) -> Axes:
    """What `RAS` and its like say of each axis.

    Raises:
        UsageError: it is not one letter of each of L/R, P/A and I/S.
    """
    axes = tuple(_WORLD[letter] for letter in codes) if set(codes) <= set(_WORLD) else ()
    if sorted(world for world, _ in axes) != [0, 1, 2]:
        raise UsageError(
            f"orientation {codes!r}: expected where the three axes run to, one letter each of L or R, P or A, I or S; "
            "for instance 'RAS'"
        )
    return axes


def turn_to(codes: str, affine: NDArray[np.float64]) -> Turn:
    """The turn that makes a grid's axes run as `codes` say; an oblique grid counts as what it is closest to.

    Raises:
        UsageError: the codes make no sense.
        SpaceError: the affine tells no directions.
    """
    wanted = axes_of_codes(codes)
    if not tells_directions(affine):
        raise SpaceError(
            f"orientation {codes!r} was asked for, but the runs' affine has no volume, so nobody knows which way their "
            "voxels run; leave orientation out, or convert with headers that tell"
        )
    here = world_axes(affine)
    order = [next(axis for axis, (world, _) in enumerate(here) if world == target) for target, _ in wanted]
    flipped = [here[axis][1] != sign for axis, (_, sign) in zip(order, wanted, strict=True)]
    return Turn(order=(order[0], order[1], order[2]), flipped=(flipped[0], flipped[1], flipped[2]))


def placed_positions(mask: NDArray[np.bool_], target: Shape3, turn: Turn) -> NDArray[np.int64]:
    """Where each stored voxel lies in a C-ordered target grid, turned first, then padded or cut; -1 where it is cut off.

    Shape: (v,). Turning, padding and scattering are this one map: no volume is made on the way.
    """
    numbers = np.full(mask.shape, -1, dtype=np.int64)
    numbers[mask] = np.arange(int(mask.sum()))
    turned = turn.of(numbers)
    positions = np.empty(int(mask.sum()), dtype=np.int64)
    positions[turned[turned >= 0]] = target_positions(turned >= 0, target)
    return positions
