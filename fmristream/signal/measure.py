"""One pass over the frames of a run: its reference, residuals and exact statistics. Pure arrays in, arrays out."""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.signal import kernels

# Frames that are averaged into the reference, held back until it is known: more frames save little (311 against
# 317 kB a frame for the mean of the whole run), fewer cost bytes.
REFERENCE_FRAMES = 16

# Largest error that float16 moments may cause: in temporal SDs for the mean, relative for the SD.
MAX_HALF_MEAN_ERROR = 2.0**-9
MAX_HALF_SD_ERROR = 2.0**-10

Values = NDArray[Any]  # (v,) in the stored dtype


def reference_of(first_frames: list[Values]) -> Values:
    """The rounded mean of the first frames in the stored dtype; for floats the finite mean, used as a shift only.

    Frame by frame: a stack of them in float64 would be the largest thing in memory.
    """
    dtype, frames = first_frames[0].dtype, len(first_frames)
    if dtype.kind == "f":
        return _finite_mean(first_frames)
    if dtype.itemsize < 8:
        total = np.zeros(first_frames[0].shape, dtype=np.float64)  # holds these sums exactly
        for frame in first_frames:
            total += frame
        return np.rint(total / frames).astype(dtype)
    # Sums of 64-bit values overflow and float64 rounds: quotients and remainders are added up apart.
    quotients = np.zeros_like(first_frames[0])
    remainders = np.zeros_like(first_frames[0])
    for frame in first_frames:
        quotient, remainder = np.divmod(frame, frames)
        quotients += quotient
        remainders += remainder
    return np.asarray(quotients + (2 * remainders + frames) // (2 * frames), dtype=dtype)


def _finite_mean(frames: list[Values]) -> NDArray[np.float64]:
    """Mean of the finite values, 0 where there is none; exactly the value where all are equal."""
    if all(np.isfinite(frame).all() for frame in frames):  # the same, in a quarter of the time
        first = frames[0].astype(np.float64)
        total, difference = np.zeros_like(first), np.empty_like(first)
        with np.errstate(over="ignore", invalid="ignore"):
            for frame in frames:
                total += np.subtract(frame, first, out=difference)
            return np.asarray(first + total / len(frames))
    first = np.zeros(frames[0].shape, dtype=np.float64)
    total = np.zeros_like(first)
    count = np.zeros(first.shape, dtype=np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        for frame in frames:
            wide = frame.astype(np.float64)
            finite = np.isfinite(wide)
            first = np.where(finite & (count == 0), wide, first)
            total += np.where(finite, wide - first, 0)
            count += finite
        return np.asarray(first + total / np.maximum(count, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What is known of a run after its last frame. Stored units, except `foreground_*` in scaled units."""

    delta: NDArray[np.float64]  # (v,) temporal mean minus reference (integers) or temporal mean (floats)
    sd: NDArray[np.float64]  # (v,) temporal SD, population (divisor: number of finite frames)
    valid_min: float
    valid_max: float
    nonfinite: int
    residual_wraps: bool
    foreground_count: int
    foreground_mean: float
    foreground_sd: float  # unbiased
    foreground_min: float
    foreground_max: float


class RunMeasure:
    """Statistics of a run, fed frame by frame.

    Args:
        reference: (v,) from `reference_of`: stored dtype for integers, float64 shift for floats.
        dtype: the stored dtype.
        slope: scaled value = stored x slope + inter.
        inter: see slope.
    """

    def __init__(self, reference: Values, *, dtype: "np.dtype[Any]", slope: float, inter: float) -> None:
        self._slope, self._inter = slope, inter
        self._frames = 0
        background, has_background = background_value(dtype, slope, inter)
        sums = _Floats if dtype.kind == "f" else _SmallIntegers if dtype.itemsize <= 2 else _LargeIntegers
        self._sums: _Sums = sums(reference, dtype, background if has_background else None)

    def add(self, values: Values, residual: Values | None = None) -> None:
        """Count one frame, (v,) in the stored dtype; its residual is written into `residual` for integer dtypes."""
        self._sums.add(values, residual)
        self._frames += 1

    def finish(self) -> Statistics:
        """Statistics of all frames counted."""
        mean, square = self._sums.means(self._frames)
        # Shifted sums: the reference is within a few SDs of the mean, so nothing cancels.
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond 1e154 have no SD
            variance = np.maximum(square - mean * mean, 0)
            delta = mean + self._sums.offset
        tally = self._sums.tally(self._frames)
        return Statistics(
            delta=delta,
            sd=np.sqrt(variance),
            valid_min=tally.valid_min,
            valid_max=tally.valid_max,
            nonfinite=tally.nonfinite,
            residual_wraps=tally.wraps,
            **tally.foreground(self._slope, self._inter),
        )


@dataclass(slots=True, kw_only=True)
class _Tally:
    """Numbers about all stored values of a run. `total` and `squares` are of value - centre over the foreground.

    The foreground is what is finite and not the background value.
    """

    count: int = 0
    total: int | float = 0
    squares: int | float = 0
    centre: int | float = 0
    low: float = math.inf
    high: float = -math.inf
    valid_min: float = math.inf
    valid_max: float = -math.inf
    nonfinite: int = 0
    wraps: bool = False

    def foreground(self, slope: float, inter: float) -> dict[str, Any]:
        """The `foreground_*` of Statistics."""
        if self.count == 0:
            nothing = float("nan")
            return {
                "foreground_count": 0, "foreground_mean": nothing, "foreground_sd": nothing,
                "foreground_min": nothing, "foreground_max": nothing,
            }  # fmt: skip
        mean = self.total / self.count
        if isinstance(self.squares, int):  # exact
            spread = (self.squares * self.count - self.total * self.total) / self.count
        else:
            spread = max(self.squares - self.total * mean, 0.0)
        sd = (spread / max(self.count - 1, 1)) ** 0.5
        ends = sorted((self.low * slope + inter, self.high * slope + inter))
        return {
            "foreground_count": self.count,
            "foreground_mean": (mean + self.centre) * slope + inter,
            "foreground_sd": sd * abs(slope),
            "foreground_min": ends[0],
            "foreground_max": ends[1],
        }


class _Sums(Protocol):
    """What is added up over the frames of a run; `background` is None where no stored value is."""

    offset: Any  # what delta has beside the mean of differences

    def __init__(self, reference: Values, dtype: "np.dtype[Any]", background: Any) -> None: ...

    def add(self, values: Values, residual: Values | None) -> None: ...

    def means(self, frames: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(v,) temporal means of value - reference and of its square."""
        ...

    def tally(self, frames: int) -> _Tally: ...


class _SmallIntegers:
    """8 and 16 bits: everything is summed exactly."""

    offset = 0

    def __init__(self, reference: Values, dtype: "np.dtype[Any]", background: Any) -> None:
        voxels = len(reference)
        self._reference = reference
        self._largest = 2 ** (8 * dtype.itemsize - 1) - 1
        self._sums = np.zeros(voxels, dtype=np.int64)
        self._squares = np.zeros(voxels, dtype=np.int64)
        self._recent_sums = np.zeros(voxels, dtype=np.int32)
        self._recent_squares = np.zeros(voxels, dtype=np.uint32)
        self._used = np.zeros(-(-voxels // kernels.BLOCK), dtype=np.uint64)
        self._background = np.int32(2**30 if background is None else int(background))
        self._backgrounds = 0
        self._tally = _Tally()

    def add(self, values: Values, residual: Values | None) -> None:
        backgrounds, low, high, least, most = kernels.measure_small_integers(
            values, self._reference, residual, self._sums, self._squares,
            self._recent_sums, self._recent_squares, self._used, self._background,
        )  # fmt: skip
        tally = self._tally
        self._backgrounds += int(backgrounds)
        if backgrounds < len(values):
            tally.low, tally.high = min(tally.low, float(low)), max(tally.high, float(high))
        tally.wraps = tally.wraps or bool(most > self._largest or least < -self._largest - 1)

    def means(self, frames: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sums, squares = self._totals()
        return sums / max(frames, 1), squares / max(frames, 1)

    def tally(self, frames: int) -> _Tally:
        sums, squares = self._totals()
        reference, background = self._reference.astype(np.int64), int(self._background)
        # Of values from those of differences: the foreground costs no pass over the frames.
        total = _exact_sum(frames * reference + sums) - background * self._backgrounds
        value_squares = _exact_sum(frames * reference * reference + 2 * reference * sums + squares)
        tally = replace(
            self._tally,
            count=frames * len(reference) - self._backgrounds,
            total=total,
            squares=value_squares - background * background * self._backgrounds,
        )
        return _with_range(tally, float(background) if self._backgrounds else None)

    def _totals(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._sums + self._recent_sums, self._squares + self._recent_squares


class _LargeIntegers:
    """32 and 64 bits: sums are float64."""

    offset = 0

    def __init__(self, reference: Values, dtype: "np.dtype[Any]", background: Any) -> None:
        self._reference = reference
        self._largest = 2 ** (8 * dtype.itemsize - 1) - 1
        self._sums = np.zeros(len(reference), dtype=np.float64)
        self._squares = np.zeros(len(reference), dtype=np.float64)
        self._background = dtype.type(0) if background is None else background
        self._has_background = background is not None
        self._tally = _Tally(total=0.0, squares=0.0, centre=0.0)

    def add(self, values: Values, residual: Values | None) -> None:
        tally = self._tally
        count, total, squares, low, high, wraps = kernels.measure_large_integers(
            values, self._reference, residual, self._sums, self._squares,
            self._background, self._has_background, tally.centre, self._largest,
        )  # fmt: skip
        if count and tally.count == 0:
            # The first frame is summed about 0; later ones about its mean, which needs this frame's sums moved there.
            tally.centre = float(total) / int(count)
            squares = max(float(squares) - float(total) * tally.centre, 0.0)
            total = 0.0
        tally.count += int(count)
        tally.total += float(total)
        tally.squares += float(squares)
        if count:
            tally.low, tally.high = min(tally.low, float(low)), max(tally.high, float(high))
        tally.wraps = tally.wraps or bool(wraps)
        if values.size:
            tally.valid_min = min(tally.valid_min, _rounded_towards(values.min().item(), float("-inf")))
            tally.valid_max = max(tally.valid_max, _rounded_towards(values.max().item(), float("inf")))

    def means(self, frames: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self._sums / max(frames, 1), self._squares / max(frames, 1)

    def tally(self, frames: int) -> _Tally:
        return self._tally


class _Floats:
    """Floats: finite values count, sums are float64."""

    def __init__(self, reference: Values, dtype: "np.dtype[Any]", background: Any) -> None:
        voxels = len(reference)
        self._shift = reference.astype(dtype)  # any constant near the mean will do, and a narrow one is read faster
        self.offset = self._shift.astype(np.float64)
        self._sums = np.zeros(voxels, dtype=np.float64)
        self._squares = np.zeros(voxels, dtype=np.float64)
        self._missing = np.zeros(voxels, dtype=np.int64)
        self._totals = np.zeros(kernels.LANES, dtype=np.float64)
        self._total_squares = np.zeros(kernels.LANES, dtype=np.float64)
        self._lows = np.full(kernels.LANES, np.inf, dtype=dtype)
        self._highs = np.full(kernels.LANES, -np.inf, dtype=dtype)
        self._background = dtype.type(np.nan) if background is None else background
        self._tally = _Tally(centre=_centre(self._shift, self._background))

    def add(self, values: Values, residual: Values | None) -> None:
        count, nonfinite = kernels.measure_floats(
            values, self._shift, self._sums, self._squares, self._missing,
            self._totals, self._total_squares, self._lows, self._highs, self._background, self._tally.centre,
        )  # fmt: skip
        self._tally.count += int(count)
        self._tally.nonfinite += int(nonfinite)

    def means(self, frames: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        counted = np.maximum(frames - self._missing, 1)
        return self._sums / counted, self._squares / counted

    def tally(self, frames: int) -> _Tally:
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond 1e154 have no SD
            total, squares = float(self._totals.sum()), float(self._total_squares.sum())
        tally = replace(
            self._tally,
            total=total,
            squares=squares,
            low=float(self._lows.min()),
            high=float(self._highs.max()),
        )
        some_background = frames * len(self._shift) > tally.count + tally.nonfinite
        return _with_range(tally, float(self._background) if some_background else None)


def _with_range(tally: _Tally, background: float | None) -> _Tally:
    """The tally with the range of all finite values: those of the foreground, and the background if there was some."""
    also = [] if background is None else [background]
    return replace(tally, valid_min=min(tally.low, *also, math.inf), valid_max=max(tally.high, *also, -math.inf))


def _centre(shift: Values, background: Any) -> float:
    """About the mean of the foreground; 0 where that cannot be told."""
    some = shift[np.isfinite(shift) & (shift != background)]
    with np.errstate(over="ignore"):
        centre = float(some.mean(dtype=np.float64)) if some.size else 0.0
    return centre if math.isfinite(centre) else 0.0


def _exact_sum(numbers: NDArray[np.int64]) -> int:
    """Their sum, also beyond 64 bits."""
    return (int((numbers >> 32).sum()) << 32) + int((numbers & 0xFFFFFFFF).sum())


def _rounded_towards(value: float, end: float) -> float:
    """The value as a float, or the next one towards `end` where a 64-bit integer does not fit: a range keeps its ends."""
    rounded = float(value)
    is_beyond = rounded >= value if end > 0 else rounded <= value  # Python compares int and float exactly
    return rounded if is_beyond else math.nextafter(rounded, end)


def background_value(dtype: "np.dtype[Any]", slope: float, inter: float) -> tuple[Any, bool]:
    """The stored value that scales to exactly 0, and whether there is one in this dtype."""
    candidate = -inter / slope if inter else 0.0
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            value = dtype.type(candidate)
        return value, bool(float(value) * slope + inter == 0)
    rounded = int(np.rint(candidate)) if np.isfinite(candidate) else 0
    info = np.iinfo(dtype)
    if not info.min <= rounded <= info.max or rounded * slope + inter != 0:
        return dtype.type(0), False
    return dtype.type(rounded), True


def moments_of(statistics: Statistics, *, dtype: "np.dtype[Any]") -> NDArray[Any]:
    """(2, v): delta and SD, as float16 where that is harmless, float64 for float64 sources, else float32.

    A float64 source has no reference: its delta is the mean itself, of which float32 would lose .005 SD where the mean
    is 100,000 SDs.

    Harmless: an 8- or 16-bit integer source, and no voxel's z-score moves by more than MAX_HALF_MEAN_ERROR or is
    scaled by more than MAX_HALF_SD_ERROR. Voxels that never change keep an SD of exactly 0 either way.
    """
    exact = np.stack([statistics.delta, statistics.sd])
    if dtype == np.dtype("<f8"):
        return exact
    with np.errstate(over="ignore"):
        single = exact.astype(np.float32)
    single[1, statistics.sd == 0] = 0
    if dtype.kind not in "iu" or dtype.itemsize > 2:
        return single
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    if not np.isfinite(half).all():
        return single
    error = np.abs(half.astype(np.float64) - exact)
    changing = statistics.sd > 0
    fits = (error[0][changing] <= MAX_HALF_MEAN_ERROR * statistics.sd[changing]).all()
    fits = fits and (error[1][changing] <= MAX_HALF_SD_ERROR * statistics.sd[changing]).all()
    return half if fits else single
