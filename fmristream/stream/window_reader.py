"""One window of frames, from bytes to normalised in-mask values: fetch, check, decode, normalise. numpy only."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.sampling.clip import Clip
from fmristream.shards.dataset import Dataset
from fmristream.signal.prepared import Prepared
from fmristream.signal.recipes import Recipe, prepare
from fmristream.stream.kept import Kept
from fmristream.stream.run_source import RunSource

# Recipes made ready that stay in memory.
PREPARED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowReader:
    """Reads windows of a dataset under one normalisation; any number of threads may use it, each with its own scratch.

    Attributes:
        dataset: where the runs lie.
        recipe: what becomes of the stored values.
        exact: z-score with float32 moments also where float16 ones are stored (another request per run).
    """

    dataset: Dataset
    recipe: Recipe
    exact: bool = False
    _prepared: Kept[Prepared] = field(default_factory=lambda: Kept(PREPARED_BYTES), init=False, repr=False)

    def prepared(self, run: Run) -> Prepared:
        """The recipe made ready for a run; kept while others do not need its place.

        Raises:
            CorruptDataError: the run cannot be normalised.
        """
        return self._prepared.get(
            run.name, lambda: prepare(self.recipe, RunSource(self.dataset, run), exact=self.exact)
        )

    def read(self, run: Run, clip: Clip, packed: NDArray[np.float32], scratch: "Scratch") -> None:
        """Fill `packed` (c, t, v) with the clip's frames of a run.

        Raises:
            CorruptDataError: stored bytes have changed, or the run cannot be normalised.
            ObjectMissingError: an object of the run is gone.
        """
        prepared = self.prepared(run)
        if not prepared.needs_frames:
            prepared(np.empty((clip.length, 0), dtype=run.numpy_dtype), clip.frames, packed)
            return
        reader = self.dataset.reader(run)
        frames = scratch.frames(clip.stop - clip.start, reader.padded_voxels, run.numpy_dtype)
        stored = reader.read_chunks(clip.start, clip.stop, frames)[:: clip.step, : run.voxels]
        prepared(stored, clip.frames, packed)


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
