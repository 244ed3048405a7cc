"""What becomes of stored values: the seam between the recipes of normalisation and those who read frames."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.signal.parcellate import Weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """What the values of a frame are.

    Attributes:
        voxels: how many there are.
        mask: (x, y, z) bool, where they lie on a grid, in C order; None for lists (grayordinates, parcels, components).
        affine: (4, 4) voxel to mm of that grid; None for lists.
    """

    voxels: int
    mask: NDArray[np.bool_] | None = None
    affine: NDArray[np.float64] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every voxel of the grid is there; lists are."""
        return self.mask is None or bool(self.mask.all())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredParcels:
    """Parcels of an atlas that were given at conversion.

    Attributes:
        weights: on the run's voxels.
        series: (t, p) float64, scaled.
    """

    weights: Weights
    series: NDArray[np.float64]


class RunSource(Protocol):
    """What a normalisation of stored values may ask of a run."""

    @property
    def run(self) -> Run: ...

    @property
    def is_difference(self) -> bool:
        """Whether frames come as residuals against `reference`: for integers."""
        ...

    @property
    def reference(self) -> NDArray[Any]:
        """(v,) in the stored dtype."""
        ...

    @property
    def moments(self) -> NDArray[Any]:
        """(2, v): temporal mean minus reference (mean for floats), temporal SD; stored units."""
        ...

    @property
    def exact_moments(self) -> NDArray[Any]:
        """(2, v) float32: the same in full precision."""
        ...

    def read_stored(self, start: int, stop: int) -> NDArray[Any]:
        """Frames [start, stop) as the source stored them, (t, v), reference added, unscaled."""
        ...


class RecipeSource(RunSource, Protocol):
    """What a recipe of several steps may ask of a run beyond that."""

    @property
    def where(self) -> str:
        """Dataset and run, for errors."""
        ...

    @property
    def layout(self) -> Layout:
        """What the values of a stored frame are."""
        ...

    def confounds(self) -> Mapping[str, Any] | None:
        """(t,) columns, one row a frame; None where the run has none."""
        ...

    def parcels(self, atlas: str) -> StoredParcels:
        """Of the atlas whose digest begins so; "" for the only one."""
        ...


class Prepared(Protocol):
    """A recipe made ready for one run; any number of threads may call it."""

    @property
    def channels(self) -> int: ...

    @property
    def width(self) -> int:
        """Values of a frame that it gives: the run's voxels, unless it reduces them."""
        ...

    @property
    def fill(self) -> NDArray[np.float32]:
        """(c,) what stands outside the mask."""
        ...

    @property
    def is_framewise(self) -> bool:
        """Whether what becomes of a frame depends on that frame alone, so that frames may come one by one."""
        ...

    @property
    def needs_frames(self) -> bool:
        """Whether stored frames are looked at: not where parcels' series are stored; `stored` is then (t, 0)."""
        ...

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """(t,) of the run, False for frames that are scrubbed; None where none is."""
        ...

    @property
    def affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """(scale, offset), (v,) each, with output = signed residual x scale + offset; None where the recipe is not just that.

        Only for runs that are stored as residuals of 8 or 16 bits which do not wrap.
        """
        ...

    def __call__(self, stored: NDArray[Any], frames: range, out: NDArray[np.float32]) -> None:
        """Write what becomes of frames.

        Args:
            stored: (t, v) residuals where the run has a reference, else values; may be overwritten.
            frames: their numbers in the run.
            out: (c, t, width).
        """
        ...
