"""One window of frames, from bytes to normalised in-mask values: fetch, check, decode, normalise. numpy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.shards.dataset import Dataset
from fmristream.shards.run_reader import RunReader
from fmristream.signal.normalize import Normalization, normalize_globally, normalize_voxelwise, voxel_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowReader:
    """Reads windows of a dataset under one normalisation; any number of threads may use it, each with its own scratch.

    Attributes:
        dataset: where the runs lie.
        normalization: what becomes of the stored values.
        exact: z-score with float32 moments also where float16 ones are stored (another request per run).
    """

    dataset: Dataset
    normalization: Normalization
    exact: bool = False

    def read(self, run: Run, start: int, packed: NDArray[np.float32], scratch: "Scratch") -> None:
        """Fill `packed` (t, v) with frames [start, start + t) of a run.

        Raises:
            CorruptDataError: stored bytes have changed, or the run cannot be normalised.
            ObjectMissingError: an object of the run is gone.
        """
        reader = self.dataset.reader(run)
        frames = scratch.frames(len(packed), reader.padded_voxels, run.numpy_dtype)
        stored = reader.read_chunks(start, start + len(packed), frames)[:, : run.voxels]
        if self.normalization.needs_moments:
            is_half = reader.arrays["moments"].dtype == "<f2"  # nothing is finer than what is stored otherwise
            moments = reader.exact_moments if self.exact and is_half else reader.moments
            delta, inverse = voxel_scale(moments, run)
            normalize_voxelwise(_differences(reader, stored), delta, inverse, packed)
        else:
            if reader.is_difference:
                with np.errstate(over="ignore"):
                    stored += reader.reference
            normalize_globally(self.normalization, run, stored, packed)


class Scratch:
    """Buffers of one thread, reused from window to window: fresh memory costs more than decoding does."""

    def __init__(self) -> None:
        self._buffers: dict[np.dtype[Any], NDArray[Any]] = {}

    def frames(self, count: int, voxels: int, dtype: "np.dtype[Any]") -> NDArray[Any]:
        """A (count, voxels) array whose contents are whatever was there."""
        held = self._buffers.get(dtype)
        if held is None or held.size < count * voxels:
            held = self._buffers[dtype] = np.empty(count * voxels, dtype=dtype)
        return held[: count * voxels].reshape(count, voxels)


def _differences(reader: RunReader, stored: NDArray[Any]) -> NDArray[Any]:
    """Stored values minus reference, as true differences; floats, which have no reference, as they are."""
    if not reader.is_difference:
        return stored
    if not reader.run.residual_wraps:
        # Residuals of unsigned sources wrap below zero; seen as signed they are the differences.
        signed: NDArray[Any] = stored.view(f"i{stored.dtype.itemsize}")
        return signed
    with np.errstate(over="ignore"):
        values = stored + reader.reference
    difference: NDArray[Any] = values.astype(np.float64) - reader.reference.astype(np.float64)
    return difference
