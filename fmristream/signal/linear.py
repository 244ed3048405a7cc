"""Whole-run linear operations: one pass over the frames gives the coefficients, and every frame is done by itself.

y[t, v] = (x[t, v] - center[v]) x gain[v] + sum over k of rows[t, k] x coefficients[k, v]: regression of any number of columns
is of low rank, so a run needs (k + 4) numbers a voxel, not its frames.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.signal import recipe_kernels
from fmristream.signal.temporal import TemporalModel

# (numbers of frames in the run, (t, v) float64 of them): what statistics are taken of, in rising order.
Blocks = Iterable[tuple[NDArray[np.int64], NDArray[np.float64]]]

# What regression leaves of a course that lies in what is taken out: rounding, which must not become a z of 1.
_ROUNDING = 1e-13
# Of a run's coefficients: a band of 1,200 frames at 2 mm is 150 MB.
MAX_COEFFICIENT_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearOp:
    """The operation, ready for any frames of its run."""

    center: NDArray[np.float64]
    gain: NDArray[np.float64]
    rows: NDArray[np.float64]  # (all frames, k)
    coefficients: NDArray[np.float32]  # (k, v)

    def __call__(self, values: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """In place on (t, v)."""
        rows = np.ascontiguousarray(self.rows[numbers])
        recipe_kernels.apply_linear(values, self.center, self.gain, rows, self.coefficients)
        return values

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """Outside the mask nothing changes over time."""
        return np.zeros_like(fill)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sums:
    """Per-voxel sums over used frames.

    Attributes:
        count: (v,) finite values.
        mean: (v,) of them; 0 where there is none.
        centred: (v,) sum of squares around the mean.
        total: (v,) sum of squares around the first value: what rounding is relative to.
        products: (k, v) basis' (x - mean); what is missing counts as the mean.
    """

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    centred: NDArray[np.float64]
    total: NDArray[np.float64]
    products: NDArray[np.float64]


def take_sums(blocks: Blocks, basis: NDArray[np.float64], *, has_missing: bool, what: str) -> Sums:
    """One pass: sums are added frame by frame, so that blocks of any size give the same bits."""
    state = None
    for numbers, values in blocks:
        values = np.ascontiguousarray(values)
        if state is None:
            state = _State(values[0], basis.shape[1], has_missing=has_missing, what=what)
        state.add(values, np.ascontiguousarray(basis[numbers]))
    if state is None:
        raise UsageError(f"{what}: no frame is left to take statistics of; skip or scrub fewer, or give more context")
    return state.finish()


class _State:
    """Sums under way."""

    def __init__(self, first: NDArray[np.float64], columns: int, *, has_missing: bool, what: str) -> None:
        voxels = len(first)
        if columns * voxels * 8 > MAX_COEFFICIENT_BYTES:
            raise UsageError(
                f"{what}: {columns} coefficients for each of {voxels} voxels are {columns * voxels * 8 / 1e6:.0f} MB, at most "
                f"{MAX_COEFFICIENT_BYTES / 1e6:.0f} MB are held; narrow the band, or reduce first (parcels | ..., pool:2 | ...)"
            )
        self._shift = np.where(np.isfinite(first), first, 0.0)
        self._count = np.zeros(voxels, dtype=np.int64)
        self._sums, self._squares = np.zeros(voxels), np.zeros(voxels)
        self._products = np.zeros((columns, voxels))
        self._known = np.zeros((columns, voxels) if has_missing else (0, 0))
        self._rows = np.zeros(columns)
        self._has_missing = has_missing

    def add(self, values: NDArray[np.float64], rows: NDArray[np.float64]) -> None:
        for row in rows:
            self._rows += row
        recipe_kernels.accumulate(
            values, rows, self._shift, self._count, self._sums, self._squares, self._products, self._known, self._has_missing
        )  # fmt: skip

    def finish(self) -> Sums:
        count = np.maximum(self._count, 1)
        mean = self._sums / count
        # sum of rows x (value - mean) over finite values; without missing ones rows sum to about 0
        known = self._known if self._has_missing else self._rows[:, None]
        products = self._products - mean * known
        return Sums(
            count=self._count,
            mean=mean + self._shift,
            centred=np.maximum(self._squares - self._sums * mean, 0.0),
            total=self._squares,
            products=products,
        )


def fit_linear(
    blocks: Blocks, model: TemporalModel, scaling: str, *, has_missing: bool, what: str
) -> LinearOp:  # fmt: skip
    """Coefficients of an operation along time and the scaling behind it.

    Args:
        blocks: the used frames.
        model: what is taken out.
        scaling: `none`, `center`, `zscore` (population SD), `zscore-sample` (unbiased SD) or `percent` of the mean before.
        has_missing: whether values may be NaN; such count as the voxel's mean where something is fitted.
        what: dataset and run, for errors.

    Raises:
        UsageError: there are too few frames for so many coefficients.
    """
    frames, columns = int(model.used.sum()), model.basis.shape[1]
    if (scaling.startswith("zscore") and frames < 2) or (columns and frames < columns + 2 and model.kept is None):
        raise UsageError(
            f"{what}: {frames} frames may be used to fit {columns} columns and a scale, which takes {columns + 2} or more; take "
            "out fewer, or give more context"
        )
    sums = take_sums(blocks, model.basis, has_missing=has_missing, what=what)
    gain = _gain(scaling, sums, _left(model, sums), frames)
    if model.kept is not None:
        rows, x_gain, sign = model.kept, np.zeros_like(gain), 1.0
    else:
        rows, x_gain, sign = model.subtracted, gain, -1.0
    keeps_mean = scaling == "none" and not model.removes_mean
    return LinearOp(
        center=np.zeros_like(gain) if keeps_mean else sums.mean,
        gain=x_gain,
        rows=rows,
        coefficients=np.asarray(sign * sums.products * gain, dtype=np.float32),
    )


def _left(model: TemporalModel, sums: Sums) -> NDArray[np.float64]:
    """(v,) sum of squares of what is left over used frames, around its mean; rounding is 0."""
    power = (sums.products**2).sum(axis=0)
    if model.kept is not None:
        left = power
    elif model.is_closed:
        mixing = model.fitted[model.used].T @ model.subtracted[model.used]
        taken = mixing @ sums.products
        left = sums.centred - 2 * (sums.products * taken).sum(axis=0) + (taken**2).sum(axis=0)
    else:
        left = sums.centred - power
    return np.where(left > _ROUNDING * sums.total, left, 0.0)


def _gain(scaling: str, sums: Sums, left: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    if scaling in ("none", "center"):
        return np.ones_like(left)
    if scaling == "percent":
        size = np.abs(sums.mean)
        # nilearn's rule: what has no mean has no percent
        return np.divide(100.0, size, out=np.zeros_like(size), where=size > np.finfo(np.float64).eps)
    count = np.maximum(sums.count - (scaling == "zscore-sample"), 1)
    sd = np.sqrt(left / count)
    return np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
