"""Whether a reader delivers what it is measured for: the z-scores of the window that it names."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.stream_peers.cases import MASKED, Case
from tools.stream_peers.data import TFF_CROP, Facts, Sample

CHECKED = 3  # windows of each case, before it is timed

# Largest differences of z: moments as float16 (5e-4 of z), z as float16 (5e-4 of z), |z| up to 6; int8's own bound is .025 SD.
TOLERANCE = 0.008
TOLERANCE_INT8 = 0.035


def require_equal(facts: Facts, case: Case, sample: Sample) -> None:
    """The sample is right, or a sentence says what is wrong with it.

    Raises:
        ValueError: shape, dtype or values differ.
    """
    if case.peer.startswith("ceilings:"):
        return  # they deliver nothing
    run, start, values = sample
    found, wanted = in_order(np.asarray(values)), expected(facts, case, run, start)
    dtype = np.float32 if case.output == "TFF" else np.float16
    if found.shape != wanted.shape or found.dtype != dtype:
        raise ValueError(f"it delivers {found.shape} {found.dtype}, expected {wanted.shape} {np.dtype(dtype)}")
    difference = float(np.abs(found - wanted).max())
    if not difference <= (TOLERANCE_INT8 if case.variant == "int8" else TOLERANCE):
        raise ValueError(f"its window of run {run} from frame {start} is off by up to {difference:.3g} SD")


def in_order(values: NDArray[Any]) -> NDArray[Any]:
    """(t, x, y, z) or (t, v) of what a peer delivers; of two channels the one that is z-scored by voxel."""
    return np.moveaxis(values[-1], -1, 0) if values.ndim == 5 else values


def expected(facts: Facts, case: Case, run: int, start: int) -> NDArray[np.float64]:
    """The z-scores, from the file itself, in double precision."""
    stored = np.asarray(facts.stored(run)[start : start + facts.window], dtype=np.float64)
    mean, inverse = (values.astype(np.float64) for values in facts.moments(run))
    z: NDArray[np.float64] = (stored - mean) * inverse
    if case.output == "TFF":
        return z[(slice(None), *TFF_CROP)]
    return z[:, facts.mask] if case.output == MASKED else z
