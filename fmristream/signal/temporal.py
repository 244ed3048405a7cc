"""What is taken out of every voxel's course: trend, slow waves, everything outside a band, confounds. Small matrices only.

All of it is one projection: what an earlier step took out of the signal is taken out of later steps' confounds too, so that
no step brings back what another removed (Lindquist et al. 2019), and the order of steps does not matter. Columns are made
for every frame of the run, and are orthonormal over the frames that statistics may use; so what is fitted to those carries
over to the others.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError

Columns = NDArray[np.float64]  # (t, k), one row for each frame of the run

# Columns that keep less than this of their length beside the others are combinations of them.
_RANK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TemporalModel:
    """A linear operation along time: y = x - subtracted (fitted' x), or where `kept` is given y = kept (kept' x).

    Attributes:
        used: (t,) bool, frames that coefficients are fitted to.
        fitted: (t, k), orthonormal over used frames, and orthogonal to a constant there.
        subtracted: (t, k), what of each coefficient is taken out: `fitted` itself but for non-aggressive regression.
        removes_mean: whether the mean over used frames goes as well.
        kept: (t, k), a basis of what is let through, orthonormal over all frames; None where everything else is.
        is_closed: nothing more can be added: the operation is no projection any longer.
    """

    used: NDArray[np.bool_]
    fitted: Columns
    subtracted: Columns
    removes_mean: bool = False
    kept: Columns | None = None
    is_closed: bool = False

    @classmethod
    def identity(cls, used: NDArray[np.bool_]) -> "TemporalModel":
        """Takes nothing out."""
        none = np.zeros((len(used), 0))
        return cls(used=used, fitted=none, subtracted=none)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is taken out."""
        return self.fitted.shape[1] == 0 and self.kept is None and not self.removes_mean

    @property
    def basis(self) -> Columns:
        """(t, k) whose products with the signal are needed."""
        return self.fitted if self.kept is None else self.kept


def add_trend(model: TemporalModel) -> TemporalModel:
    """Takes out mean and linear trend, as `scipy.signal.detrend`."""
    ramp = np.linspace(-1, 1, len(model.used))[:, None]
    return replace(add_columns(model, ramp), removes_mean=True)


def add_highpass(model: TemporalModel, *, hz: float, tr_s: float) -> TemporalModel:
    """Takes out discrete cosines of up to `hz`, as fMRIPrep's `cosine` columns and nilearn's filter of that name.

    The mean stays.
    """
    frames = len(model.used)
    order = min(frames - 1, int(np.floor(2 * frames * hz * tr_s)))
    return add_columns(model, _cosines(frames, np.arange(1, order + 1)))


def add_bandpass(model: TemporalModel, *, low_hz: float, high_hz: float, tr_s: float) -> TemporalModel:
    """Lets only discrete cosines (DCT-II) between the two frequencies through; exact, the mean goes.

    Raises:
        UsageError: the band is empty, or coefficients may be fitted to some frames only.
    """
    frames = len(model.used)
    if not model.used.all():
        raise UsageError(
            f"bandpass:{low_hz:g}-{high_hz:g}: needs every frame of the run, but only {int(model.used.sum())} of {frames} may be "
            "used (scrub, skip, or stats='prefix' or 'context'); use highpass, which fits its cosines to any frames"
        )
    hz = np.arange(frames) / (2 * frames * tr_s)
    inside = np.flatnonzero((hz >= low_hz) & (hz <= high_hz) & (hz > 0))
    if not len(inside):
        raise UsageError(f"bandpass:{low_hz:g}-{high_hz:g}: no frequency of {frames} frames of {tr_s:g} s lies in it")
    passing = _cosines(frames, inside) * np.sqrt(2 / frames)
    if model.kept is not None:
        passing = _intersection(passing, model.kept)
    return replace(model, kept=_without(passing, model.fitted), removes_mean=True)


def add_columns(model: TemporalModel, columns: Columns, *, beside: Columns | None = None) -> TemporalModel:
    """Takes out columns.

    Args:
        model: what was taken out before.
        columns: (t, k) any scale; their mean is none of their business.
        beside: (t, s) columns that are fitted along and stay: non-aggressive regression.
    """
    everything = columns if beside is None else np.hstack([columns, beside])
    rest = _beside(model, everything)
    if model.kept is not None:
        if beside is not None:
            raise UsageError("confounds: non-aggressive regression after bandpass is not defined; put it before")
        rest = model.kept @ (model.kept.T @ rest)
        return replace(model, kept=_without(model.kept, _orthonormal(rest, model.used, everything)))
    basis = _orthonormal(rest, model.used, everything)
    taken = basis
    if beside is not None:
        weights = np.linalg.pinv(rest[model.used]) @ basis[model.used]
        taken = rest[:, : columns.shape[1]] @ weights[: columns.shape[1]]
    return replace(
        model,
        fitted=np.hstack([model.fitted, basis]),
        subtracted=np.hstack([model.subtracted, taken]),
        is_closed=beside is not None,
    )


def _cosines(frames: int, numbers: NDArray[np.int64]) -> Columns:
    """Columns k of the DCT-II."""
    return np.asarray(np.cos(np.pi / frames * (np.arange(frames)[:, None] + 0.5) * numbers[None, :]))


def _beside(model: TemporalModel, columns: Columns) -> Columns:
    """The columns without their mean and without what was taken out before, by what used frames say."""
    rest = columns - columns[model.used].mean(axis=0)
    for _ in range(2):  # once leaves the rounding of large overlaps
        rest = rest - model.fitted @ (model.fitted[model.used].T @ rest[model.used])
    return np.asarray(rest)


def _orthonormal(rest: Columns, used: NDArray[np.bool_], original: Columns) -> Columns:
    """A basis of columns, orthonormal over used frames; what is a combination of others is left out."""
    centred = original[used] - original[used].mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    scaled = rest[:, length > 0] / length[length > 0]
    if scaled.shape[1] == 0:
        return np.zeros((len(used), 0))
    _, sizes, right = np.linalg.svd(scaled[used], full_matrices=False)
    chosen = sizes > _RANK
    return np.asarray(scaled @ right[chosen].T / sizes[chosen])


def _without(kept: Columns, removed: Columns) -> Columns:
    """An orthonormal basis of what of a subspace is orthogonal to columns; all frames count."""
    if removed.shape[1] == 0:
        return kept
    _, sizes, right = np.linalg.svd(removed.T @ kept, full_matrices=True)
    rank = int((sizes > _RANK).sum())
    return np.asarray(kept @ right[rank:].T)


def _intersection(one: Columns, other: Columns) -> Columns:
    """An orthonormal basis of what two subspaces share."""
    left, sizes, _ = np.linalg.svd(one.T @ other, full_matrices=False)
    return np.asarray(one @ left[:, sizes > 1 - _RANK])
