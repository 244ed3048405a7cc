"""Functional connectivity of the frames that a network sees: correlations of parcels, one pass, a few numbers a run.

Parcels are those of an atlas where the recipe gives them (`normalize="parcels"`), else the means of cubes of voxels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from train.baselines_fit import Features

if TYPE_CHECKING:
    from fmristream.catalog.run import Run
    from fmristream.stream.clips import StreamingDataset
    from train.data import Part

Floats = NDArray[np.float64]

# A cube is a parcel if at least this share of it is brain.
LEAST_BRAIN = 0.1
# A sum of products takes 8 bytes a pair: 5,000 series make 200 MB.
MOST_SERIES = 5_000
# Of all subjects' correlations in float64; a fit takes some five times as much. Cubes grow until they fit.
MOST_FEATURE_BYTES = 2 * 1024**3
# Frames of which the parcels are averaged at once: whole runs of fine grids are not held twice.
_FRAMES_AT_ONCE = 64
# Fisher's z of this is 3.8; of 1 it is infinite.
_LARGEST_CORRELATION = 0.999
# Of a float32 series around its mean: SDs below this share are rounding.
_CONSTANT = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parcels:
    """Which values of a frame make up which parcel."""

    order: NDArray[np.int64]  # (n,) places of the values, parcel by parcel
    starts: NDArray[np.int64]  # (parcels,) where each begins in `order`

    def __len__(self) -> int:
        return len(self.starts)

    def means(self, values: NDArray[Any]) -> Floats:
        """(t, values) to (t, parcels)."""
        sums = np.add.reduceat(values[:, self.order], self.starts, axis=1, dtype=np.float64)
        return np.asarray(sums / np.diff(self.starts, append=len(self.order)))


class RunSums:
    """What is known of the series of a run after some of its frames: their number, means and summed products."""

    def __init__(self, series: int) -> None:
        self.frames = 0
        self._mean = np.zeros(series)
        self._products = np.zeros((series, series))

    def add(self, frames: Floats) -> None:
        """Take in more frames (t, series).

        Products are taken about the mean, and joined as Chan, Golub and LeVeque (1979) do: plain sums would lose the
        fluctuations of raw signals in rounding.
        """
        count = len(frames)
        if not count:
            return
        mean = frames.mean(axis=0)
        centred, step = frames - mean, mean - self._mean
        total = self.frames + count
        self._products += centred.T @ centred + np.outer(step, step) * (self.frames * count / total)
        self._mean += step * (count / total)
        self.frames = total

    def fisher_z(self) -> Floats:
        """(pairs,) Fisher's z of the correlations, upper triangle row by row; NaN where a series never changes."""
        squares = np.diag(self._products)
        changes = squares > max(1, self.frames) * (_CONSTANT * self._mean) ** 2
        length = np.sqrt(np.where(changes, squares, np.nan))
        upper = np.triu_indices(len(squares), k=1)
        correlations = self._products[upper] / (length[upper[0]] * length[upper[1]])
        return np.asarray(np.arctanh(np.clip(correlations, -_LARGEST_CORRELATION, _LARGEST_CORRELATION)))


