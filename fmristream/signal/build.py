"""Steps made ready for a run one after the other: each takes its statistics of what those before it give.

Consecutive steps that are linear along time (trend, confounds, filter, centre, scale) share one pass over the run, or none
where what is stored with it is all they take.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.signal import confounds as tables
from fmristream.signal.heads import Head, Series, Signal
from fmristream.signal.linear import LinearOp, fit_linear
from fmristream.signal.plan import Op, Plan, reduction
from fmristream.signal.pointwise import (
    Affine,
    ClipOp,
    DivideOp,
    FrameOp,
    ProjectionOp,
    TwoChannelsOp,
    affine_of_range,
    fit_global,
    fit_range,
    measure_foreground,
    two_channels,
)
from fmristream.signal.prepared import Layout, RecipeSource
from fmristream.signal.steps import (
    Clip,
    Cohort,
    Divide,
    Framewise,
    Global,
    ParcelMeans,
    Range,
    Scaled,
    Skip,
    Step,
    Temporal,
    TwoChannels,
    Voxelwise,
)
from fmristream.signal.temporal import TemporalModel, add_bandpass, add_columns, add_highpass, add_trend

Raw = Callable[[], Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]]


class Builder:
    """Makes one step after the other ready."""

    def __init__(
        self, plan: Plan, source: RecipeSource, head: Head, *, used: NDArray[np.bool_], is_whole: bool
    ) -> None:  # fmt: skip
        self._plan, self._source, self._head, self._used = plan, source, head, used
        self._is_whole = is_whole  # statistics stored with the run are those of the used frames
        self._ops: list[Op] = []
        self._has_missing = source.run.nonfinite > 0 or isinstance(head, Series)
        self.layout = head.layout
        self._fitted = iter(plan.fitted)

    def build(self, steps: Sequence[Step], raw: Raw) -> list[Op]:
        """Every step's operation."""
        self._raw = raw
        place = 0
        while place < len(steps):
            group = _group_at(steps, place)
            if group:
                self._ops.append(self._linear(group))
                place += len(group)
            else:
                self._ops += self._made(steps[place])
                place += 1
        return self._ops

    def _blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """What the steps so far give for used frames."""
        for numbers, values in self._raw():
            chosen = self._used[numbers]
            if chosen.any():
                inside = numbers[chosen]
                yield inside, applied(self._ops, values if chosen.all() else values[chosen], inside)

    def _made(self, step: Step) -> list[Op]:
        what = self._source.where
        match step:
            case Scaled() | Skip():
                return []
            case Clip():
                return [ClipOp(low=step.low, high=step.high)]
            case Divide():
                return [DivideOp(by=step.by)]
            case Framewise():
                return [FrameOp(kind=step.kind)]
            case Global():
                return [fit_global(step.normalization, measure_foreground(self._blocks()), what=what)]
            case Range():
                return [
                    fit_range(
                        self._blocks(), is_voxelwise=step.is_voxelwise, keeps_constant=step.keeps_constant, what=what
                    )
                ]
            case Cohort():
                op = cohort_op(step, next(self._fitted), voxels=self.layout.voxels, what=what)
                if step.kind == "pca":
                    self.layout = Layout(voxels=step.components)
                return [op]
            case TwoChannels():
                return [self._two_channels()]
            case _:
                op, self.layout = reduction(step, self.layout, self._plan, self._source)
                self._has_missing = self._has_missing or isinstance(step, ParcelMeans)
                return [op]

    def _linear(self, group: Sequence[Step]) -> Op:
        """Consecutive steps along time and the scale behind them, in one pass or none."""
        scaling = group[-1].kind if isinstance(group[-1], Voxelwise) else "none"
        model = TemporalModel.identity(self._used)
        for step in group:
            if isinstance(step, Temporal):
                model = _added(model, step, self._source)
        if model.is_identity and not self._ops and self._is_whole and isinstance(self._head, Signal):
            stored = _of_stored_moments(scaling, self._source)
            if stored is not None:
                return stored
        what = f"{self._source.where}: {' | '.join(step.text for step in group)}"
        return fit_linear(self._blocks(), model, scaling, has_missing=self._has_missing, what=what)

    def _two_channels(self) -> TwoChannelsOp:
        what = self._source.where
        foreground = measure_foreground(self._blocks())
        identity = TemporalModel.identity(self._used)
        linear = fit_linear(self._blocks(), identity, "zscore-sample", has_missing=self._has_missing, what=what)
        with np.errstate(divide="ignore"):
            sd = np.where(linear.gain > 0, 1 / linear.gain, 0.0)
        return two_channels(foreground, linear.center, sd, reaches_outside=not self.layout.is_whole, what=what)


