"""The metrics over many draws at once: each takes how often every unit is in each draw, (draws, units).

Each is the metric of the same name in `train.metrics` for a sample in which a unit stands as often as its weight says, NaN
where that is not defined. Counts are exact: whole numbers in float64.
"""

import numpy as np

from train.resampling import Floats, Statistic


def auroc(truth: Floats, scores: Floats) -> Statistic:
    """Sorted once; a draw then costs two sums and a running sum over its units."""
    order = np.argsort(scores, kind="stable")
    ranked, positive = scores[order], truth[order] == 1
    starts = np.flatnonzero(
        np.concatenate([[True], ranked[1:] != ranked[:-1]])[: len(order)]
    )  # of groups of equal scores

    def statistic(weights: Floats) -> Floats:
        if not len(order):
            return np.full(len(weights), np.nan)
        sorted_weights = weights[:, order]
        positives = np.add.reduceat(sorted_weights * positive, starts, axis=1)
        negatives = np.add.reduceat(sorted_weights * ~positive, starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        wins = (positives * (below + negatives / 2)).sum(axis=1)
        return _share(wins, positives.sum(axis=1) * negatives.sum(axis=1))

    return statistic


def mean_auroc(truth: Floats, scores: Floats) -> Statistic:
    """Of each class against the others, the mean over those for which there are both; `scores` (units, classes)."""
    each = [auroc((truth == one).astype(np.float64), column) for one, column in enumerate(scores.T)]
    return lambda weights: _mean_of_known(np.stack([one(weights) for one in each], axis=1))


def accuracy(truth: Floats, told: Floats) -> Statistic:
    """Share told right."""
    right = (truth == told).astype(np.float64)
    return lambda weights: _share(weights @ right, weights.sum(axis=1))


def balanced_accuracy(truth: Floats, told: Floats) -> Statistic:
    """Mean of the shares told right of both classes; NaN where there is one only."""
    recalls = _recalls(truth, told, np.array([0.0, 1.0]))
    return lambda weights: recalls(weights).mean(axis=1)


def mean_recall(truth: Floats, told: Floats) -> Statistic:
    """Mean over the classes of a draw of the share told right."""
    recalls = _recalls(truth, told, np.unique(truth))
    return lambda weights: _mean_of_known(recalls(weights))


def f1(truth: Floats, told: Floats) -> Statistic:
    """Of class 1."""
    one = _f1_of(truth, told, np.ones(1))
    return lambda weights: one(weights)[:, 0]


def mean_f1(truth: Floats, told: Floats) -> Statistic:
    """Mean over the classes that a draw has, or that were told in it."""
    each = _f1_of(truth, told, np.unique(np.concatenate([truth, told])))
    return lambda weights: _mean_of_known(each(weights))


def mean_of(values: Floats) -> Statistic:
    """The mean of a value of each unit: of errors, or of their squares."""
    return lambda weights: _share(weights @ values, weights.sum(axis=1))


def pearson_r(truth: Floats, predicted: Floats) -> Statistic:
    """NaN where a draw has one value only of either side."""
    a, b = _scaled(truth), _scaled(predicted)

    def statistic(weights: Floats) -> Floats:
        total = np.maximum(weights.sum(axis=1), 1)
        of_a, of_b = weights @ a / total, weights @ b / total
        # About each draw's own means: products of sums would cancel where a draw has little variance.
        left, right = a - of_a[:, None], b - of_b[:, None]
        covariance = (weights * left * right).sum(axis=1)
        norm = np.sqrt((weights * left**2).sum(axis=1) * (weights * right**2).sum(axis=1))
        r = np.clip(_share(covariance, norm), -1, 1)
        return np.where(_varies(weights, a) & _varies(weights, b), r, np.nan)

    return statistic


def r2_about(centre: float, truth: Floats, predicted: Floats) -> Statistic:
    """1 - squared errors / squares about a given centre."""
    errors, squares = (predicted - truth) ** 2, (truth - centre) ** 2
    return lambda weights: 1 - _share(weights @ errors, weights @ squares)


def _recalls(truth: Floats, told: Floats, classes: Floats) -> Statistic:
    """(draws, classes)."""
    of_class = (truth[:, None] == classes).astype(np.float64)
    right = of_class * (truth == told)[:, None]
    return lambda weights: _share(weights @ right, weights @ of_class)


def _f1_of(truth: Floats, told: Floats, classes: Floats) -> Statistic:
    """(draws, classes)."""
    is_so, is_told = (truth[:, None] == classes).astype(np.float64), (told[:, None] == classes).astype(np.float64)
    return lambda weights: _share(2 * (weights @ (is_so * is_told)), weights @ (is_so + is_told))


def _share(part: Floats, whole: Floats) -> Floats:
    """What part is of the whole, NaN where there is no whole."""
    shares: Floats = np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)
    return shares


def _mean_of_known(values: Floats) -> Floats:
    known = np.isfinite(values)
    return _share(np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1).astype(np.float64))


def _scaled(values: Floats) -> Floats:
    """About their mean, the largest 1: squares of very small or large values would leave the range of float64."""
    if not len(values) or np.ptp(values) == 0:
        return np.zeros(len(values))
    centred = values - values.mean()
    scaled: Floats = centred / np.abs(centred).max()
    return scaled


def _varies(weights: Floats, values: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """(draws,) whether a draw has two values."""
    drawn = weights > 0
    low = np.where(drawn, values, np.inf).min(axis=1, initial=np.inf)
    high = np.where(drawn, values, -np.inf).max(axis=1, initial=-np.inf)
    varies: np.ndarray[tuple[int], np.dtype[np.bool_]] = high > low
    return varies
