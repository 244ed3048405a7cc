"""One window of frames, from bytes to normalised in-mask values: fetch, check, decode, normalise. numpy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.sampling.clip import Clip
from fmristream.shards.dataset import Dataset
from fmristream.signal.normalize import Normalization, prepare
from fmristream.signal.prepared import Prepared


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

    def prepared(self, run: Run) -> Prepared:
        """The normalisation made ready for a run.

        Raises:
            CorruptDataError: the run cannot be normalised.
        """
        return prepare(self.normalization, self.dataset.reader(run), exact=self.exact)

    def read(self, run: Run, clip: Clip, packed: NDArray[np.float32], scratch: "Scratch") -> None:
        """Fill `packed` (c, t, v) with the clip's frames of a run.

        Raises:
            CorruptDataError: stored bytes have changed, or the run cannot be normalised.
            ObjectMissingError: an object of the run is gone.
        """
        reader = self.dataset.reader(run)
        frames = scratch.frames(clip.stop - clip.start, reader.padded_voxels, run.numpy_dtype)
        stored = reader.read_chunks(clip.start, clip.stop, frames)[:: clip.step, : run.voxels]
        self.prepared(run)(stored, clip.frames, packed)


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
