"""Loops of the recipes that numpy would make several passes of. Sums go frame by frame, whoever calls in which blocks."""

from typing import Any

import numba
import numpy as np

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")

# Voxels worked on at a time: a block's coefficients stay in the second-level cache while frames go by.
BLOCK = 1024


@_jit
def accumulate(
    values: Any, rows: Any, shift: Any, count: Any, sums: Any, squares: Any, products: Any, known: Any, has_missing: bool
) -> None:  # fmt: skip
    """Add frames to per-voxel sums of x = value - shift over what is finite.

    Args:
        values: (t, v) float64.
        rows: (t, k) float64, a design's rows of these frames.
        shift: (v,) float64.
        count: (v,) int64, finite values so far.
        sums: (v,) float64.
        squares: (v,) float64.
        products: (k, v) float64, sums of row x value.
        known: (k, v) float64 where has_missing: sums of rows of finite values.
        has_missing: whether values may be NaN or infinite.
    """
    shifted = np.empty((4, BLOCK))
    for start in range(0, values.shape[1], BLOCK):
        stop = min(start + BLOCK, values.shape[1])
        for t in range(values.shape[0]):
            for v in range(start, stop):
                x = values[t, v] - shift[v]
                if x - x == 0:
                    count[v] += 1
                    sums[v] += x
                    squares[v] += x * x
        if has_missing:
            _accumulate_known(values, rows, shift, products, known, start, stop)
            continue
        for first in range(0, values.shape[0], 4):
            frames = min(4, values.shape[0] - first)
            for t in range(frames):
                for v in range(start, stop):
                    shifted[t, v - start] = values[first + t, v] - shift[v]
            _accumulate_four(shifted, rows[first : first + frames], products, start, stop)


@_jit
def _accumulate_known(values: Any, rows: Any, shift: Any, products: Any, known: Any, start: int, stop: int) -> None:
    for t in range(values.shape[0]):
        for k in range(rows.shape[1]):
            row = rows[t, k]
            for v in range(start, stop):
                x = values[t, v] - shift[v]
                if x - x == 0:
                    products[k, v] += row * x
                    known[k, v] += row


@_jit
def _accumulate_four(x: Any, rows: Any, products: Any, start: int, stop: int) -> None:
    """Up to four frames, added one after the other while the sum is in a register."""
    for k in range(rows.shape[1]):
        here = products[k, start:stop]
        if rows.shape[0] == 4:
            a, b, c, d = rows[0, k], rows[1, k], rows[2, k], rows[3, k]
            for j in range(here.size):
                here[j] = (((here[j] + a * x[0, j]) + b * x[1, j]) + c * x[2, j]) + d * x[3, j]
        else:
            for t in range(rows.shape[0]):
                for j in range(here.size):
                    here[j] += rows[t, k] * x[t, j]


@_jit
def apply_linear(values: Any, center: Any, gain: Any, rows: Any, coefficients: Any) -> None:
    """values[t, v] = (values[t, v] - center[v]) x gain[v] + sum over k of rows[t, k] x coefficients[k, v], in place.

    Where the gain is 0 and so are the coefficients, the result is exactly 0 for finite values.
    """
    columns = rows.shape[1]
    fours = columns // 4 * 4
    for start in range(0, values.shape[1], BLOCK):
        stop = min(start + BLOCK, values.shape[1])
        for t in range(values.shape[0]):
            here = values[t, start:stop]
            centers, gains = center[start:stop], gain[start:stop]
            for j in range(here.size):
                here[j] = (here[j] - centers[j]) * gains[j]
            for k in range(0, fours, 4):
                a, b, c, d = rows[t, k], rows[t, k + 1], rows[t, k + 2], rows[t, k + 3]
                one, two = coefficients[k, start:stop], coefficients[k + 1, start:stop]
                three, four = coefficients[k + 2, start:stop], coefficients[k + 3, start:stop]
                for j in range(here.size):
                    here[j] = (((here[j] + a * one[j]) + b * two[j]) + c * three[j]) + d * four[j]
            for k in range(fours, columns):
                row, one = rows[t, k], coefficients[k, start:stop]
                for j in range(here.size):
                    here[j] += row * one[j]


@_jit
def weighted_means(values: Any, indptr: Any, voxels: Any, weights: Any, means: Any) -> None:
    """means[t, p] = weighted mean of the finite values of parcel p, NaN where there is none; values is (t, v) float64."""
    for t in range(values.shape[0]):
        for parcel in range(means.shape[1]):
            total = 0.0
            weight = 0.0
            for k in range(indptr[parcel], indptr[parcel + 1]):
                value = values[t, voxels[k]]
                if value - value == 0:
                    total += np.float64(weights[k]) * value
                    weight += np.float64(weights[k])
            means[t, parcel] = total / weight if weight > 0 else np.nan
