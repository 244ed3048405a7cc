"""Several streams as one: a table says whose turn it is at each position, for any part of the way the shares are kept."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError

# Entries of the longest table: weights count to four decimals.
MAX_TURNS = 10_000


class Turns:
    """Whose turn it is, repeated for ever.

    At each position it is the turn of the stream that lags most behind its share (largest deficit), the first of them
    where several do: after any number of positions each has had its share, give or take about one.

    Args:
        weights: above 0, relative to each other.

    Raises:
        UsageError: a weight is none, or so small that its stream would never come.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = _quotas(weights)
        self.table = _largest_deficit(self.quotas)
        self._before = np.zeros(len(self.table), dtype=np.int64)  # turns of the same stream before this one
        for source in range(len(self.quotas)):
            mine = self.table == source
            self._before[mine] = np.arange(int(mine.sum()))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(stream, position in that stream) of positions of the whole."""
        rounds, places = np.divmod(positions, len(self.table))
        sources = self.table[places]
        return sources, rounds * self.quotas[sources] + self._before[places]


def _quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Turns of each stream in a table, without a common divisor."""
    given = np.asarray(weights, dtype=np.float64)
    if given.ndim != 1 or not len(given) or not np.isfinite(given).all() or (given <= 0).any():
        raise UsageError(f"weights {list(weights)} of a mixture: expected a number above 0 for each stream")
    exact = given / given.sum() * MAX_TURNS
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(-(exact - quotas), kind="stable")
    quotas[largest[: MAX_TURNS - int(quotas.sum())]] += 1
    if (quotas < 1).any():
        raise UsageError(
            f"weight {given[int(np.argmin(quotas))]:g} of a mixture is less than 1 in {MAX_TURNS} of all; leave the stream out"
        )
    reduced: NDArray[np.int64] = quotas // math.gcd(*quotas.tolist())
    return reduced


def _largest_deficit(quotas: NDArray[np.int64]) -> NDArray[np.int64]:
    total, shares = int(quotas.sum()), quotas.tolist()
    table, deficit = [], [0] * len(shares)
    for _ in range(total):  # plain numbers: a few streams are too little for numpy to be quick
        deficit = [lag + share for lag, share in zip(deficit, shares, strict=True)]
        chosen = deficit.index(max(deficit))
        deficit[chosen] -= total
        table.append(chosen)
    return np.array(table, dtype=np.int64)
