"""Windows of our datasets through the public API."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from tools.stream_peers.cases import PLACED, Case, Stream
from tools.stream_peers.data import Facts, Sample, name_of

BATCH = 4  # windows: 290 MB where they are placed as float32
# Arguments of the loader that make it deliver each output as float16 itself.
LOADER_OPTIONS: dict[str, dict[str, Any]] = {
    "masked": {"dtype": "float16"},
    "placed": {"dtype": "float16", "output": "placed"},
}


def ours(facts: Facts, case: Case) -> Stream:
    """`StreamingDataset` and `StreamingLoader`."""
    return streaming(facts, case, url=facts.where(case.layout), threads=case.threads, batch=batch_of(case), ahead=2)


def batch_of(case: Case) -> int:
    """Windows of a batch; one, as others give them, where only so many may be in flight."""
    return 1 if case.peer.startswith("remote:") and case.in_flight else BATCH


def streaming(facts: Facts, case: Case, *, url: str, threads: int, batch: int, ahead: int, **more: int) -> Stream:
    """A loader for each round, over a dataset that stays open."""
    import torch

    import fmristream

    torch.set_num_threads(case.threads)
    dataset = fmristream.open(url)
    runs = {name_of(run): run for run in range(facts.runs)}

    def stream(number: int) -> Iterator[Sample]:
        clips = fmristream.StreamingDataset(dataset, window=facts.window, stride=1, seed=number)
        options = {
            "batch_size": batch,
            "threads": threads,
            "prefetch_batches": ahead,
            **LOADER_OPTIONS[case.output],
            **more,
        }
        with fmristream.StreamingLoader(clips, **options) as loader:
            for _ in count():
                for one in loader:
                    where = list(zip(one.run, one.start.tolist(), strict=True))
                    values = delivered(one, case.output)
                    del one  # its memory is lent again
                    for row, (run, start) in enumerate(where):
                        yield runs[run], start, values[row]

    return stream


def delivered(batch: Any, output: str) -> Any:
    """(b, t, v) or (b, t, x, y, z) float16 of a batch."""
    return batch.placed[:, 0] if output == PLACED else batch.packed[:, 0]


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

        from fmristream.signal.grid import stretches_of

        self._scales = [voxel_scale(one) for one in moments]
        voxels = len(self._scales[0][0])
        self._packed = np.empty((facts.window, voxels), dtype=np.uint16)  # bits of float16, which numba has not
        is_placed = output == PLACED
        self._stretches = stretches_of(np.flatnonzero(facts.mask.reshape(-1))) if is_placed else None
        shape = facts.shape if is_placed else (voxels,)
        self._ring = torch.empty((facts.window, *shape), dtype=torch.float16)
        self._bits = self._ring.view(torch.int16).numpy().view(np.uint16).reshape(facts.window, -1)

    def __call__(self, residual: np.ndarray, run: int) -> Any:
        """(t, v) or (t, x, y, z) float16, in a buffer that the next call uses again."""
        from fmristream.signal import read_kernels

        target = self._bits if self._stretches is None else self._packed
        read_kernels.normalize_voxels(np.ascontiguousarray(residual), *self._scales[run], target)
        if self._stretches is not None:
            for frame, placed in zip(self._packed, self._bits, strict=True):
                read_kernels.place(frame, self._stretches, np.uint16(0), placed)
        return self._ring
