"""The loops that numpy would make several passes of: compiled by numba, cached on disk, one thread each, without the GIL."""

from typing import Any

import numba
import numpy as np

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_jit
def gather(volume: Any, positions: Any, values: Any) -> None:
    """values[v] = volume[positions[v]]; volume is flat."""
    for v in range(positions.size):
        values[v] = volume[positions[v]]


@_jit
def measure_small_integers(
    values: Any, reference: Any, residual: Any, sums: Any, squares: Any,
    background: Any, has_background: bool, shift: int, largest: int,
) -> Any:  # fmt: skip
    """8- and 16-bit integers: everything is summed exactly in int64."""
    count = np.int64(0)
    total = np.int64(0)
    total_squares = np.int64(0)
    low = np.int64(2**62)
    high = np.int64(-(2**62))
    wraps: Any = False
    for v in range(values.size):
        value = np.int64(values[v])
        difference = value - np.int64(reference[v])
        residual[v] = difference
        wraps = wraps or difference > largest or difference < -largest - 1
        sums[v] += difference
        squares[v] += difference * difference
        if not (has_background and values[v] == background):
            count += 1
            total += value - shift
            total_squares += (value - shift) * (value - shift)
            low = min(low, value)
            high = max(high, value)
    return count, total, total_squares, low, high, wraps


@_jit
def measure_large_integers(
    values: Any, reference: Any, residual: Any, sums: Any, squares: Any,
    background: Any, has_background: bool, shift: float, largest: int,
) -> Any:  # fmt: skip
    """32- and 64-bit integers: residuals wrap in the dtype, sums are float64."""
    count = np.int64(0)
    total = 0.0
    total_squares = 0.0
    low = np.inf
    high = -np.inf
    wraps: Any = False
    for v in range(values.size):
        wrapped = values[v] - reference[v]
        residual[v] = wrapped
        # Subtracted as integers: float64 would lose small differences of large 64-bit values.
        signed = np.int64(wrapped)
        difference = np.float64(signed)
        if values[v] >= reference[v] and signed < 0:
            difference += 2.0**64
            wraps = True
        elif values[v] < reference[v] and signed >= 0:
            difference -= 2.0**64
            wraps = True
        wraps = wraps or signed > largest or signed < -largest - 1
        value = np.float64(values[v])
        sums[v] += difference
        squares[v] += difference * difference
        if not (has_background and values[v] == background):
            count += 1
            total += value - shift
            total_squares += (value - shift) * (value - shift)
            low = min(low, value)
            high = max(high, value)
    return count, total, total_squares, low, high, wraps


@_jit
def measure_floats(
    values: Any, reference: Any, sums: Any, squares: Any, counts: Any,
    background: Any, has_background: bool, shift: float,
) -> Any:  # fmt: skip
    """Floats: finite values only, sums in float64 about the reference."""
    count = np.int64(0)
    total = 0.0
    total_squares = 0.0
    low = np.inf
    high = -np.inf
    nonfinite = np.int64(0)
    for v in range(values.size):
        value = np.float64(values[v])
        if not np.isfinite(value):
            nonfinite += 1
            continue
        difference = value - reference[v]
        sums[v] += difference
        squares[v] += difference * difference
        counts[v] += 1
        if not (has_background and values[v] == background):
            count += 1
            total += value - shift
            total_squares += (value - shift) * (value - shift)
            low = min(low, value)
            high = max(high, value)
    return count, total, total_squares, low, high, nonfinite


@_jit
def normalize_voxelwise(frames: Any, delta: Any, inverse_sd: Any, packed: Any) -> None:
    """packed[t, v] = (frames[t, v] - delta[v]) x inverse_sd[v]; not finite -> 0."""
    for t in range(packed.shape[0]):
        for v in range(packed.shape[1]):
            z = (frames[t, v] - delta[v]) * inverse_sd[v]
            packed[t, v] = z if np.isfinite(z) else 0.0


@_jit
def normalize_globally(
    frames: Any, scale: float, offset: float, background: Any, has_background: bool, fill: float, packed: Any
) -> None:
    """packed[t, v] = frames[t, v] x scale + offset; the background value and what is not finite -> fill."""
    for t in range(packed.shape[0]):
        for v in range(packed.shape[1]):
            z = np.float64(frames[t, v]) * scale + offset
            if not np.isfinite(z) or (has_background and frames[t, v] == background):
                packed[t, v] = fill
            else:
                packed[t, v] = z


@_jit
def add_reference(residual: Any, reference: Any, values: Any) -> None:
    """values[t, v] = residual[t, v] + reference[v], wrapping in the dtype they share."""
    for t in range(values.shape[0]):
        for v in range(values.shape[1]):
            values[t, v] = residual[t, v] + reference[v]


@_jit
def place(packed: Any, positions: Any, grid: Any) -> None:
    """grid[t, positions[v]] = packed[t, v] where the position is not negative; grid is (t, x*y*z)."""
    for t in range(packed.shape[0]):
        for v in range(packed.shape[1]):
            position = positions[v]
            if position >= 0:
                grid[t, position] = packed[t, v]
