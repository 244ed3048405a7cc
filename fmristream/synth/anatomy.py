"""A head in template space: where brain, grey matter, white matter, fluid and functional networks are.

Positions are relative to the grid: x runs from -1 (left) to 1 (right), y from back to front, z from below to above,
so that the brain fills a grid of any shape. Arrays are (z, y, x), which is Fortran order seen from NIfTI's (x, y, z).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fmristream.synth.draws import FloatArray

Point = tuple[float, float, float]


class Coordinates(NamedTuple):
    """Relative position of every voxel."""

    x: FloatArray
    y: FloatArray
    z: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Tissue:
    """Share of each tissue in every voxel, 0 to 1; what is left is bone and air."""

    grey: FloatArray
    white: FloatArray
    fluid: FloatArray
    scalp: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One region of a network; its mirror image on the other side belongs to it, too."""

    centre: Point
    radius: float


# Lobes as (centre, radii): cerebrum, cerebellum, brain stem, temporal lobes (mirrored).
LOBES: tuple[tuple[Point, Point], ...] = (
    ((0.0, 0.02, 0.08), (0.78, 0.88, 0.74)),
    ((0.0, -0.50, -0.50), (0.52, 0.36, 0.34)),
    ((0.0, -0.24, -0.62), (0.16, 0.18, 0.30)),
    ((0.46, 0.14, -0.40), (0.28, 0.46, 0.32)),
)
VENTRICLES: tuple[tuple[Point, Point], ...] = (
    ((0.11, 0.02, 0.14), (0.075, 0.34, 0.13)),
    ((0.0, -0.30, -0.36), (0.08, 0.10, 0.12)),
)
NUCLEI: tuple[tuple[Point, Point], ...] = (
    ((0.13, -0.14, 0.02), (0.11, 0.15, 0.11)),
    ((0.30, 0.08, 0.02), (0.09, 0.24, 0.14)),
)
# Air above the nose and beside the ears takes signal away.
DROPOUTS: tuple[tuple[Point, float, float], ...] = (((0.0, 0.62, -0.42), 0.22, 0.55), ((0.56, 0.02, -0.58), 0.20, 0.40))
# Two pairs that carry effects (0 and 1: sex, 2 and 3: age) and two bystanders, placed like the networks whose names
# they have. Sex has the larger share of the brain: with radii of .4 and no plateau (below), a small transformer over
# patches of 6 voxels had learned nothing of the strongest coupling after 800 steps; with these it had after 400.
NETWORKS: dict[str, tuple[Blob, ...]] = {
    "default": (
        Blob(centre=(0.0, -0.48, 0.36), radius=0.52),
        Blob(centre=(0.0, 0.62, 0.22), radius=0.50),
        Blob(centre=(0.52, -0.46, 0.22), radius=0.42),
    ),
    "somatomotor": (
        Blob(centre=(0.0, 0.02, 0.60), radius=0.50),
        Blob(centre=(0.50, 0.04, 0.36), radius=0.52),
    ),
    "visual": (
        Blob(centre=(0.0, -0.70, -0.04), radius=0.46),
        Blob(centre=(0.38, -0.58, -0.12), radius=0.40),
    ),
    "salience": (
        Blob(centre=(0.44, 0.48, 0.14), radius=0.38),
        Blob(centre=(0.52, 0.16, -0.14), radius=0.38),
        Blob(centre=(0.0, 0.32, 0.36), radius=0.26),
    ),
    "cerebellar": (Blob(centre=(0.28, -0.52, -0.56), radius=0.36),),
    "limbic": (Blob(centre=(0.42, 0.06, -0.52), radius=0.34), Blob(centre=(0.16, 0.30, -0.20), radius=0.28)),
}
# A network is at full strength in most of its extent and falls off at its border.
PLATEAU = 4.0
CORTEX_DEPTH = 0.15
FOLD_DEPTH = 0.10
SULCUS_DEPTH = 0.05
SKULL_DEPTH = 0.10
SCALP_DEPTH = 0.18


def grid_coordinates(shape: tuple[int, int, int]) -> Coordinates:
    """Relative positions of a grid whose shape is given as (x, y, z)."""
    along = [(np.arange(n, dtype=np.float64) - (n - 1) / 2) / (n / 2) for n in reversed(shape)]
    z, y, x = np.meshgrid(*along, indexing="ij")
    return Coordinates(x, y, z)


