"""Numbers about subjects, exact and in float64: the unit is the subject, whatever number of windows each one gave."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Metric = Callable[[Floats, Floats], float]

_BOOTSTRAP_SEED = 2000


def subject_means(values: NDArray[Any], *, runs: NDArray[Any], subjects: NDArray[Any]) -> tuple[NDArray[Any], Floats]:
    """The subjects in sorted order, and for each the mean over its runs of the mean over a run's windows.

    A long run counts no more than a short one.
    """
    run_ids, first, run_of = np.unique(runs, return_index=True, return_inverse=True)
    run_means = _group_means(np.asarray(values, np.float64), run_of, len(run_ids))
    subject_ids, subject_of = np.unique(subjects[first], return_inverse=True)
    return subject_ids, _group_means(run_means, subject_of, len(subject_ids))


def auroc(truth: Floats, scores: Floats) -> float:
    """Chance that a positive (truth 1) scores above a negative, ties counting half; NaN with one class only."""
    positive = truth == 1
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(midranks[group][positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def accuracy(truth: Floats, predicted: Floats) -> float:
    """Share of subjects that are told right."""
    return float(np.mean(truth == predicted))


def balanced_accuracy(truth: Floats, predicted: Floats) -> float:
    """Mean of the shares told right among positives and among negatives; NaN with one class only."""
    positive = truth == 1
    if positive.all() or not positive.any():
        return float("nan")
    right = truth == predicted
    return float((right[positive].mean() + right[~positive].mean()) / 2)


def mean_absolute_error(truth: Floats, predicted: Floats) -> float:
    """In the target's unit."""
    return float(np.mean(np.abs(predicted - truth)))


def mean_squared_error(truth: Floats, predicted: Floats) -> float:
    """In the target's unit, squared."""
    return float(np.mean((predicted - truth) ** 2))


def pearson_r(truth: Floats, predicted: Floats) -> float:
    """Correlation; NaN where either side is constant, rounding included."""
    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    a, b = truth - truth.mean(), predicted - predicted.mean()
    # Scaled first: squares of very small or large deviations would leave the range of float64.
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def youden_threshold(truth: Floats, scores: Floats) -> float:
    """The cut with the best balanced accuracy: midway between neighbouring scores, of equals the one nearest to 0.

    0 with one class only: there is nothing to choose by.
    """
    positive = truth == 1
    if positive.all() or not positive.any():
        return 0.0
    levels, group = np.unique(scores, return_inverse=True)
    # A subject is told positive above the cut; cut i lies above level i, and those at either end tell all alike.
    positives = np.bincount(group, weights=positive, minlength=len(levels))
    negatives = np.bincount(group, weights=~positive, minlength=len(levels))
    gain = np.cumsum(negatives) / negatives.sum() - np.cumsum(positives) / positives.sum()
    if len(levels) == 1:
        return 0.0
    middles = levels[:-1] + (levels[1:] - levels[:-1]) / 2
    # Between two neighbouring floats there is no middle; the lower one separates them as well.
    cuts = np.where(middles < levels[1:], middles, levels[:-1])
    gain = gain[:-1]
    best = cuts[gain >= gain.max() - 1e-12]
    return float(best[np.argmin(np.abs(best))])


def bootstrap_interval(
    metric: Metric, truth: Floats, scores: Floats, *, draws: int, stratify: bool = False
) -> tuple[float, float]:
    """The middle 95 % of the metric over resampled subjects; the model is held fixed.

    Stratified draws keep the number of subjects of each class, so that none has one class only. Draws depend on nothing
    but those numbers: two models scored on the same subjects are resampled alike.
    """
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    strata = np.unique(truth) if stratify else [None]
    members = [np.arange(len(truth)) if s is None else np.flatnonzero(truth == s) for s in strata]
    values = np.empty(draws)
    for draw in range(draws):
        chosen = np.concatenate([group[rng.integers(0, len(group), len(group))] for group in members])
        values[draw] = metric(truth[chosen], scores[chosen])
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def classification_metrics(truth: Floats, scores: Floats, *, threshold: float) -> dict[str, float]:
    """All numbers of a two-class target; `_at_0` calls a logit above 0 positive, the others one above `threshold`."""
    told, told_at_0 = (scores > threshold).astype(np.float64), (scores > 0).astype(np.float64)
    return {
        "auroc": auroc(truth, scores),
        "balanced_accuracy": balanced_accuracy(truth, told),
        "accuracy": accuracy(truth, told),
        "balanced_accuracy_at_0": balanced_accuracy(truth, told_at_0),
        "accuracy_at_0": accuracy(truth, told_at_0),
    }


def classification_intervals(
    truth: Floats, scores: Floats, *, threshold: float, draws: int
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of the numbers that a verdict rests on."""
    told = (scores > threshold).astype(np.float64)
    return {
        "auroc": bootstrap_interval(auroc, truth, scores, draws=draws, stratify=True),
        "balanced_accuracy": bootstrap_interval(balanced_accuracy, truth, told, draws=draws, stratify=True),
        "accuracy": bootstrap_interval(accuracy, truth, told, draws=draws, stratify=True),
    }


def multiclass_metrics(truth: Floats, scores: Floats) -> dict[str, float]:
    """All numbers of a target of several classes; `truth` holds their numbers, `scores` (n, classes) their logits."""
    told = scores.argmax(axis=1).astype(np.float64)
    return {
        "balanced_accuracy": mean_recall(truth, told),
        "accuracy": accuracy(truth, told),
        "f1": mean_f1(truth, told),
    }


def multiclass_intervals(truth: Floats, scores: Floats, *, draws: int) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of the numbers that a verdict rests on."""
    told = scores.argmax(axis=1).astype(np.float64)
    found = {"balanced_accuracy": mean_recall, "accuracy": accuracy, "f1": mean_f1}
    return {name: bootstrap_interval(metric, truth, told, draws=draws, stratify=True) for name, metric in found.items()}


def mean_recall(truth: Floats, predicted: Floats) -> float:
    """Mean over the classes that there are of the share told right."""
    return float(np.mean([np.mean(predicted[truth == one] == one) for one in np.unique(truth)]))


def mean_f1(truth: Floats, predicted: Floats) -> float:
    """Mean over the classes that there are, or were told, of the harmonic mean of precision and recall."""
    classes = np.unique(np.concatenate([truth, predicted]))
    right = [np.sum((truth == one) & (predicted == one)) for one in classes]
    told = [np.sum(truth == one) + np.sum(predicted == one) for one in classes]
    return float(np.mean(2 * np.array(right) / np.array(told)))


def regression_metrics(truth: Floats, predicted: Floats) -> dict[str, float]:
    """All numbers of a numeric target, in its own unit."""
    return {
        "mae": mean_absolute_error(truth, predicted),
        "mse": mean_squared_error(truth, predicted),
        "r": pearson_r(truth, predicted),
    }


def regression_intervals(truth: Floats, predicted: Floats, *, draws: int) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of the numbers that a verdict rests on."""
    return {
        "mae": bootstrap_interval(mean_absolute_error, truth, predicted, draws=draws),
        "mse": bootstrap_interval(mean_squared_error, truth, predicted, draws=draws),
        "r": bootstrap_interval(pearson_r, truth, predicted, draws=draws),
    }


def _group_means(values: Floats, group: NDArray[Any], num_groups: int) -> Floats:
    return np.bincount(group, weights=values, minlength=num_groups) / np.bincount(group, minlength=num_groups)
