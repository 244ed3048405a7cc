"""The Dummy cohort of the published trainers: plain noise of any shape, to try a pipeline at full size."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fmristream.synth.bold import RunKey
from fmristream.synth.draws import Purpose, generator

# Integer types hold noise of this mean and SD; floats hold mean 0 and SD 1, as published.
STORED_MEAN, STORED_SD = 10_000, 1_000


def dummy_frames(
    key: RunKey, *, shape: tuple[int, int, int], frames: int, dtype: np.dtype[Any]
) -> Iterator[npt.NDArray[Any]]:
    """Frames (x, y, z) in Fortran order."""
    rng = generator(key.seed, Purpose.NOISE, key.subject, key.run)
    for _ in range(frames):
        noise = rng.standard_normal(shape[::-1], dtype=np.float32)
        stored = noise if dtype.kind == "f" else np.rint(noise * STORED_SD + STORED_MEAN)
        yield stored.astype(dtype, copy=False).T