def edge_softness(shape: tuple[int, int, int]) -> float:
    """How gradually tissue changes: half a voxel, but never sharper than partial volume at 2 mm."""
    return max(0.02, 1.0 / max(shape))


def brain_mask(shape: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    """The template's brain; all of a grid too coarse to hold any of it."""
    inside = depth_below_surface(grid_coordinates(shape)) > 0
    return inside if inside.any() else np.ones_like(inside)


def depth_below_surface(at: Coordinates) -> FloatArray:
    """Distance to the brain's surface, about; negative outside."""
    depths = [(1 - _ellipsoid(at, centre, radii)) * min(radii) for centre, radii in LOBES]
    return _largest(depths)


def tissue(at: Coordinates, *, softness: float) -> Tissue:
    """What every voxel is made of."""
    depth = depth_below_surface(at)
    folds = _folds(at)
    brain = _rise(depth + softness, softness)
    rim = _rise(0.01 + SULCUS_DEPTH * folds - depth, softness)
    fissure = _rise(0.03 - np.abs(at.x), softness) * _rise(at.z - 0.15, softness) * _rise(0.35 - depth, softness)
    ventricles = _union(at, VENTRICLES, softness)
    fluid = _largest([rim, 0.8 * fissure, ventricles])
    cortex = _rise(CORTEX_DEPTH + FOLD_DEPTH * folds - depth, softness)
    grey = np.maximum(cortex, _union(at, NUCLEI, softness)) * (1 - fluid)
    scalp = _rise(-depth - SKULL_DEPTH, softness) * _rise(SCALP_DEPTH + depth, softness)
    return Tissue(grey=grey * brain, white=(1 - fluid - grey) * brain, fluid=fluid * brain, scalp=scalp)


def signal_left(at: Coordinates) -> FloatArray:
    """Share of the signal that magnetic susceptibility leaves."""
    left = np.ones_like(at.x)
    for centre, width, loss in DROPOUTS:
        left *= 1 - loss * np.exp(-((_distance(at, centre) / width) ** 2))
    return left


def network_maps(at: Coordinates) -> FloatArray:
    """(network, z, y, x): smooth, 0 to 1, no voxel in two networks.

    Overlap would let the coupling of two networks show in the variance of the voxels that they share.
    """
    reach = np.stack([_largest([_bump(at, blob) for blob in blobs]) for blobs in NETWORKS.values()])
    maps = np.empty_like(reach)
    for number in range(len(reach)):
        rivals = np.delete(reach, number, axis=0).max(axis=0)
        maps[number] = np.maximum(reach[number] - rivals, 0)
    return np.minimum(PLATEAU * maps, 1.0)


def _folds(at: Coordinates) -> FloatArray:
    """Where gyri (-1) and sulci (1) are; both hemispheres alike."""
    side = np.abs(at.x)
    waves = (
        np.sin(19 * side + 3 * np.sin(5 * at.y))
        + np.sin(17 * at.y + 3 * np.sin(6 * at.z))
        + np.sin(18 * at.z + 3 * np.sin(4 * side))
    )
    return np.asarray(np.clip(waves / 2, -1, 1))


def _bump(at: Coordinates, blob: Blob) -> FloatArray:
    """1 at the centre, 0 from the radius on, with no step in value or slope."""
    ratio = np.minimum(_distance(at, blob.centre) / blob.radius, 1.0)
    return np.asarray((1 - ratio**2) ** 2)


def _union(at: Coordinates, parts: tuple[tuple[Point, Point], ...], softness: float) -> FloatArray:
    inside = [_rise((1 - _ellipsoid(at, centre, radii)) * min(radii), softness) for centre, radii in parts]
    return _largest(inside)


def _largest(parts: list[FloatArray]) -> FloatArray:
    return np.asarray(np.maximum.reduce(parts))


def _ellipsoid(at: Coordinates, centre: Point, radii: Point) -> FloatArray:
    """1 on the surface of an ellipsoid and of its mirror image, less inside."""
    x, y, z = np.abs(at.x) - centre[0], at.y - centre[1], at.z - centre[2]
    return np.asarray(np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2))


def _distance(at: Coordinates, centre: Point) -> FloatArray:
    return _ellipsoid(at, centre, (1.0, 1.0, 1.0))


def _rise(value: FloatArray, softness: float) -> FloatArray:
    """From 0 (well below zero) to 1 (well above)."""
    return np.asarray(0.5 + 0.5 * np.tanh(value / softness))
