"""What is stored beside the voxels of a run, computed again from them: parcel series and sketch; tables are read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.report.findings import Findings
from fmristream.shards.dataset import Dataset
from fmristream.shards.parcels import robust_name
from fmristream.shards.run_reader import RunReader
from fmristream.shards.side import (
    CONFOUNDS,
    EVENTS,
    parcel_spaces_of,
    read_parcel_space,
    read_sketch,
    read_small_array,
    read_table,
    recordings_of,
)
from fmristream.signal.parcellate import ParcelSeries, robust_statistics
from fmristream.signal.sketch import RunSketch, Sketch

# Sums of float32 weights and values, added in one order; another compiler may contract them.
_TOLERANCE = 1e-5
# Share of signs next to zero that may fall otherwise where a library adds up in another order.
_OTHER_SIGNS = 0.005


class BesideCheck:
    """Takes the stored frames of a run, then compares.

    Raises:
        CorruptDataError: a space of parcels is not what was committed.
    """

    def __init__(self, dataset: Dataset, reader: RunReader) -> None:
        run = reader.run
        self._reader = reader
        self._series: dict[str, tuple[str, ParcelSeries]] = {}
        self._misfits: list[str] = []
        for name, digest in parcel_spaces_of(dataset, reader).items():
            space = read_parcel_space(dataset, digest)
            if space.of != run.space_digest or space.weights.voxels.max(initial=-1) >= run.voxels:
                self._misfits.append(name)  # the loop over its weights would leave the frame
                continue
            self._series[name] = robust_name(space.atlas), ParcelSeries(space.weights, frames=run.frames)
        stored = read_sketch(reader)
        self._stored_sketch = None if stored is None else Sketch.decode(stored)
        space_of_run = None if stored is None else dataset.space(run)
        self._sketch = (
            None if space_of_run is None else RunSketch(space_of_run.grid, space_of_run.mask, frames=run.frames)
        )

    def add(self, values: NDArray[Any]) -> None:
        """Count one frame, (v,) stored values."""
        for _, series in self._series.values():
            series.add(values)
        if self._sketch is not None:
            self._sketch.add(values)

    def compare(self, found: Findings) -> None:
        """Tell what differs, and read the tables."""
        run = self._reader.run
        for name in self._misfits:
            found.fault(f"{name} is made of other voxels than the run has", run=run.name)
        for name, (robust, series) in self._series.items():
            expected = series.finish()
            if not _is_close(read_small_array(self._reader, name), expected):
                found.fault(f"the stored {name} are not those of its stored values", run=run.name)
            if not _is_close(read_small_array(self._reader, robust), robust_statistics(expected)):
                found.fault(f"the stored {robust} are not those of its parcels", run=run.name)
        if self._sketch is not None and self._stored_sketch is not None:
            self._compare_sketch(self._sketch.finish(), self._stored_sketch, found)
        for name in (CONFOUNDS, EVENTS, *recordings_of(self._reader)):
            table = read_table(self._reader, name)
            is_by_frame = name == CONFOUNDS or (name != EVENTS and table is not None and not table.facts)
            if is_by_frame and table is not None and table.rows != run.frames:
                found.fault(f"its {name} have {table.rows} rows, the run {run.frames} frames", run=run.name)

    def _compare_sketch(self, made: Sketch, stored: Sketch, found: Findings) -> None:
        same_shape = made.signs.shape == stored.signs.shape and made.origin == stored.origin
        other_signs = same_shape and (made.signs != stored.signs).sum() > _OTHER_SIGNS * made.signs.size
        if not (same_shape and not other_signs and np.abs(made.image.astype(int) - stored.image).max() <= 1):
            found.fault("the stored sketch is not that of its stored values", run=self._reader.run.name)


def _is_close(stored: NDArray[Any], expected: NDArray[Any]) -> bool:
    if stored.shape != expected.shape:
        return False
    gap = np.abs(stored.astype(np.float64) - expected)
    scale = np.nan_to_num(np.abs(expected)).max(axis=0) if len(expected) else 0.0
    return bool(((gap <= _TOLERANCE * scale) | (np.isnan(stored) & np.isnan(expected))).all())
