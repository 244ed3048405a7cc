"""Lossy codes: each voxel's values as small integers, with an error that is bounded in temporal SDs, or not at all.

value = code x step + offset, with a step and an offset for each voxel. What a code cannot say within the bound (spikes,
NaN, a background that would be lost) stands beside the codes, exactly. Two passes: the first finds each voxel's range
and SD, the second makes codes and checks every one of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import SourceError
from fmristream.signal import kernels
from fmristream.signal.measure import REFERENCE_FRAMES, RunMeasure, background_value, reference_of

# Beyond, doubles skip integers, and an error could not be told.
_EXACT_INTEGERS = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class LossyCodec:
    """How values become codes.

    Attributes:
        name: as in `--codec`.
        code_dtype: of the codes; its smallest number is the escape.
        bound_sd: no finite value is further from the source's than this, in SDs of its voxel over the run.
        reach_sd: codes reach so far from the middle at most, where a voxel's range is wider; 0: the step is given.
        step_sd: the step where `reach_sd` is 0.
    """

    name: str
    code_dtype: "np.dtype[Any]"
    bound_sd: float
    reach_sd: float = 0.0
    step_sd: float = 0.0

    @property
    def largest(self) -> int:
        """Codes are -largest to largest."""
        return int(np.iinfo(self.code_dtype).max)

    @property
    def escape(self) -> int:
        """The code of a value that stands elsewhere."""
        return int(np.iinfo(self.code_dtype).min)

    def takes(self, dtype: "np.dtype[Any]") -> bool:
        """Whether sources of this dtype are coded; others are stored without loss."""
        return self.reach_sd > 0 or dtype.kind == "f"


# Bounds: half a step (6/254 = .0236 and 1/512 = .00195) and room for the rounding of what is decoded to float32.
LOSSY_CODECS: Mapping[str, LossyCodec] = {
    "int8": LossyCodec(name="int8", code_dtype=np.dtype("|i1"), bound_sd=0.025, reach_sd=6.0),
    "int16": LossyCodec(name="int16", code_dtype=np.dtype("<i2"), bound_sd=0.002, step_sd=1 / 256),
}


def decoded_dtype(source: "np.dtype[Any]") -> "np.dtype[Any]":
    """What codes decode to: float32, float64 where the source has values that float32 has not."""
    is_narrow = source.itemsize <= 2 or source == np.dtype("<f4")
    return np.dtype("<f4" if is_narrow else "<f8")


def quantization_of(scale: "VoxelScale") -> NDArray[Any]:
    """(2, v) in the decoded dtype: step, which has float32 precision, and offset."""
    return np.stack([scale.step.astype(scale.offset.dtype), scale.offset])


def dequantize(codes: NDArray[Any], quantization: NDArray[Any], values: NDArray[Any]) -> None:
    """Write (v,) decoded values of codes; what stands elsewhere is the caller's."""
    kernels.dequantize(codes, quantization[0], quantization[1], values)


@dataclass(frozen=True, slots=True, kw_only=True)
class VoxelScale:
    """What the codes of a run mean, and how far they may be off.

    Attributes:
        step: (v,) float32, so that its product with a code is exact in double precision.
        offset: (v,) decoded dtype.
        sd: (v,) float64 temporal SD of the source.
    """

    step: NDArray[np.float32]
    offset: NDArray[Any]
    sd: NDArray[np.float64]


class RangeMeasure:
    """The first pass: every voxel's range, mean and SD.

    Args:
        frames: how many will come.
        dtype: of the source, little-endian.
    """

    def __init__(self, *, frames: int, dtype: "np.dtype[Any]") -> None:
        self._dtype = dtype
        self._hold = min(REFERENCE_FRAMES, frames)
        self._held: list[NDArray[Any]] = []
        self._low: NDArray[Any] | None = None
        self._high: NDArray[Any] | None = None
        self._first: NDArray[Any] | None = None
        self._measure: RunMeasure | None = None
        self._reference: NDArray[Any] | None = None
        self._scratch: NDArray[Any] | None = None

    def add(self, values: NDArray[Any]) -> None:
        """Count one frame, (v,)."""
        self._widen(values)
        if self._measure is not None:
            self._measure.add(values, self._scratch)
            return
        self._held.append(values.copy())
        if len(self._held) == self._hold:
            self._reference = reference_of(self._held)
            self._scratch = None if self._dtype.kind == "f" else np.empty_like(values)
            # Only means and SDs are asked for, and these are in the source's units: its scale does not matter.
            self._measure = RunMeasure(self._reference, dtype=self._dtype, slope=1.0, inter=0.0)
            for held in self._held:
                self._measure.add(held, self._scratch)
            self._held.clear()

    def finish(self, codec: LossyCodec) -> VoxelScale:
        """Steps and offsets.

        Raises:
            SourceError: some voxel's values cannot be coded.
        """
        assert self._measure is not None
        assert self._reference is not None
        assert self._low is not None
        assert self._high is not None
        assert self._first is not None
        low, high = self._low.astype(np.float64), self._high.astype(np.float64)
        if self._dtype.kind in "iu" and max(-low.min(initial=0), high.max(initial=0)) > _EXACT_INTEGERS:
            raise SourceError(
                f"holds whole numbers beyond 2^53, of which --codec {codec.name} can bound no error; "
                "convert it with --codec lossless"
            )
        statistics = self._measure.finish()
        mean = statistics.delta + (0 if self._dtype.kind == "f" else self._reference.astype(np.float64))
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            step, offset = _scale(codec, low, high, mean, statistics.sd)
            if self._dtype.kind in "iu":  # never finer than the source: whole steps from a whole number lose nothing
                is_fine = (step > 0) & (step <= 1)
                step, offset = np.where(is_fine, 1.0, step), np.where(is_fine, np.rint(offset), offset)
            is_empty = np.isnan(low)  # not one finite value: what stands in the first frame, most likely in all of them
            offset = np.where(is_empty, self._first, offset)
            offset[np.isnan(offset)] = np.nan  # one NaN for all
            step = np.where(is_empty, 0, step).astype(np.float32)
            if not np.isfinite(step).all():
                raise SourceError(
                    f"holds voxels whose values are too far apart for --codec {codec.name}; convert it with --codec lossless"
                )
            return VoxelScale(step=step, offset=offset.astype(decoded_dtype(self._dtype)), sd=statistics.sd)

    def _widen(self, values: NDArray[Any]) -> None:
        if self._dtype.kind == "f" and not np.isfinite(values).all():
            finite = np.where(np.isfinite(values), values, np.nan).astype(self._dtype)
        else:
            finite = values
        if self._low is None or self._high is None:
            self._low, self._high, self._first = finite.copy(), finite.copy(), values.copy()
            return
        np.fmin(self._low, finite, out=self._low)
        np.fmax(self._high, finite, out=self._high)


