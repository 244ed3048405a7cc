"""Windows of our datasets through the public API."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from tools.stream_peers.cases import PLACED, Case, Stream
from tools.stream_peers.data import Facts, Sample, name_of

BATCH = 4  # windows: 290 MB where they are placed as float32
# Arguments of the loader that make it deliver each output as float16 itself. Empty: this release delivers float32,
# packed, and what is left is done here, in the time that is measured.
LOADER_OPTIONS: dict[str, dict[str, Any]] = {"masked": {}, "placed": {}}


def ours(facts: Facts, case: Case) -> Stream:
    """`StreamingDataset` and `StreamingLoader`."""
    return streaming(facts, case, url=facts.where(case.layout), threads=case.threads, batch=batch_of(case), ahead=2)


def batch_of(case: Case) -> int:
    """Windows of a batch: one for each that is in flight, of remote cases, up to twice as many as of local ones."""
    return BATCH if case.in_flight == 1 else min(case.in_flight, 2 * BATCH)


def streaming(facts: Facts, case: Case, *, url: str, threads: int, batch: int, ahead: int) -> Stream:
    """A loader for each round, over a dataset that stays open."""
    import torch

    import fmristream

    torch.set_num_threads(case.threads)
    dataset = fmristream.open(url)
    runs = {name_of(run): run for run in range(facts.runs)}
    shape = facts.shape if case.output == PLACED else (int(facts.mask.sum()),)

    def stream(number: int) -> Iterator[Sample]:
        ring = torch.empty((batch, facts.window, *shape), dtype=torch.float16)
        clips = fmristream.StreamingDataset(dataset, window=facts.window, stride=1, seed=number)
        options = {"batch_size": batch, "threads": threads, "prefetch_batches": ahead, **LOADER_OPTIONS[case.output]}
        with fmristream.StreamingLoader(clips, **options) as loader:
            for _ in count():
                for one in loader:
                    where = list(zip(one.run, one.start.tolist(), strict=True))
                    values = delivered(one, case.output, ring)
                    del one  # its memory is lent again
                    for row, (run, start) in enumerate(where):
                        yield runs[run], start, values[row]

    return stream


def delivered(batch: Any, output: str, ring: Any) -> Any:
    """(b, t, v) or (b, t, x, y, z) float16 of a batch: its own, or copied into a buffer that is used again."""
    import torch

    if output == PLACED:
        values = batch.to("cpu").bold[:, 0].movedim(-1, 1)
    else:
        values = batch.packed[:, 0] if batch.packed.ndim == 4 else batch.packed
    return values if values.dtype == torch.float16 else ring.copy_(values)


def voxel_scale(moments: Any) -> tuple[np.ndarray, np.ndarray]:
    """(delta, 1 / SD) float32 of a run's stored moments; 0 where a voxel never changes."""
    delta, sd = np.asarray(moments).astype(np.float32)
    return delta, np.divide(1, sd, out=np.zeros_like(sd), where=sd > 0)


class Normalizer:
    """Residuals as z-scores, with our kernels and buffers, for whoever reads them by other means.

    Args:
        facts: of the data.
        moments: (2, v) of each run.
        output: `masked` or `placed`.
    """

    def __init__(self, facts: Facts, moments: list[Any], output: str) -> None:
        import torch

        self._scales = [voxel_scale(one) for one in moments]
        voxels = len(self._scales[0][0])
        self._packed = np.empty((facts.window, voxels), dtype=np.float32)
        self._positions = np.flatnonzero(facts.mask.reshape(-1)) if output == PLACED else None
        shape = facts.shape if output == PLACED else (voxels,)
        self._placed = np.zeros((facts.window, int(np.prod(shape))), dtype=np.float32)
        self._ring = torch.empty((facts.window, *shape), dtype=torch.float16)

    def __call__(self, residual: np.ndarray, run: int) -> Any:
        """(t, v) or (t, x, y, z) float16, in a buffer that the next call uses again."""
        import torch

        from fmristream.signal import kernels

        delta, inverse = self._scales[run]
        kernels.normalize_voxelwise(residual, delta, inverse, self._packed)
        if self._positions is None:
            return self._ring.copy_(torch.from_numpy(self._packed))
        kernels.place(self._packed, self._positions, self._placed)
        return self._ring.copy_(torch.from_numpy(self._placed).view(self._ring.shape))
