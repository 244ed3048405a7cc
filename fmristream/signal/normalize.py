"""Normalisations by name, each an exact restatement of a published one, computed from the one raw store."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, UsageError
from fmristream.signal import kernels
from fmristream.signal.measure import background_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalization:
    """A recipe: what is subtracted, what it is divided by, and what stands where there is no brain.

    Attributes:
        kind: `none` (scaled signal), `voxel-z` (per voxel over the run), `global-z` (over all foreground of the run),
            `global-minmax` (foreground to [0, 1]).
        background: `zero`, or `min`: the smallest normalised foreground value of the run.
    """

    kind: str
    background: str = "zero"

    @property
    def needs_moments(self) -> bool:
        """Whether it reads per-voxel statistics of the run."""
        return self.kind == "voxel-z"


# SwiFT's preprocessing (Kim et al. 2023) has the four global ones: z-norm or min-max over values that are not exactly
# 0, background at their minimum (its default) or at zero.
RECIPES = {
    "none": Normalization(kind="none"),
    "voxel-zscore": Normalization(kind="voxel-z"),
    "global-zscore": Normalization(kind="global-z", background="min"),
    "global-zscore-zeroback": Normalization(kind="global-z"),
    "global-minmax": Normalization(kind="global-minmax", background="min"),
    "global-minmax-zeroback": Normalization(kind="global-minmax"),
}


def recipe(name: str) -> Normalization:
    """The normalisation of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in RECIPES:
        raise UsageError(f"normalize={name!r}: no such normalisation; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalScale:
    """normalised = stored x scale + offset; `fill` for the background."""

    scale: float
    offset: float
    fill: float


def global_scale(normalization: Normalization, run: Run) -> GlobalScale:
    """The numbers that put a run's stored values on the recipe's scale.

    Raises:
        CorruptDataError: the run's foreground has no spread, so nothing can be normalised by it.
    """
    if normalization.kind == "none":
        return GlobalScale(scale=run.slope, offset=run.inter, fill=0.0)
    low, high = run.foreground_min, run.foreground_max
    center, spread = (run.foreground_mean, run.foreground_sd) if normalization.kind == "global-z" else (low, high - low)
    if not (np.isfinite(spread) and spread > 0):
        raise CorruptDataError(
            f"run {run.name}: its foreground has no spread (mean {run.foreground_mean}, SD {run.foreground_sd}), it cannot "
            "be normalised; leave the run out or use normalize='none'"
        )
    fill = (low - center) / spread if normalization.background == "min" else 0.0
    return GlobalScale(scale=run.slope / spread, offset=(run.inter - center) / spread, fill=fill)


def fill_of(normalization: Normalization, run: Run) -> float:
    """What stands outside the mask."""
    return 0.0 if normalization.needs_moments else global_scale(normalization, run).fill


def normalize_globally(
    normalization: Normalization, run: Run, values: NDArray[Any], packed: NDArray[np.float32]
) -> None:
    """Write normalised (t, v) from stored (t, v) values; background values and what is not finite become the fill."""
    numbers = global_scale(normalization, run)
    background, has_background = background_value(run.numpy_dtype, run.slope, run.inter)
    has_background = has_background and normalization.kind != "none"
    kernels.normalize_globally(values, numbers.scale, numbers.offset, background, has_background, numbers.fill, packed)


def voxel_scale(moments: NDArray[Any], run: Run) -> tuple[NDArray[Any], NDArray[Any]]:
    """(delta, 1 / SD) of each voxel in the precision that the source needs; 0 where a voxel never changes."""
    wide: Any = np.float32 if run.numpy_dtype.itemsize <= 2 or run.numpy_dtype == np.dtype("<f4") else np.float64
    delta, sd = moments.astype(wide)
    with np.errstate(divide="ignore"):
        inverse = np.where(sd > 0, 1 / sd, 0).astype(wide)
    sign = -1 if run.slope < 0 else 1
    return delta, inverse * wide(sign)


def normalize_voxelwise(
    differences: NDArray[Any], delta: NDArray[Any], inverse: NDArray[Any], packed: NDArray[np.float32]
) -> None:
    """Write z-scores (t, v) of stored values minus reference (of stored values where there is no reference)."""
    kernels.normalize_voxelwise(differences, delta, inverse, packed)
