"""What a picture of a run shows: volumes of statistics, a carpet of voxels over time, two traces. One pass, bounded memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.report.blocks import frame_blocks
from fmristream.shards.dataset import Dataset
from fmristream.shards.run_reader import RunReader

# A carpet has as many pixels as a screen: 3,000 voxels, fewer in runs of more than 2,000 frames.
CARPET_VOXELS = 3000
CARPET_VALUES = 6_000_000

# Where whole volumes are stored: air is darker than this share of the bright voxels' mean.
AIR_SHARE = 0.2
# Below this many SDs, means say nothing of where the brain is: the run was demeaned.
MIN_BRIGHT_SDS = 3.0
MIN_FOREGROUND = 50

Volume = NDArray[np.float32]  # x y z


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Look:
    """A run as it is drawn; NaN where nothing is shown."""

    mean: Volume | None  # scaled units; these three are None for grayordinates, which have no volume
    sd: Volume | None
    tsnr: Volume | None
    carpet: NDArray[np.float32]  # (voxel, time) z-scores, sorted by correlation with the global signal, highest first
    voxels: int  # that the traces are taken over
    global_signal: NDArray[np.float32]  # (t,) mean z-score
    change: NDArray[np.float32]  # (t,) RMS over voxels of the z-score's change since the frame before; the first is NaN


def signal_moments(reader: RunReader) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(v,) temporal mean and SD in the signal's unit, as stored with the run: no frame is read."""
    run = reader.run
    mean, sd = _moments(reader)
    with np.errstate(all="ignore"):
        return mean * run.slope + run.inter, sd * abs(run.slope)


def mean_image(dataset: Dataset, run: Run) -> Volume:
    """(x, y, z) temporal mean in the signal's unit, NaN outside the mask; no frame is read.

    Raises:
        SpaceError: the run holds grayordinates.
    """
    mask = dataset.space(run).mask
    volume = np.full(mask.shape, np.nan, dtype=np.float32)
    volume[mask] = signal_moments(dataset.reader(run))[0]
    return volume


def look_at(dataset: Dataset, run: Run) -> Look:
    """Read a run once; memory is a few frames and the carpet, whatever its length."""
    reader = dataset.reader(run)
    mean, sd = _moments(reader)
    mask = None if dataset.is_grayordinates(run) else dataset.space(run).mask
    scaled_mean, scaled_sd = signal_moments(reader)
    with np.errstate(all="ignore"):
        shown = foreground(scaled_mean, scaled_sd, whole=mask is not None and bool(mask.all()))
        tsnr = np.where(scaled_sd > 0, np.abs(scaled_mean) / scaled_sd, np.nan)
    changing = np.flatnonzero(shown & (sd > 0))
    carpet, global_signal, change = _stream(reader, mean, sd, changing)
    return Look(
        mean=_placed(mask, shown, scaled_mean),
        sd=_placed(mask, shown & (sd > 0), scaled_sd),
        tsnr=_placed(mask, shown, tsnr),
        carpet=_sorted(carpet),
        voxels=len(changing),
        global_signal=global_signal,
        change=change,
    )


def foreground(mean: NDArray[np.float64], sd: NDArray[np.float64], *, whole: bool) -> NDArray[np.bool_]:
    """(v,) which stored voxels are drawn: all finite ones of a mask, what is brighter than air of a whole volume."""
    finite = np.isfinite(mean) & np.isfinite(sd)
    changing = finite & (sd > 0)
    if not whole or not changing.any():
        return finite
    bright = float(np.percentile(mean[changing], 98))
    if bright < MIN_BRIGHT_SDS * float(np.median(sd[changing])):
        return changing
    inside = changing & (mean > AIR_SHARE * bright)
    return inside if inside.sum() >= min(MIN_FOREGROUND, changing.sum()) else changing


def _moments(reader: RunReader) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(v,) temporal mean and SD in stored units."""
    delta, sd = reader.exact_moments.astype(np.float64)
    return (delta + reader.reference if reader.is_difference else delta), sd


def _stream(
    reader: RunReader, mean: NDArray[np.float64], sd: NDArray[np.float64], voxels: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """(carpet, global signal, change) of the z-scores of these voxels."""
    run = reader.run
    rows = min(len(voxels), CARPET_VOXELS, max(1, CARPET_VALUES // run.frames))
    chosen = np.linspace(0, len(voxels) - 1, rows).round().astype(np.int64)
    carpet = np.zeros((rows, run.frames), dtype=np.float32)
    signal = np.full(run.frames, np.nan, dtype=np.float32)
    change = np.full(run.frames, np.nan, dtype=np.float32)
    if not len(voxels):
        return carpet, signal, change
    center, inverse = mean[voxels].astype(np.float32), (1 / sd[voxels]).astype(np.float32)
    wide: Any = np.float64 if run.numpy_dtype.itemsize > 4 else np.float32
    before: NDArray[Any] | None = None
    for start, stop in frame_blocks(run):
        for frame, values in enumerate(reader.read_stored(start, stop), start):
            with np.errstate(invalid="ignore", over="ignore"):
                z = (values[voxels].astype(wide) - center) * inverse
            z[~np.isfinite(z)] = 0
            carpet[:, frame] = z[chosen]
            signal[frame] = z.mean()
            if before is not None:
                change[frame] = np.sqrt(np.mean((z - before) ** 2))
            before = z
    return carpet, signal, change


def _sorted(carpet: NDArray[np.float32]) -> NDArray[np.float32]:
    if carpet.size == 0:
        return carpet
    common = carpet.mean(axis=0)
    return carpet[np.argsort(-(carpet @ (common - common.mean())), kind="stable")]


def _placed(mask: NDArray[np.bool_] | None, shown: NDArray[np.bool_], values: NDArray[np.float64]) -> Volume | None:
    if mask is None:
        return None
    volume = np.full(mask.shape, np.nan, dtype=np.float32)
    volume[mask] = np.where(shown, values, np.nan)
    return volume
