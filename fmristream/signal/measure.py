"""One pass over the frames of a run: its reference, residuals and exact statistics. Pure arrays in, arrays out."""

import math
from dataclasses import dataclass
from typing import Any

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
        self._dtype = dtype
        self._integer = dtype.kind in "iu"
        self._exact = self._integer and dtype.itemsize <= 2
        voxels = len(reference)
        total = np.int64 if self._exact else np.float64
        self._reference = reference
        self._sums = np.zeros(voxels, dtype=total)
        self._squares = np.zeros(voxels, dtype=total)
        self._counts = np.zeros(0 if self._integer else voxels, dtype=np.int64)
        self._frames = 0
        self._slope, self._inter = slope, inter
        self._background, self._has_background = background_value(dtype, slope, inter)
        self._foreground = _Foreground(exact=self._exact)
        self._nonfinite = 0
        self._wraps = False

    def add(self, values: Values, residual: Values | None = None) -> None:
        """Count one frame, (v,) in the stored dtype; its residual is written into `residual` for integer dtypes."""
        if self._integer:
            assert residual is not None
            largest = 2 ** (8 * self._dtype.itemsize - 1) - 1
            kernel = kernels.measure_small_integers if self._exact else kernels.measure_large_integers
            result = kernel(
                values, self._reference, residual, self._sums, self._squares,
                self._background, self._has_background, self._foreground.shift, largest,
            )  # fmt: skip
            self._wraps = self._wraps or bool(result[5])
        else:
            result = kernels.measure_floats(
                values, self._reference, self._sums, self._squares, self._counts,
                self._background, self._has_background, self._foreground.shift,
            )  # fmt: skip
            self._nonfinite += int(result[5])
        self._foreground.add(*result[:5])
        self._foreground.see(values)
        self._frames += 1

    def finish(self) -> Statistics:
        """Statistics of all frames counted."""
        count = self._counts if not self._integer else np.full(len(self._sums), self._frames, dtype=np.int64)
        some = np.maximum(count, 1)
        mean: NDArray[np.float64] = np.asarray(self._sums / some, dtype=np.float64)
        # Shifted sums: the reference is within a few SDs of the mean, so nothing cancels.
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond 1e154 have no SD
            variance = np.maximum(self._squares / some - mean * mean, 0)
            delta = mean if self._integer else mean + self._reference
        foreground = self._foreground.finish(self._slope, self._inter)
        return Statistics(
            delta=delta,
            sd=np.sqrt(variance),
            valid_min=self._foreground.valid_min,
            valid_max=self._foreground.valid_max,
            nonfinite=self._nonfinite,
            residual_wraps=self._wraps,
            **foreground,
        )


class _Foreground:
    """Sums over finite, non-background values of the whole run, shifted by a constant against cancellation."""

    def __init__(self, *, exact: bool) -> None:
        # int64 sums of one frame cannot overflow for 16-bit values; frames are added as Python integers.
        self.shift = 0 if exact else 0.0
        self._exact = exact
        self._count = 0
        self._total: int | float = 0
        self._squares: int | float = 0
        self._low = float("inf")
        self._high = float("-inf")
        self.valid_min = float("inf")
        self.valid_max = float("-inf")

    def add(self, count: Any, total: Any, squares: Any, low: Any, high: Any) -> None:
        number = int if self._exact else float
        if count and self._count == 0 and not self._exact:
            # The first frame is summed about 0; later ones about its mean, which needs this frame's sums moved there.
            self.shift = float(total) / int(count)
            squares = max(float(squares) - float(total) * self.shift, 0.0)
            total = 0.0
        self._count += int(count)
        self._total += number(total)
        self._squares += number(squares)
        if count:
            self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def see(self, values: Values) -> None:
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if finite.size:
            self.valid_min = min(self.valid_min, _rounded_towards(finite.min().item(), float("-inf")))
            self.valid_max = max(self.valid_max, _rounded_towards(finite.max().item(), float("inf")))

    def finish(self, slope: float, inter: float) -> dict[str, Any]:
        if self._count == 0:
            nothing = float("nan")
            return {
                "foreground_count": 0, "foreground_mean": nothing, "foreground_sd": nothing,
                "foreground_min": nothing, "foreground_max": nothing,
            }  # fmt: skip
        mean = self._total / self._count
        if self._exact:
            spread = (self._squares * self._count - self._total * self._total) / self._count
        else:
            spread = max(self._squares - self._total * mean, 0.0)
        sd = (spread / max(self._count - 1, 1)) ** 0.5
        ends = sorted((self._low * slope + inter, self._high * slope + inter))
        return {
            "foreground_count": self._count,
            "foreground_mean": (mean + self.shift) * slope + inter,
            "foreground_sd": sd * abs(slope),
            "foreground_min": ends[0],
            "foreground_max": ends[1],
        }


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