def applied(ops: Sequence[Op], values: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """What the steps give, one after the other."""
    for op in ops:
        values = op(values, numbers)
    return values


def cohort_op(step: Cohort, arrays: Mapping[str, NDArray[np.float64]], *, voxels: int, what: str) -> Op:
    """The operation of statistics that were fitted.

    Raises:
        UsageError: they are of another number of values.
    """
    of = {"moments": "mean", "robust": "median", "voxel-range": "low", "pca": "mean"}.get(step.kind)
    if of is not None and len(arrays[of]) != voxels:
        raise UsageError(
            f"{what}: {step.text} was fitted to {len(arrays[of])} values a frame, here are {voxels}; fit it again"
        )
    if step.kind == "pca":
        return ProjectionOp(mean=arrays["mean"], components=arrays["components"][: step.components])
    if step.kind == "moments":
        return _scale(arrays["mean"], arrays["sd"])
    if step.kind == "robust":
        median, iqr = arrays["median"], arrays["iqr"]
        if not step.is_released:
            return _scale(median, iqr)
        # x - (median / IQR); what has no IQR is NaN there, and 0 here.
        moves = np.isfinite(iqr) & (iqr > 0)
        ratio = np.divide(median, iqr, out=np.zeros_like(median), where=moves)
        return Affine(center=ratio, gain=np.where(moves, 1.0, 0.0))
    by_frame = step.kind == "frame-range"
    return affine_of_range(
        arrays["low"] if step.kind != "range" else arrays["low"][0],
        arrays["high"] if step.kind != "range" else arrays["high"][0],
        keeps_constant=step.keeps_constant,
        is_by_frame=by_frame,
    )


def _scale(center: NDArray[np.float64], spread: NDArray[np.float64]) -> Affine:
    moves = np.isfinite(spread) & (spread > 0)
    gain = np.divide(1.0, spread, out=np.zeros_like(spread), where=moves)
    return Affine(center=np.where(np.isfinite(center), center, 0.0), gain=gain)


def _group_at(steps: Sequence[Step], place: int) -> Sequence[Step]:
    """Steps from a place on that are one linear operation: any along time, then at most one scale."""
    stop = place
    while stop < len(steps) and isinstance(steps[stop], Temporal):
        stop += 1
        if _is_last(steps[stop - 1]):
            break
    if stop < len(steps) and isinstance(steps[stop], Voxelwise):
        stop += 1
    return steps[place:stop]


def _is_last(step: Step) -> bool:
    """Whether nothing can join behind: non-aggressive regression is no projection."""
    return isinstance(step, Temporal) and step.strategy is not None and step.strategy.names[0] in ("aroma", "fix")


def _added(model: TemporalModel, step: Temporal, source: RecipeSource) -> TemporalModel:
    if step.kind == "detrend":
        return add_trend(model)
    if step.strategy is not None:
        found = tables.select(step.strategy, source.confounds(), frames=source.run.frames, where=source.where)
        return add_columns(model, found.removed, beside=found.beside)
    tr_s = source.run.tr_s
    if tr_s is None or not tr_s > 0:
        raise UsageError(f"{source.where}: {step.text} needs the time between frames, the run tells none (tr_s)")
    if step.kind == "highpass":
        return add_highpass(model, hz=step.low_hz, tr_s=tr_s)
    return add_bandpass(model, low_hz=step.low_hz, high_hz=step.high_hz, tr_s=tr_s)


def _of_stored_moments(scaling: str, source: RecipeSource) -> LinearOp | None:
    """Centre and scale by the mean and SD that are stored with the run; None where they are not those wanted."""
    run = source.run
    if scaling == "none" or (scaling.startswith("zscore") and (run.nonfinite or run.frames < 2)):
        return None
    delta, sd = source.exact_moments.astype(np.float64)
    mean = delta + source.reference.astype(np.float64) if source.is_difference else delta
    center = mean * run.slope + run.inter
    if scaling == "center":
        gain = np.ones_like(center)
    elif scaling == "percent":
        size = np.abs(center)
        gain = np.divide(100.0, size, out=np.zeros_like(size), where=size > np.finfo(np.float64).eps)
    else:
        spread = sd * abs(run.slope) * np.sqrt(run.frames / (run.frames - 1))
        gain = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    rows = np.zeros((run.frames, 0))
    return LinearOp(center=center, gain=gain, rows=rows, coefficients=np.zeros((0, len(center)), dtype=np.float32))
