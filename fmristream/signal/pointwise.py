"""Operations that treat a value by itself, or beside its frame, once a few numbers about the run are known."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, UsageError
from fmristream.signal.linear import Blocks
from fmristream.signal.normalize import Normalization

Values = NDArray[np.float64]  # (..., t, v)
Numbers = NDArray[np.int64]  # (t,) frames' numbers in the run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Affine:
    """(x - center) x gain, each a number or (v,); (t, v) where they belong to frames; `keep` are left as they are."""

    center: NDArray[np.float64]
    gain: NDArray[np.float64]
    keep: NDArray[np.bool_] | None = None
    is_by_frame: bool = False

    def __call__(self, values: Values, numbers: Numbers) -> Values:
        """In place."""
        center, gain = self.center, self.gain
        if self.is_by_frame:
            center, gain = center[numbers, None], gain[numbers, None]
        if self.keep is not None and self.keep.any():
            kept = values[..., self.keep].copy()
            values -= center
            values *= gain
            values[..., self.keep] = kept
            return values
        values -= center
        values *= gain
        return values

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """Outside the mask stands 0."""
        return np.zeros_like(fill)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClipOp:
    """Bounds."""

    low: float
    high: float

    def __call__(self, values: Any, numbers: Numbers) -> Any:
        """In place; NaN stays."""
        return np.clip(values, self.low, self.high, out=values)

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """The background has bounds as well."""
        return np.clip(fill, self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DivideOp:
    """A number below all values."""

    by: float

    def __call__(self, values: Values, numbers: Numbers) -> Values:
        """In place."""
        values /= self.by
        return values

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """The background is a value as well."""
        return fill / self.by


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrameOp:
    """Each frame over its finite voxels: `zscore` (population SD), `center` or `minmax`; no spread gives 0."""

    kind: str

    def __call__(self, values: Values, numbers: Numbers) -> Values:
        """In place."""
        known = np.isfinite(values)
        is_whole = bool(known.all())
        count = np.maximum(known.sum(axis=-1, keepdims=True), 1)
        if self.kind == "minmax":
            low = np.min(values if is_whole else np.where(known, values, np.inf), axis=-1, keepdims=True)
            high = np.max(values if is_whole else np.where(known, values, -np.inf), axis=-1, keepdims=True)
            spread = high - low
            values -= low
        else:
            mean = np.sum(values if is_whole else np.where(known, values, 0), axis=-1, keepdims=True) / count
            values -= mean
            if self.kind == "center":
                return values
            squares = np.sum(np.square(values if is_whole else np.where(known, values, 0)), axis=-1, keepdims=True)
            spread = np.sqrt(squares / count)
        values *= np.divide(1.0, spread, out=np.zeros_like(spread), where=(spread > 0) & np.isfinite(spread))
        return values

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """Outside the mask stands 0."""
        return np.zeros_like(fill)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreground:
    """What is known of finite values that are not exactly 0, and of the others."""

    mean: float
    sd: float  # unbiased
    low: float
    high: float
    has_background: bool


def measure_foreground(blocks: Blocks) -> Foreground:
    """One pass, frame by frame: blocks of any size give the same bits."""
    count, shift, total, squares = 0, 0.0, 0.0, 0.0
    low, high, has_background = np.inf, -np.inf, False
    for _, values in blocks:
        for frame in values:
            inside = frame[np.isfinite(frame) & (frame != 0)]
            has_background = has_background or bool((frame == 0).any())
            if not len(inside):
                continue
            if not count:
                shift = float(inside.mean())
            count += len(inside)
            difference = inside - shift
            total += float(difference.sum())
            squares += float((difference**2).sum())
            low, high = min(low, float(inside.min())), max(high, float(inside.max()))
    mean = total / max(count, 1)
    sd = float(np.sqrt(max(squares - total * mean, 0.0) / max(count - 1, 1)))
    return Foreground(mean=mean + shift, sd=sd, low=low, high=high, has_background=has_background)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GlobalOp:
    """(x - center) / spread for the foreground; what is exactly 0 or not finite becomes `background`."""

    center: float
    spread: float
    background: float

    def __call__(self, values: Values, numbers: Numbers) -> Values:
        """In place."""
        outside = (values == 0) | ~np.isfinite(values)
        values -= self.center
        values /= self.spread
        values[outside] = self.background
        return values

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """As the background inside."""
        return np.full_like(fill, self.background)


def fit_global(normalization: Normalization, foreground: Foreground, *, what: str) -> GlobalOp:
    """Z or min-max of what was measured.

    Raises:
        CorruptDataError: there is no spread to divide by.
    """
    is_z = normalization.kind == "global-z"
    center = foreground.mean if is_z else foreground.low
    spread = foreground.sd if is_z else foreground.high - foreground.low
    require_spread(spread, what=what)
    background = (foreground.low - center) / spread if normalization.background == "min" else 0.0
    return GlobalOp(center=center, spread=spread, background=background)


def require_spread(spread: float, *, what: str) -> None:
    """Raise CorruptDataError unless a run can be divided by it."""
    if not (np.isfinite(spread) and spread > 0):
        raise CorruptDataError(
            f"{what}: its foreground has no spread, it cannot be normalised; leave the run out or use normalize='none'"
        )


def fit_range(blocks: Blocks, *, is_voxelwise: bool, keeps_constant: bool, what: str) -> Affine:
    """Smallest value to 0, largest to 1, over finite values."""
    low: Any = None
    high: Any = None
    for _, values in blocks:
        known = np.isfinite(values)
        lows = np.where(known, values, np.inf).min(axis=0)
        highs = np.where(known, values, -np.inf).max(axis=0)
        low, high = (lows, highs) if low is None else (np.minimum(low, lows), np.maximum(high, highs))
    if low is None:
        raise UsageError(f"{what}: no frame is left to take statistics of; skip or scrub fewer, or give more context")
    if not is_voxelwise:
        low, high = low.min(), high.max()
        require_spread(float(high - low), what=what)
    return affine_of_range(np.asarray(low), np.asarray(high), keeps_constant=keeps_constant)


def affine_of_range(
    low: NDArray[Any], high: NDArray[Any], *, keeps_constant: bool, is_by_frame: bool = False
) -> Affine:
    """(x - low) / (high - low); what has no range becomes 0, or stays what it is."""
    with np.errstate(invalid="ignore"):
        spread = np.asarray(high - low, dtype=np.float64)
    moves = np.isfinite(spread) & (spread > 0)
    return Affine(
        center=np.where(moves, low, 0.0),
        gain=np.divide(1.0, spread, out=np.zeros_like(spread), where=moves),
        keep=~moves if keeps_constant else None,
        is_by_frame=is_by_frame,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProjectionOp:
    """(t, v) to (t, k): products with k components after a mean is taken away; what is missing counts as the mean."""

    mean: NDArray[np.float64]  # (v,)
    components: NDArray[np.float64]  # (k, v)

    def __call__(self, values: Values, numbers: Numbers) -> Values:
        """A new array."""
        difference = values - self.mean
        difference[~np.isfinite(difference)] = 0.0
        return np.asarray(difference @ self.components.T)

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """There is no outside."""
        return np.zeros_like(fill)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwoChannelsOp:
    """TFF's two maps: z over the foreground of the run, and z of each voxel over time, unbiased SDs.

    In the first, what is exactly 0 becomes the smallest value of the whole map, background among it: mostly the z of 0. In
    the second it becomes 0: published code puts NaN there, since some voxel is constant, and its loader turns NaN into 0.
    """

    global_op: GlobalOp
    mean: NDArray[np.float64]
    gain: NDArray[np.float64]
    fills: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fills", np.array([self.global_op.background, 0.0]))

    def __call__(self, values: Values, numbers: Numbers) -> Values:
        """(t, v) to (2, t, v)."""
        both = np.stack([values, values])
        self.global_op(both[0], numbers)
        both[1] -= self.mean
        both[1] *= self.gain
        both[1][(values == 0) | ~np.isfinite(values)] = 0.0
        return both

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """One for each channel."""
        return self.fills


def two_channels(
    foreground: Foreground, mean: NDArray[np.float64], sd: NDArray[np.float64], *, reaches_outside: bool, what: str
) -> TwoChannelsOp:
    """TFF's maps of a run.

    Args:
        foreground: over the whole run.
        mean: (v,) over time.
        sd: (v,) unbiased.
        reaches_outside: whether voxels of the grid lie outside the mask: they are 0.
        what: dataset and run, for errors.
    """
    require_spread(foreground.sd, what=what)
    low = (foreground.low - foreground.mean) / foreground.sd
    if foreground.has_background or reaches_outside:
        low = min(low, -foreground.mean / foreground.sd)
    inside = GlobalOp(center=foreground.mean, spread=foreground.sd, background=low)
    return TwoChannelsOp(
        global_op=inside, mean=mean, gain=np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    )  # fmt: skip