def cube_parcels(place: NDArray[np.int64], grid: tuple[int, int, int], block: int) -> Parcels:
    """Cubes of `block`³ voxels, those of which at least a tenth is brain, in C order.

    Args:
        place: (v,) where each voxel lies in the C-ordered grid; -1 for those that it lacks.
        grid: (x, y, z).
        block: voxels along an edge.

    Raises:
        UsageError: no cube holds enough of them.
    """
    cubes = tuple(-(-size // block) for size in grid)
    inside = np.flatnonzero(place >= 0)
    at = np.unravel_index(place[inside], grid)
    cube = np.ravel_multi_index(tuple(axis // block for axis in at), cubes)
    is_kept = np.bincount(cube, minlength=int(np.prod(cubes))) >= LEAST_BRAIN * block**3
    kept = np.flatnonzero(is_kept[cube])
    if not len(kept):
        raise UsageError(f"no cube of {block}³ voxels lies in the brain's {len(inside)} voxels; take a smaller block")
    order = kept[np.argsort(cube[kept], kind="stable")]
    starts = np.flatnonzero(np.diff(cube[order], prepend=-1))
    return Parcels(order=inside[order], starts=starts)


def default_block(grid: tuple[int, int, int]) -> int:
    """Cubes of a sixth of the grid, about 3 cm."""
    return max(1, max(grid) // 6)


def block_for(clips: "StreamingDataset", *, subjects: int, most_bytes: int = MOST_FEATURE_BYTES) -> int:
    """Edge of the cubes in voxels: a sixth of the grid, or the next larger one with which all subjects' correlations fit.

    0 where the values are no grid.

    Raises:
        UsageError: they are a list, such as parcels, and do not fit.
    """
    if clips.has_grid:
        block = default_block(clips.grid)
        while feature_bytes(len(cube_parcels(clips.positions, clips.grid, block)), subjects) > most_bytes:
            block += 1
        return block
    if feature_bytes(clips.voxels, subjects) > most_bytes:
        raise UsageError(
            f"connectivity of {clips.voxels} series and {subjects} subjects takes "
            f"{feature_bytes(clips.voxels, subjects) / 1e9:.0f} GB, at most {most_bytes / 1e9:.0f} are taken; choose an atlas of "
            "fewer parcels for it (python -m train.baselines --atlas)"
        )
    return 0


def feature_bytes(series: int, subjects: int) -> int:
    """What the correlations of all pairs take in float64."""
    return 8 * subjects * (series * (series - 1) // 2)


def parcels_of(clips: "StreamingDataset", *, block: int = 0) -> Parcels:
    """What to correlate: cubes of the grid (`block` 0: a sixth of it), or every value of a list, such as parcels.

    Raises:
        UsageError: there are too many.
    """
    if clips.has_grid:
        found = cube_parcels(clips.positions, clips.grid, block or default_block(clips.grid))
    else:
        found = Parcels(order=np.arange(clips.voxels), starts=np.arange(clips.voxels))
    if len(found) > MOST_SERIES:
        raise UsageError(
            f"connectivity of {len(found)} series was asked for, at most {MOST_SERIES} are correlated; "
            "take larger cubes, or an atlas: normalize='parcels'"
        )
    return found


def connectivity_features(part: "Part", *, block: int = 0, channel: int = 0) -> Features:
    """Fisher's z of the correlations of parcels, for each subject the mean over its runs; memory is that of one run.

    A run's frames are those of its windows, each counted once however often it comes: what the network sees, with its
    normalisation. Pairs with a series that never changes are left out of the mean, and NaN where no run has them.

    Args:
        part: a split in stored order (`seed=None`), on one rank.
        block: voxels along a cube; a sixth of the grid where it is 0. Not used where the values are parcels already.
        channel: which channel of the input.

    Raises:
        UsageError: the order is shuffled or shared between ranks, a run has fewer than 3 frames, or values are too many.
    """
    clips = part.clips
    if clips.seed is not None or part.loader.world.size != 1 or clips.views != 1:
        raise UsageError("connectivity is computed run by run: open the split with seed=None, one view, on one rank")
    if not 0 <= channel < clips.channels:
        raise UsageError(f"channel {channel} was asked for, the input has {clips.channels}; count from 0")
    subjects: dict[str, _Mean] = {}
    groups: dict[str, str] = {}
    for run, sums in _each_run(part, parcels_of(clips, block=block), channel):
        if sums.frames < 3:
            raise UsageError(f"a run has {sums.frames} frames to correlate, expected 3 or more; take longer windows")
        subjects.setdefault(run.subject, _Mean()).add(sums.fisher_z())
        groups[run.subject] = run.group
    labels = sorted(subjects)
    return Features(
        subject=tuple(labels),
        group=tuple(groups[label] for label in labels),
        values=np.stack([subjects[label].value for label in labels]),
    )


class _Mean:
    """The mean over runs of what each of them knows."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._count: Any = 0

    def add(self, values: Floats) -> None:
        known = np.isfinite(values)
        self._sum = self._sum + np.where(known, values, 0)
        self._count = self._count + known

    @property
    def value(self) -> Floats:
        return np.where(self._count > 0, self._sum / np.maximum(self._count, 1), np.nan)


def _each_run(part: "Part", parcels: Parcels, channel: int) -> Iterator[tuple["Run", RunSums]]:
    """The runs in stored order, each with the sums over its frames."""
    clips = part.clips
    number, sums, is_new = -1, RunSums(0), np.zeros(0, dtype=bool)
    for batch in part.loader:
        for row in np.flatnonzero(batch.valid.numpy()).tolist():
            clip = clips.clip(int(batch.window[row]))
            if clip.run != number:
                if number >= 0:
                    yield clips.runs[number], sums
                number, sums = clip.run, RunSums(len(parcels))
                is_new = np.ones(clips.runs[number].frames, dtype=bool)
            frames = np.array(clip.frames)
            fresh = np.flatnonzero(is_new[frames])
            is_new[frames] = False
            courses: list[Floats] = []
            values = batch.values[row, channel].numpy()
            for begin in range(0, len(fresh), _FRAMES_AT_ONCE):
                chosen = fresh[begin : begin + _FRAMES_AT_ONCE]
                courses.append(parcels.means(values[chosen]))
            if courses:
                sums.add(np.concatenate(courses))
    if number >= 0:
        yield clips.runs[number], sums
