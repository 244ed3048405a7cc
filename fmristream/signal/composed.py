"""Recipes of several steps, ready for the frames of a run.

A run is read again for each statistic that is stored nowhere, a few frames at a time.
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.signal import confounds as tables
from fmristream.signal.build import Builder, Raw, applied
from fmristream.signal.heads import Head, Normalized, Series, Signal, head_blocks
from fmristream.signal.plan import Op, Plan, layout_of
from fmristream.signal.pointwise import ClipOp
from fmristream.signal.prepared import RecipeSource
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
    Voxelwise,
)

# Of float64 values that are worked on at a time.
_BLOCK_BYTES = 16 * 2**20
# Prefixes whose coefficients are kept for a run: two views of a sample, and the next.
_KEPT_PREFIXES = 3


class RunPrepared:
    """A recipe whose statistics are those of the run, for any of its frames; what must be read is read at the first."""

    is_framewise = True
    affine = None

    def __init__(self, plan: Plan, source: RecipeSource, *, exact: bool, channels: int) -> None:
        self._plan, self._source = plan, source
        scrubbed = _scrubbed_frames(plan, source)
        self.kept = ~scrubbed if scrubbed.any() else None
        self._used = _used_frames(plan, source, scrubbed)
        self._is_whole = bool(self._used.all())
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
                numbers = np.flatnonzero(self._used)
                builder = Builder(self._plan, self._source, self._head, used=self._used, is_whole=self._is_whole)
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
            _write(applied(ops, values, numbers[part]), fill, out[:, part])


class ClipPrepared:
    """A recipe whose statistics see a clip's past only: made anew for each clip, from its context or all frames before."""

    is_framewise = False
    affine = None
    kept = None  # scrubbing is refused with such recipes

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
        _write(applied(ops, values, numbers), self.fill, out)

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

    def _build(self, numbers: NDArray[np.int64], raw: Raw) -> list[Op]:
        used = np.zeros(self._source.run.frames, dtype=bool)
        used[numbers] = True
        used &= _used_frames(self._plan, self._source, np.zeros_like(used))
        builder = Builder(self._plan, self._source, self._head, used=used, is_whole=False)
        return builder.build(self._rest, raw)


def scrubs(steps: Sequence[Step]) -> bool:
    """Whether a step leaves frames out."""
    return any(isinstance(step, Temporal) and step.strategy is not None and step.strategy.scrubs for step in steps)


def _scrubbed_frames(plan: Plan, source: RecipeSource) -> NDArray[np.bool_]:
    """(t,) frames that strategies leave out: those that moved, and those before the steady state."""
    scrubbed = np.zeros(source.run.frames, dtype=bool)
    for step in plan.steps:
        if isinstance(step, Temporal) and step.strategy is not None and step.strategy.scrubs:
            found = tables.select(step.strategy, source.confounds(), frames=source.run.frames, where=source.where)
            scrubbed |= found.is_left_out
    return scrubbed


def _used_frames(plan: Plan, source: RecipeSource, scrubbed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(t,) frames that statistics may use: not those that are skipped or scrubbed."""
    used = ~scrubbed
    for step in plan.steps:
        if isinstance(step, Skip):
            used[: step.frames] = False
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
