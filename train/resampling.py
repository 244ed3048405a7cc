"""Which units each draw of a bootstrap holds, and how often: the model is fixed, the units are drawn anew.

Units that are not independent (sessions of a subject, subjects of a family) are drawn together, as clusters. Draws depend on
nothing but the clusters and the classes of the units: two models scored on the same units are resampled alike.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# (draws, units) how often each unit is in each draw -> (draws,) the number; NaN where it is not defined.
Statistic = Callable[[Floats], Floats]

_SEED = 2000
# Weights that are in memory at once: 16 MiB, which the statistics need a few times.
_CHUNK_WEIGHTS = 2**21


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """What the draws of a bootstrap gave.

    Attributes:
        values: (draws,) of each number; NaN where it was not defined, or where all draws are the sample itself.
        stratified: whether each draw had as many clusters of each class as the sample.
        redrawn: draws that had one class only and were drawn again.
        clusters: how many were drawn from.
    """

    values: Mapping[str, Floats]
    stratified: bool
    redrawn: int
    clusters: int


def bootstrap(
    statistics: Mapping[str, Statistic],
    *,
    truth: Floats,
    draws: int,
    stratify: bool,
    clusters: NDArray[Any] | None = None,
) -> Draws:
    """Resample clusters of units with replacement, as many as there are.

    Args:
        statistics: the numbers, by name.
        truth: (units,).
        draws: how many.
        stratify: whether `truth` holds classes. Where every cluster is of one class, draws keep the number of clusters of
            each; otherwise draws in which fewer than two classes are left are drawn again.
        clusters: (units,) what each unit is drawn with; None: each alone.
    """
    of_unit = np.arange(len(truth)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    strata = _strata(truth, of_unit) if stratify else None
    drawing = _Drawing(of_unit=of_unit, strata=strata, classes=truth if stratify and strata is None else None)
    found: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in drawing.chunks(draws):
        for name, statistic in statistics.items():
            found[name].append(statistic(weights))
    return Draws(
        values={
            # Draws that cannot differ say nothing of chance: an interval of no width would be taken for certainty.
            name: np.concatenate([*parts, np.zeros(0)]) if drawing.varies else np.full(draws, np.nan)
            for name, parts in found.items()
        },
        stratified=strata is not None,
        redrawn=drawing.redrawn,
        clusters=drawing.num_clusters,
    )


def middle(values: Floats) -> tuple[float, float]:
    """Where the middle 95 % of the values that are defined lie; NaN where none is."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


class _Drawing:
    """Draws one after the other; what a draw holds does not depend on how many are made at once."""

    def __init__(
        self, *, of_unit: NDArray[np.int64], strata: list[NDArray[np.int64]] | None, classes: Floats | None
    ) -> None:
        self._of_unit = of_unit
        self.num_clusters = int(of_unit.max()) + 1 if len(of_unit) else 0
        self._strata = [np.arange(self.num_clusters)] if strata is None else strata
        self._rngs = [np.random.default_rng([_SEED, number]) for number in range(len(self._strata))]
        self._again = np.random.default_rng([_SEED, 2**32])
        self._is_class = None if classes is None else _one_hot(classes)
        self.redrawn = 0

    @property
    def varies(self) -> bool:
        """Whether there are two clusters that may stand for each other."""
        return any(len(members) > 1 for members in self._strata)

    def chunks(self, draws: int) -> Iterator[Floats]:
        size = max(1, _CHUNK_WEIGHTS // max(1, len(self._of_unit)))
        for start in range(0, draws, size):
            weights = self._clusters(min(size, draws - start), self._rngs)[:, self._of_unit]
            for row in self._one_class(weights):
                weights[row] = self._with_classes()
            yield weights

    def _clusters(self, draws: int, rngs: list[np.random.Generator]) -> Floats:
        """(draws, clusters) how often each is in each draw."""
        counts = np.zeros((draws, self.num_clusters))
        for members, rng in zip(self._strata, rngs, strict=True):
            size = len(members)
            chosen = rng.integers(0, size, size=(draws, size)) if size else np.zeros((draws, 0), dtype=np.int64)
            flat = (chosen + np.arange(draws)[:, None] * size).ravel()
            counts[:, members] = np.bincount(flat, minlength=draws * size).reshape(draws, size)
        return counts

    def _one_class(self, weights: Floats) -> list[int]:
        if self._is_class is None or self._is_class.shape[1] < 2:
            return []
        present = (weights @ self._is_class > 0).sum(axis=1)
        return np.flatnonzero(present < 2).tolist()

    def _with_classes(self) -> Floats:
        """A draw with two classes: some cluster has both, so that two of three draws will do."""
        while True:
            self.redrawn += 1
            weights = self._clusters(1, [self._again])[:, self._of_unit]
            if not self._one_class(weights):
                drawn: Floats = weights[0]
                return drawn


def _strata(truth: Floats, of_unit: NDArray[np.int64]) -> list[NDArray[np.int64]] | None:
    """Clusters by their class; None where one has units of several."""
    classes, code = np.unique(truth, return_inverse=True)
    of_cluster = np.zeros(int(of_unit.max()) + 1 if len(of_unit) else 0, dtype=np.int64)
    of_cluster[of_unit] = code
    if (of_cluster[of_unit] != code).any():
        return None
    return [np.flatnonzero(of_cluster == number) for number in range(len(classes))]


def _one_hot(classes: Floats) -> Floats:
    hot: Floats = (classes[:, None] == np.unique(classes)).astype(np.float64)
    return hot
