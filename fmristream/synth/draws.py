"""Random numbers that depend on a key alone: not on the process, the cohort's size or the order of calls."""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
# Whatever went through exp, sin or an FFT may differ in its last bit between processors. It is rounded to this grid
# before it meets the samples, so that the samples don't.
SETTLED_STEP = 2.0**-16


class Purpose(IntEnum):
    """What a stream of draws is for; streams of different purposes are independent."""

    SEX = 1
    AGE = 2
    ANATOMY = 3
    COURSES = 4
    NOISE = 5


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """The generator of one purpose and key (a subject, a run)."""
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(int(purpose), *key))
    return np.random.Generator(np.random.PCG64(sequence))


def settle(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Values on a grid of 2^-16, where two machines agree."""
    rounded: npt.NDArray[np.float64] = np.rint(values / SETTLED_STEP) * SETTLED_STEP
    return rounded.astype(np.float32)