def _scale(
    codec: LossyCodec, low: NDArray[Any], high: NDArray[Any], mean: NDArray[Any], sd: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(step, offset) of each voxel, float64."""
    half = high / 2 - low / 2  # halved first: doubles may lie further apart than the largest double
    if codec.reach_sd:
        is_calm = half <= codec.reach_sd * sd
        step = np.where(is_calm, half, codec.reach_sd * sd) / codec.largest
        offset = np.where(is_calm, low + half, mean)
    else:
        step, offset = codec.step_sd * sd, mean
    is_constant = (sd == 0) | (low == high)
    return np.where(is_constant, 0, step), np.where(is_constant, low, offset)


@dataclass(slots=True, kw_only=True)
class Quantizer:
    """The second pass: codes of one frame after the other, each checked against the bound.

    Attributes:
        codec: how values become codes.
        scale: from the first pass.
        dtype: of the source.
        slope: scaled value = stored x slope + inter; what scales to 0 is background, which stays what it is.
        inter: see slope.
    """

    codec: LossyCodec
    scale: VoxelScale
    dtype: "np.dtype[Any]"
    slope: float
    inter: float
    decoded: NDArray[Any] = field(init=False)  # (v,) of the last frame: what a reader gets
    _escaped: NDArray[np.uint32] = field(init=False)
    _background: Any = field(init=False)
    _has_background: bool = field(init=False)
    _frames: int = 0
    _count: int = 0
    _worst: float = 0.0
    _total: float = 0.0

    def __post_init__(self) -> None:
        self.decoded = np.empty_like(self.scale.offset)
        self._escaped = np.empty(len(self.decoded), dtype=np.uint32)
        self._background, self._has_background = background_value(self.decoded.dtype, self.slope, self.inter)

    def encode(self, values: NDArray[Any], codes: NDArray[Any]) -> tuple[NDArray[np.uint32], NDArray[Any]]:
        """Write the codes of one frame, and `decoded`; returns positions and values of what codes cannot say.

        Raises:
            SourceError: a value differs by more than the bound from what would be stored.
        """
        count, worst, total, wrong = kernels.quantize(
            values, self.scale.step, self.scale.offset, self.scale.sd, self.codec.bound_sd, self._background,
            self._has_background, self.codec.largest, self.codec.escape, codes, self.decoded, self._escaped,
        )  # fmt: skip
        if wrong >= 0:
            raise SourceError(
                f"frame {self._frames}, stored voxel {wrong}: {values[wrong]} cannot be held within {self.codec.bound_sd} "
                f"temporal SD by --codec {self.codec.name}; convert it with --codec lossless"
            )
        self._frames += 1
        self._count += int(count)
        self._worst = max(self._worst, float(worst))
        self._total += float(total)
        positions = self._escaped[:count]
        return positions, self.decoded[positions]

    def record(self) -> dict[str, Any]:
        """What was measured over all frames, as it is stored with the run.

        `rms_error_sd` is over all values of voxels that change.
        """
        assert self._worst <= self.codec.bound_sd, "every value was checked"
        changing = int(np.count_nonzero(self.scale.sd)) * self._frames
        return {
            "bound_sd": self.codec.bound_sd,
            "codec": self.codec.name,
            "decoded_dtype": self.decoded.dtype.str,
            "escaped": self._count,
            "max_error_sd": self._worst,
            "rms_error_sd": math.sqrt(self._total / changing) if changing else 0.0,
            "source_dtype": self.dtype.str,
        }
