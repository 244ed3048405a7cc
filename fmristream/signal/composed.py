"""Steps made ready for a run, one after the other: each takes its statistics of what those before it give.

A run is read again for each statistic that is stored nowhere, a few frames at a time; consecutive steps that are linear
along time (trend, confounds, filter, centre, scale) share one such pass.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.signal import confounds as tables
from fmristream.signal.grid import Grid
from fmristream.signal.heads import Head, Normalized, Series, Signal, head_blocks
from fmristream.signal.linear import LinearOp, fit_linear
from fmristream.signal.parcellate import Atlas, Weights, centres_mm, weights_on
from fmristream.signal.pointwise import (
    Affine,
    ClipOp,
    DivideOp,
    FrameOp,
    GlobalOp,
    ProjectionOp,
    TwoChannelsOp,
    affine_of_range,
    fit_global,
    fit_range,
    measure_foreground,
    two_channels,
)
from fmristream.signal.prepared import Layout, RecipeSource
from fmristream.signal.reduce import cropped, parcelled, pooled
from fmristream.signal.steps import (
    Clip,
    Cohort,
    Crop,
    Divide,
    Framewise,
    Global,
    ParcelMeans,
    Pool,
    Range,
    Scaled,
    Skip,
    Step,
    Temporal,
    TwoChannels,
    Voxelwise,
)
from fmristream.signal.temporal import TemporalModel, add_bandpass, add_columns, add_highpass, add_trend

# Of float64 values that are worked on at a time.
_BLOCK_BYTES = 16 * 2**20
# Prefixes whose coefficients are kept for a run: two views of a sample, and the next.
_KEPT_PREFIXES = 3


class Op(Protocol):
    """A step made ready: (..., t, v) float64 in, the same or fewer values out; may work in place."""

    def __call__(self, values: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]: ...

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """What becomes of what stands outside the mask, (c,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What a recipe says; see `recipes.Recipe`."""

    steps: tuple[Step, ...]
    stats: str
    context: int | None
    fitted: tuple[Mapping[str, NDArray[np.float64]], ...]
    atlases: Mapping[str, Atlas]


class RunPrepared:
    """A recipe whose statistics are those of the run, for any of its frames; what must be read is read at the first."""

    is_framewise = True
    affine = None

    def __init__(self, plan: Plan, source: RecipeSource, *, exact: bool, channels: int) -> None:
        self._plan, self._source = plan, source
        self.kept = _used_frames(plan, source)  # (t,) bool: frames that were neither skipped nor scrubbed
        self._is_whole = bool(self.kept.all())
        self._head, self._rest = _head_of(plan, source, whole=self._is_whole, exact=exact)
        self.width = layout_of(plan, source).voxels
        self.channels = channels
        self.needs_frames = self._head.needs_frames
        self._ops: list[Op] = []
        self._is_ready = False
        self._lock = Lock()

    @property
    def fill(self) -> NDArray[np.float32]:
        """(c,) what stands outside the mask; may read the run."""
        return _fill(self._head, self._made())

    def _made(self) -> list[Op]:
        """Every step's operation: the first who asks reads the run, others wait for him instead of reading it as well."""
        if self._is_ready:
            return self._ops
        with self._lock:
            if not self._is_ready:
                numbers = np.flatnonzero(self.kept)
                builder = _Builder(self._plan, self._source, self._head, used=self.kept, is_whole=self._is_whole)
                self._ops = builder.build(self._rest, lambda: head_blocks(self._head, self._source, numbers))
                self._is_ready = True
        return self._ops

    def __call__(self, stored: NDArray[Any], frames: range, out: NDArray[np.float32]) -> None:
        """A few frames at a time."""
        numbers, ops = np.array(frames, dtype=np.int64), self._made()
        if isinstance(self._head, Normalized) and all(isinstance(op, ClipOp) for op in ops):
            self._head.write(stored, frames, out)
            for op in ops:
                op(out, numbers)  # type: ignore[arg-type]  # bounds know no precision
            return
        fill, step = _fill(self._head, ops), max(1, _BLOCK_BYTES // (8 * max(1, self._head.voxels)))
        for start in range(0, len(numbers), step):
            part = slice(start, start + step)
            values = self._head.values(stored[part], numbers[part])
            _write(_applied(ops, values, numbers[part]), fill, out[:, part])


class ClipPrepared:
    """A recipe whose statistics see a clip's past only: made anew for each clip, from its context or all frames before."""

    is_framewise = False
    affine = None

    def __init__(self, plan: Plan, source: RecipeSource) -> None:
        self._plan, self._source = plan, source
        self._head, self._rest = _head_of(plan, source, whole=False, exact=False)
        self._known: OrderedDict[int, list[Op]] = OrderedDict()
        self._lock = Lock()
        # Backgrounds that are statistics are refused with such recipes, so that the fill is the same for every clip.
        self.fill = _constant_fill(self._rest)
        self.channels = 1
        self.width = layout_of(plan, source).voxels
        self.needs_frames = self._head.needs_frames

    def __call__(self, stored: NDArray[Any], frames: range, out: NDArray[np.float32]) -> None:
        """The whole clip at once: its first frames say what becomes of the others.

        Raises:
            UsageError: the clip is shorter than the context.
        """
        context, numbers = self._plan.context, np.array(frames, dtype=np.int64)
        assert context is not None
        if len(numbers) < context:
            raise UsageError(f"a clip of {len(numbers)} frames has no context of {context}; read whole clips")
        values = self._head.values(stored, numbers)
        if self._plan.stats == "context":
            ops = self._build(numbers[:context], lambda: iter([(numbers[:context], values[:context].copy())]))
        else:
            ops = self._of_prefix(int(numbers[context - 1]) + 1)
        _write(_applied(ops, values, numbers), self.fill, out)

    def _of_prefix(self, stop: int) -> list[Op]:
        with self._lock:
            if stop in self._known:
                self._known.move_to_end(stop)
                return self._known[stop]
        numbers = np.arange(stop)
        ops = self._build(numbers, lambda: head_blocks(self._head, self._source, numbers))
        with self._lock:
            self._known[stop] = ops
            while len(self._known) > _KEPT_PREFIXES:
                self._known.popitem(last=False)
        return ops

    def _build(self, numbers: NDArray[np.int64], raw: "Raw") -> list[Op]:
        used = np.zeros(self._source.run.frames, dtype=bool)
        used[numbers] = True
        used &= _used_frames(self._plan, self._source)
        builder = _Builder(self._plan, self._source, self._head, used=used, is_whole=False)
        return builder.build(self._rest, raw)


Raw = Callable[[], Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]]


class _Builder:
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
                yield inside, _applied(self._ops, values if chosen.all() else values[chosen], inside)

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
                op, self.layout = _reduction(step, self.layout, self._plan, self._source)
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


def layout_of(plan: Plan, source: RecipeSource) -> Layout:
    """What the values of a frame are after all steps."""
    layout = source.layout
    for step in plan.steps:
        if isinstance(step, (Pool, Crop, ParcelMeans)):
            _, layout = _reduction(step, layout, plan, source)
        elif isinstance(step, Cohort) and step.kind == "pca":
            layout = Layout(voxels=step.components)
    return layout


def parcel_centres_mm(plan: Plan, source: RecipeSource) -> NDArray[np.float64] | None:
    """(p, 3) of the parcels that the values are after all steps, NaN where one has no voxel; None where they are others."""
    layout, found = source.layout, None
    for step in plan.steps:
        if isinstance(step, ParcelMeans) and layout.mask is not None and layout.affine is not None:
            found = centres_mm(_weights(step, layout, plan, source), layout.mask, layout.affine)
        elif isinstance(step, Cohort) and step.kind == "pca":
            found = None
        if isinstance(step, (Pool, Crop, ParcelMeans)):
            _, layout = _reduction(step, layout, plan, source)
    return found


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


def _used_frames(plan: Plan, source: RecipeSource) -> NDArray[np.bool_]:
    """(t,) frames that statistics may use: not those that are skipped or scrubbed."""
    used = np.ones(source.run.frames, dtype=bool)
    for step in plan.steps:
        if isinstance(step, Skip):
            used[: step.frames] = False
        elif isinstance(step, Temporal) and step.strategy is not None and step.strategy.scrubs:
            found = tables.select(step.strategy, source.confounds(), frames=source.run.frames, where=source.where)
            used &= ~found.is_left_out
    if not used.any():
        raise UsageError(f"{source.where}: no frame is left to take statistics of; skip or scrub fewer")
    return used


def _head_of(plan: Plan, source: RecipeSource, *, whole: bool, exact: bool) -> tuple[Head, Sequence[Step]]:
    """What stored values become first, and the steps that are left: whatever is stored with the run need not be computed."""
    steps = [step for step in plan.steps if not isinstance(step, (Skip, Scaled))]
    if not steps:
        return Signal(source), steps
    first = steps[0]
    if isinstance(first, ParcelMeans) and first.atlas not in plan.atlases:
        parcels = source.parcels(first.atlas)
        return Series(parcels.series), steps[1:]
    if whole and (isinstance(first, Global) or (isinstance(first, Voxelwise) and first.kind == "zscore")):
        return Normalized(first.text, source, exact=exact), steps[1:]
    return Signal(source), steps


def _reduction(step: Step, layout: Layout, plan: Plan, source: RecipeSource) -> tuple[Op, Layout]:
    match step:
        case Pool():
            return pooled(layout, step)
        case Crop():
            return cropped(layout, step)
        case ParcelMeans():
            return parcelled(layout, _weights(step, layout, plan, source), what=source.where)
    raise AssertionError(f"{step.text} is no reduction")


def _weights(step: ParcelMeans, layout: Layout, plan: Plan, source: RecipeSource) -> Weights:
    if step.atlas in plan.atlases:
        if layout.mask is None or layout.affine is None:
            raise UsageError(f"{source.where}: {step.text} needs volumes, here are values without a grid")
        grid = Grid(shape=layout.mask.shape, affine=tuple(layout.affine.reshape(-1)))
        return weights_on(plan.atlases[step.atlas], grid, layout.mask)
    if layout is not source.layout:
        raise UsageError(
            f"{source.where}: {step.text} after pool, crop or parcels: the stored weights are for the stored voxels; put it "
            "first, or pass the atlas itself as atlases={name: atlas}"
        )
    return source.parcels(step.atlas).weights


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


def _applied(ops: Sequence[Op], values: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    for op in ops:
        values = op(values, numbers)
    return values


def _fill(head: Head, ops: Sequence[Op]) -> NDArray[np.float32]:
    fill = head.fill
    for op in ops:
        fill = op.fill(fill)
    return fill.astype(np.float32)


def _constant_fill(steps: Sequence[Step]) -> NDArray[np.float32]:
    """Without a background that is a statistic: 0 throughout, but for bounds that lie on one side of it."""
    fill = np.zeros(1)
    for step in steps:
        fill = np.clip(fill, step.low, step.high) if isinstance(step, Clip) else fill
        fill = fill / step.by if isinstance(step, Divide) else fill
        if isinstance(step, (Voxelwise, Framewise, Range, Cohort, Temporal, Global)):
            fill = np.zeros(1)
    return fill.astype(np.float32)


def _write(values: NDArray[np.float64], fill: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Into float32 (c, t, v); what is not finite becomes the channel's fill."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and then the fill
        out[...] = values
    if not np.isfinite(out).all():
        for channel, background in zip(out, fill, strict=True):
            channel[~np.isfinite(channel)] = background


__all__ = ["ClipPrepared", "GlobalOp", "Op", "Plan", "RunPrepared", "cohort_op", "layout_of", "parcel_centres_mm"]
