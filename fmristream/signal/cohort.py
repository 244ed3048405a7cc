"""Statistics of a whole cohort, fed block by block in bounded memory: moments, ranges, quantiles, principal components."""

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError

Arrays = dict[str, NDArray[np.float64]]
Block = NDArray[np.float32]  # (t, v)

# Up to so many values a frame the covariance itself is kept (32 MB); beyond, a sketch of it.
_EXACT_PCA = 2048
# Bins of a histogram below which a quantile is worth nothing.
_MIN_BINS = 64


class Accumulator(Protocol):
    """Takes frames, then says what came of them."""

    def add(self, numbers: NDArray[np.int64], values: Block) -> None:
        """Count frames: their numbers in their run, and (t, v) values."""
        ...

    def finish(self) -> Arrays:
        """The statistics."""
        ...


class Moments:
    """Mean and population SD of each value over all frames; exact but for rounding."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._mean, self._squares = np.zeros(width), np.zeros(width)

    def add(self, numbers: NDArray[np.int64], values: Block) -> None:
        """Merged block by block (Chan et al. 1979): nothing large is subtracted from anything large."""
        wide = values.astype(np.float64)
        mean = wide.mean(axis=0)
        difference, total = mean - self._mean, self._count + len(wide)
        self._squares += ((wide - mean) ** 2).sum(axis=0) + difference**2 * (self._count * len(wide) / total)
        self._mean += difference * (len(wide) / total)
        self._count = total

    def finish(self) -> Arrays:
        """`mean` and `sd`, (v,)."""
        return {"mean": self._mean, "sd": np.sqrt(self._squares / max(self._count, 1))}


class Ranges:
    """Smallest and largest value: of all (`range`), of each voxel (`voxel-range`), of each frame number (`frame-range`)."""

    def __init__(self, width: int, *, kind: str, frames: int) -> None:
        self._kind = kind
        size = {"range": 1, "voxel-range": width, "frame-range": frames}[kind]
        self._low, self._high = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, numbers: NDArray[np.int64], values: Block) -> None:
        """Exact."""
        where: Any = numbers if self._kind == "frame-range" else slice(None)
        axis = {"range": None, "voxel-range": 0, "frame-range": 1}[self._kind]
        self._low[where] = np.minimum(self._low[where], values.min(axis=axis))
        self._high[where] = np.maximum(self._high[where], values.max(axis=axis))

    def finish(self) -> Arrays:
        """`low` and `high`."""
        return {"low": self._low, "high": self._high}


class Quantiles:
    """Median, and interquartile range over values that are not exactly 0, of each column.

    Exact while all values fit; from then on a histogram for each column, whose bins double in width when a value lies
    outside: then `error` says how far each number can be off at most.

    Args:
        width: columns.
        max_bytes: what values, and then histograms, may take.

    Raises:
        UsageError: so many columns leave too few bins.
    """

    def __init__(self, width: int, *, max_bytes: int) -> None:
        # Values and histograms are both there for a moment; bins are of 4 bytes, as values are.
        self._bins = min(2**16, max_bytes // (8 * width)) // 2 * 2
        self._capacity = max_bytes // (8 * width)
        if self._bins < _MIN_BINS:
            raise UsageError(
                f"quantiles of {width} values a frame in {max_bytes / 1e6:.0f} MB leave {self._bins} bins for each, expected "
                f"{_MIN_BINS}; give max_bytes={8 * _MIN_BINS * width} or more, or reduce first (parcels | ...)"
            )
        self._width = width
        self._kept: list[Block] = []
        self._count = 0
        self._histogram: _Histograms | None = None

    def add(self, numbers: NDArray[np.int64], values: Block) -> None:
        """Keep values, or count them."""
        self._count += len(values)
        if self._histogram is None and self._count <= self._capacity:
            self._kept.append(values.copy())
            return
        if self._histogram is None:
            self._histogram = _Histograms(self._kept or [values], self._bins, width=self._width)
            for block in self._kept:
                self._histogram.add(block)
            self._kept = []
        self._histogram.add(values)

    def finish(self) -> Arrays:
        """`median`, `iqr` (NaN where all is 0) and `error`, (v,)."""
        if self._histogram is not None:
            return self._histogram.finish()
        median, iqr = np.zeros(self._width), np.full(self._width, np.nan)
        for column in range(self._width if self._kept else 0):  # all at once would be twice the memory again
            values = np.concatenate([block[:, column] for block in self._kept]).astype(np.float64)
            median[column] = np.median(values)
            some = values[values != 0]
            if len(some):
                low, high = np.percentile(some, (25, 75))
                iqr[column] = high - low
        return {"median": median, "iqr": iqr, "error": np.zeros(self._width)}


class _Histograms:
    """One histogram a column; zeros are counted apart."""

    def __init__(self, first: list[Block], bins: int, *, width: int) -> None:
        low = np.minimum.reduce([block.min(axis=0) for block in first]).astype(np.float64)
        high = np.maximum.reduce([block.max(axis=0) for block in first]).astype(np.float64)
        spread = np.where(high > low, high - low, np.maximum(np.abs(low), 1.0))
        self._bins = bins
        # The values so far in the middle half, widths as powers of two: bins of doubled width begin where others did.
        self._step = np.exp2(np.ceil(np.log2(spread / (bins / 2))))
        self._start = np.floor(low / self._step - bins / 4) * self._step
        self._counts = np.zeros((width, bins), dtype=np.uint32)
        self._zeros = np.zeros(width, dtype=np.int64)

    def add(self, values: Block) -> None:
        wide = values.astype(np.float64)
        self._zeros += (wide == 0).sum(axis=0)
        for side in (wide.min(axis=0), wide.max(axis=0)):
            self._widen(side)
        places = np.floor((wide - self._start) / self._step).astype(np.int64)
        np.clip(places, 0, self._bins - 1, out=places)
        counted = wide != 0
        columns = np.broadcast_to(np.arange(wide.shape[1]), wide.shape)
        np.add.at(self._counts, (columns[counted], places[counted]), 1)

    def _widen(self, values: NDArray[np.float64]) -> None:
        """Double bins until a value of each column lies inside."""
        while True:
            below = values < self._start
            outside = below | (values >= self._start + self._step * self._bins)
            if not outside.any():
                return
            pairs = self._counts[outside].reshape(-1, self._bins // 2, 2).sum(axis=2, dtype=np.uint32)
            merged = np.zeros((len(pairs), self._bins), dtype=np.uint32)
            is_below = below[outside]
            half = self._bins // 2
            merged[~is_below, :half] = pairs[~is_below]
            merged[is_below, half:] = pairs[is_below]
            self._counts[outside] = merged
            self._start[below] -= self._step[below] * self._bins
            self._step[outside] *= 2

    def finish(self) -> Arrays:
        found = [self._of(column) for column in range(len(self._counts))]
        median, iqr = np.array(found).T
        return {"median": median, "iqr": iqr, "error": 2 * self._step}  # a quartile is off by a bin at most

    def _of(self, column: int) -> tuple[float, float]:
        counts = self._counts[column].astype(np.int64)
        start, step = float(self._start[column]), float(self._step[column])
        quartiles = [_quantile(counts, q, start, step) for q in (0.25, 0.75)]
        zeros = int(self._zeros[column])
        if not counts.sum():
            return 0.0, math.nan
        # Zeros are values of the median: they lie in the bin of 0, or beyond all others.
        below = counts[: max(0, min(self._bins, math.floor(-start / step)))].sum()
        rank = 0.5 * (counts.sum() + zeros - 1)
        if below <= rank <= below + zeros - 1:
            return 0.0, quartiles[1] - quartiles[0]
        share = (rank if rank < below else rank - zeros) / max(counts.sum() - 1, 1)
        return _quantile(counts, share, start, step), quartiles[1] - quartiles[0]


def _quantile(counts: NDArray[np.int64], share: float, start: float, step: float) -> float:
    """Linear within a bin; never farther from the true one than the bin is wide."""
    total = counts.sum()
    if not total:
        return math.nan
    rank = share * (total - 1)
    ends = np.cumsum(counts)
    place = int(np.searchsorted(ends, rank, side="right"))
    before = ends[place] - counts[place]
    return float(start + step * (place + (rank - before + 0.5) / counts[place]))


class Components:
    """The first k principal components of frames.

    Up to 2,048 values a frame by their covariance; beyond by a sketch of it (Nyström with 2k + 16 random signs, one pass):
    its error falls with the spectrum, `variance` over `total` says how much the components hold.
    """

    def __init__(self, width: int, *, components: int) -> None:
        if components > width:
            raise UsageError(f"pca:{components}: a frame has {width} values only; ask for fewer components")
        self._components = components
        self._is_exact = width <= _EXACT_PCA
        size = width if self._is_exact else min(width, 2 * components + 16)
        self._test = np.eye(0) if self._is_exact else _signs(width, size)
        self._products = np.zeros((width, size))
        self._shift: Any = None
        self._count, self._power = 0, 0.0
        self._sum = np.zeros(width)

    def add(self, numbers: NDArray[np.int64], values: Block) -> None:
        """Sums around the first frame."""
        wide = values.astype(np.float64)
        if self._shift is None:
            self._shift = wide[0].copy()
        wide -= self._shift
        self._count += len(wide)
        self._sum += wide.sum(axis=0)
        self._power += float((wide**2).sum())
        self._products += wide.T @ (wide if self._is_exact else wide @ self._test)

    def finish(self) -> Arrays:
        """`mean` (v,), `components` (k, v) with unit length, `variance` (k,), `total` (1,) variance of all values."""
        if self._count < 2:
            raise UsageError(f"pca: {self._count} frames were given; fit it to more")
        mean = self._sum / self._count
        total = (self._power - self._count * float(mean @ mean)) / (self._count - 1)
        if self._is_exact:
            covariance = (self._products - self._count * np.outer(mean, mean)) / (self._count - 1)
            values, vectors = np.linalg.eigh(covariance)
            values, vectors = values[::-1], vectors[:, ::-1]
        else:
            sketch = (self._products - self._count * np.outer(mean, mean @ self._test)) / (self._count - 1)
            values, vectors = _nystroem(sketch, self._test)
        chosen = vectors[:, : self._components].T
        largest = np.abs(chosen).argmax(axis=1)
        chosen = chosen * np.sign(chosen[np.arange(len(chosen)), largest])[:, None]
        return {
            "mean": mean + (0 if self._shift is None else self._shift),
            "components": np.ascontiguousarray(chosen),
            "variance": np.maximum(values[: self._components], 0.0),
            "total": np.array([total]),
        }


def _nystroem(sketch: NDArray[np.float64], test: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(eigenvalues falling, eigenvectors) of a covariance from its products with test vectors (Tropp et al. 2017)."""
    shift = np.sqrt(len(sketch)) * np.finfo(np.float64).eps * np.linalg.norm(sketch)
    moved = sketch + shift * test
    middle = test.T @ moved
    values, vectors = np.linalg.eigh((middle + middle.T) / 2)
    kept = values > values[-1] * 1e-14
    half = moved @ (vectors[:, kept] / np.sqrt(values[kept]))
    left, sizes, _ = np.linalg.svd(half, full_matrices=False)
    return np.maximum(sizes**2 - shift, 0.0), left


def _signs(rows: int, columns: int) -> NDArray[np.float64]:
    """(rows, columns) of -1 and 1, the same on every machine: a bit of splitmix64 of the place."""
    x = np.arange(1, rows * columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return (((x >> np.uint64(40)) & np.uint64(1)).astype(np.float64) * 2 - 1).reshape(rows, columns)
