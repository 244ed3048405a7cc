"""Normalisations by name, each an exact restatement of a published one, computed from the one raw store."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, UsageError
from fmristream.signal import kernels
from fmristream.signal.measure import background_value
from fmristream.signal.prepared import Prepared, RunSource


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


def prepare(normalization: Normalization, source: RunSource, *, exact: bool = False) -> Prepared:
    """The recipe made ready for a run.

    Args:
        normalization: the recipe.
        source: the run.
        exact: z-score with float32 moments also where float16 ones are stored.

    Raises:
        CorruptDataError: the run cannot be normalised.
    """
    if not normalization.needs_moments:
        return GlobalPrepared(normalization, source)
    is_half = source.moments.dtype == "<f2"  # nothing is finer than what is stored otherwise
    return VoxelwisePrepared(source, source.exact_moments if exact and is_half else source.moments)


class GlobalPrepared:
    """One scale for all of a run's values."""

    channels = 1
    is_framewise = True
    needs_frames = True
    kept = None

    def __init__(self, normalization: Normalization, source: RunSource) -> None:
        run = source.run
        self._source = source
        self._scale = global_scale(normalization, run)
        self._background, has_background = background_value(run.numpy_dtype, run.slope, run.inter)
        self._is_plain = normalization.kind == "none"
        self._has_background = has_background and not self._is_plain
        self.fill = np.array([self._scale.fill], dtype=np.float32)
        self.width = run.voxels

    @property
    def affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Slope, and intercept plus the scaled reference; where the background is replaced there is none."""
        if not (self._is_plain and _has_plain_residual(self._source)):
            return None
        offset = self._source.reference.astype(np.float64) * self._scale.scale + self._scale.offset
        return np.full(offset.shape, self._scale.scale, dtype=np.float32), offset.astype(np.float32)

    def __call__(self, stored: NDArray[Any], frames: range, out: NDArray[np.float32]) -> None:
        """Background values and what is not finite become the fill."""
        scale = self._scale
        if self._source.is_difference:
            with np.errstate(over="ignore"):
                stored += self._source.reference
        kernels.normalize_globally(
            stored, scale.scale, scale.offset, self._background, self._has_background, scale.fill, out[0]
        )


class VoxelwisePrepared:
    """A scale for each voxel."""

    channels = 1
    is_framewise = True
    needs_frames = True
    kept = None
    fill = np.zeros(1, dtype=np.float32)

    def __init__(self, source: RunSource, moments: NDArray[Any]) -> None:
        self._source = source
        self._delta, self._inverse = voxel_scale(moments, source.run)
        self.width = source.run.voxels

    @property
    def voxelwise(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """(delta, inverse), each (v,): output is (residual or float - delta) x inverse; None where residuals wrap."""
        is_plain = not (self._source.is_difference and self._source.run.residual_wraps)
        return (self._delta, self._inverse) if is_plain else None

    @property
    def affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """(scale, offset), each (v,), from residual to output, for integers whose residuals do not wrap."""
        if not self._source.is_difference or self.voxelwise is None:
            return None
        return self._inverse.astype(np.float32), (-self._delta * self._inverse).astype(np.float32)

    def __call__(self, stored: NDArray[Any], frames: range, out: NDArray[np.float32]) -> None:
        """The reference is not needed: moments are told relative to it."""
        kernels.normalize_voxelwise(_differences(self._source, stored), self._delta, self._inverse, out[0])


def voxel_scale(moments: NDArray[Any], run: Run) -> tuple[NDArray[Any], NDArray[Any]]:
    """(delta, 1 / SD) of each voxel in the precision that the source needs; 0 where a voxel never changes."""
    wide: Any = np.float32 if run.numpy_dtype.itemsize <= 2 or run.numpy_dtype == np.dtype("<f4") else np.float64
    delta, sd = moments.astype(wide)
    with np.errstate(divide="ignore"):
        inverse = np.where(sd > 0, 1 / sd, 0).astype(wide)
    sign = -1 if run.slope < 0 else 1
    return delta, inverse * wide(sign)


def _has_plain_residual(source: RunSource) -> bool:
    """Whether stored residuals, seen as signed, are the differences to the reference and fit 16 bits."""
    run = source.run
    return source.is_difference and not run.residual_wraps and run.numpy_dtype.itemsize <= 2


def _differences(source: RunSource, stored: NDArray[Any]) -> NDArray[Any]:
    """Stored values minus reference, as true differences; floats, which have no reference, as they are."""
    if not source.is_difference:
        return stored
    if not source.run.residual_wraps:
        # Residuals of unsigned sources wrap below zero; seen as signed they are the differences.
        signed: NDArray[Any] = stored.view(f"i{stored.dtype.itemsize}")
        return signed
    with np.errstate(over="ignore"):
        values = stored + source.reference
    difference: NDArray[Any] = values.astype(np.float64) - source.reference.astype(np.float64)
    return difference
