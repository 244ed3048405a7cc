"""What stored values become before the first step that has to compute something: the signal, or what is known already."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.signal.normalize import prepare, recipe
from fmristream.signal.prepared import Layout, RecipeSource

# Of float64 values that a pass over a run holds at a time.
_BLOCK_BYTES = 16 * 2**20


class Head(Protocol):
    """Stored frames to float64."""

    @property
    def layout(self) -> Layout: ...

    @property
    def voxels(self) -> int: ...

    @property
    def fill(self) -> NDArray[np.float64]:
        """(1,) what stands outside the mask."""
        ...

    @property
    def needs_frames(self) -> bool: ...

    def values(self, stored: NDArray[Any], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """(t, v), a new array; `stored` are residuals where the run has a reference, and may be overwritten."""
        ...


class Signal:
    """The signal in its units, at full precision."""

    needs_frames = True

    def __init__(self, source: RecipeSource) -> None:
        self._source = source
        self.fill = np.zeros(1)

    @property
    def layout(self) -> Layout:
        """As stored."""
        return self._source.layout

    @property
    def voxels(self) -> int:
        """As stored."""
        return self._source.run.voxels

    def values(self, stored: NDArray[Any], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Reference added in the stored dtype, then scaled."""
        if self._source.is_difference:
            with np.errstate(over="ignore"):  # residuals wrap
                stored = stored + self._source.reference
        run = self._source.run
        values = stored.astype(np.float64)
        if run.slope != 1:
            values *= run.slope
        if run.inter != 0:
            values += run.inter
        return values


class Normalized:
    """A normalisation by statistics that are stored with the run."""

    needs_frames = True

    def __init__(self, name: str, source: RecipeSource, *, exact: bool) -> None:
        self._source = source
        self._prepared = prepare(recipe(name), source, exact=exact)
        self.fill = self._prepared.fill.astype(np.float64)

    @property
    def layout(self) -> Layout:
        """As stored."""
        return self._source.layout

    @property
    def voxels(self) -> int:
        """As stored."""
        return self._source.run.voxels

    def write(self, stored: NDArray[Any], frames: range, out: NDArray[np.float32]) -> None:
        """Straight to float32, (1, t, v)."""
        self._prepared(stored, frames, out)

    def values(self, stored: NDArray[Any], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """What the normalisation gives, float32 in float64."""
        out = np.empty((1, *stored.shape), dtype=np.float32)
        self._prepared(stored, range(0, len(numbers)), out)  # it looks at no frame's number
        values: NDArray[np.float64] = out[0].astype(np.float64)
        return values


class Series:
    """Parcels' series that are stored with the run: no voxel is read.

    Args:
        series: (t, p) float64, scaled.
    """

    needs_frames = False

    def __init__(self, series: NDArray[np.float64]) -> None:
        self._series = series
        self.layout = Layout(voxels=series.shape[1])
        self.voxels = series.shape[1]
        self.fill = np.zeros(1)

    def values(self, stored: NDArray[Any], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """The frames' rows."""
        rows: NDArray[np.float64] = self._series[numbers]
        return rows


def head_blocks(
    head: Head, source: RecipeSource, numbers: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Frames of a run in order, some at a time, read anew: (numbers, (t, v) float64)."""
    run = source.run
    step = max(1, _BLOCK_BYTES // (8 * max(1, run.voxels if head.needs_frames else head.voxels)))
    for start in range(0, run.frames, step):
        here = numbers[(numbers >= start) & (numbers < start + step)]
        if not len(here):
            continue
        if not head.needs_frames:
            yield here, head.values(np.empty((len(here), 0)), here)
            continue
        first, stop = int(here[0]), int(here[-1]) + 1
        stored = source.read_stored(first, stop)[here - first]
        if source.is_difference:
            with np.errstate(over="ignore"):
                stored = stored - source.reference
        yield here, head.values(stored, here)
