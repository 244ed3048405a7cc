"""Numbers about units (subjects, or their sessions), exact and in float64, whatever number of windows each one gave.

What is not defined is NaN, never an exception: an AUROC of one class, a correlation with a constant.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train import weighted
from train.resampling import Draws, Floats, Statistic, bootstrap, middle

Metric = Callable[[Floats, Floats], float]


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
    """Share that is told right; NaN of nobody."""
    return float(np.mean(truth == predicted)) if len(truth) else float("nan")


def balanced_accuracy(truth: Floats, predicted: Floats) -> float:
    """Mean of the shares told right among positives and among negatives; NaN with one class only."""
    positive = truth == 1
    if positive.all() or not positive.any():
        return float("nan")
    right = truth == predicted
    return float((right[positive].mean() + right[~positive].mean()) / 2)


def f1(truth: Floats, predicted: Floats) -> float:
    """Harmonic mean of precision and recall of class 1; NaN where nobody is or is told positive."""
    right = float(np.sum((truth == 1) & (predicted == 1)))
    told = float(np.sum(truth == 1) + np.sum(predicted == 1))
    return 2 * right / told if told else float("nan")


def mean_auroc(truth: Floats, scores: Floats) -> float:
    """AUROC of each class against all others, the mean over the classes for which there are both.

    Args:
        truth: (n,) numbers of classes.
        scores: (n, classes) that rise with the chance of each; see `against_others`.
    """
    each = np.array([auroc((truth == one).astype(np.float64), column) for one, column in enumerate(scores.T)])
    known = each[np.isfinite(each)]
    return float(known.mean()) if len(known) else float("nan")


def mean_recall(truth: Floats, predicted: Floats) -> float:
    """Mean over the classes that there are of the share told right."""
    each = [np.mean(predicted[truth == one] == one) for one in np.unique(truth)]
    return float(np.mean(each)) if each else float("nan")


def mean_f1(truth: Floats, predicted: Floats) -> float:
    """Mean over the classes that there are, or were told, of the harmonic mean of precision and recall."""
    classes = np.unique(np.concatenate([truth, predicted]))
    right = [np.sum((truth == one) & (predicted == one)) for one in classes]
    told = [np.sum(truth == one) + np.sum(predicted == one) for one in classes]
    return float(np.mean(2 * np.array(right) / np.array(told))) if len(classes) else float("nan")


def confusion(truth: Floats, predicted: Floats, *, classes: int) -> list[list[int]]:
    """How many of each class (rows) were told to be of each class (columns)."""
    pairs = (truth * classes + predicted).astype(np.int64)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist()


def mean_absolute_error(truth: Floats, predicted: Floats) -> float:
    """In the target's unit."""
    return float(np.mean(np.abs(predicted - truth))) if len(truth) else float("nan")


def mean_squared_error(truth: Floats, predicted: Floats) -> float:
    """In the target's unit, squared."""
    return float(np.mean((predicted - truth) ** 2)) if len(truth) else float("nan")


def r2_about(centre: float, truth: Floats, predicted: Floats) -> float:
    """1 - squared errors / squares about `centre`: what is gained on saying `centre` of everybody.

    About the training subjects' mean it may be told without the test subjects' truths; scikit-learn's `r2_score` is about the
    mean of `truth` itself, which no model could have said.
    """
    squares = float(np.sum((truth - centre) ** 2))
    return 1 - float(np.sum((predicted - truth) ** 2)) / squares if squares else float("nan")


def pearson_r(truth: Floats, predicted: Floats) -> float:
    """Correlation; NaN where either side is constant, rounding included."""
    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    a, b = truth - truth.mean(), predicted - predicted.mean()
    # Scaled first: squares of very small or large deviations would leave the range of float64.
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def youden_threshold(truth: Floats, scores: Floats, *, centre: float = 0.0) -> float:
    """The cut with the best balanced accuracy: midway between neighbouring scores, of equals the one nearest to `centre`.

    `centre` with one class only: there is nothing to choose by.
    """
    positive = truth == 1
    if positive.all() or not positive.any():
        return centre
    levels, group = np.unique(scores, return_inverse=True)
    # A unit is told positive above the cut; cut i lies above level i, and those at either end tell all alike.
    positives = np.bincount(group, weights=positive, minlength=len(levels))
    negatives = np.bincount(group, weights=~positive, minlength=len(levels))
    gain = np.cumsum(negatives) / negatives.sum() - np.cumsum(positives) / positives.sum()
    if len(levels) == 1:
        return centre
    middles = levels[:-1] + (levels[1:] - levels[:-1]) / 2
    # Between two neighbouring floats there is no middle; the lower one separates them as well.
    cuts = np.where(middles < levels[1:], middles, levels[:-1])
    gain = gain[:-1]
    best = cuts[gain >= gain.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - centre))])


def against_others(logits: Floats) -> Floats:
    """(n, classes) log odds of each class against all others: they rank as softmax does, and never saturate to ties."""
    odds = np.empty_like(logits)
    for one in range(logits.shape[1]):
        odds[:, one] = logits[:, one] - np.logaddexp.reduce(np.delete(logits, one, axis=1), axis=1)
    return odds


def classification_metrics(truth: Floats, scores: Floats, *, threshold: float, centre: float = 0.0) -> dict[str, float]:
    """All numbers of a two-class target.

    Who scores above `threshold` is told positive; for the numbers `_at_0`, who scores above `centre`, where both classes
    are as likely to the network: logit 0, or sigmoid 1/2.
    """
    told, told_at_0 = _above(scores, threshold), _above(scores, centre)
    return {
        "auroc": auroc(truth, scores),
        "balanced_accuracy": balanced_accuracy(truth, told),
        "accuracy": accuracy(truth, told),
        "f1": f1(truth, told),
        "balanced_accuracy_at_0": balanced_accuracy(truth, told_at_0),
        "accuracy_at_0": accuracy(truth, told_at_0),
        "f1_at_0": f1(truth, told_at_0),
    }


def classification_statistics(truth: Floats, scores: Floats, *, threshold: float) -> dict[str, Statistic]:
    """Those numbers that a verdict rests on, over draws."""
    told = _above(scores, threshold)
    return {
        "auroc": weighted.auroc(truth, scores),
        "balanced_accuracy": weighted.balanced_accuracy(truth, told),
        "accuracy": weighted.accuracy(truth, told),
        "f1": weighted.f1(truth, told),
    }


def multiclass_metrics(truth: Floats, scores: Floats, *, odds: Floats | None = None) -> dict[str, float]:
    """All numbers of a target of several classes.

    Args:
        truth: numbers of the classes.
        scores: (n, classes); the class of the largest is told.
        odds: (n, classes) what classes are ranked by; `against_others` of the scores, which are logits, where not given.
    """
    told = scores.argmax(axis=1).astype(np.float64)
    return {
        "auroc": mean_auroc(truth, against_others(scores) if odds is None else odds),
        "balanced_accuracy": mean_recall(truth, told),
        "accuracy": accuracy(truth, told),
        "f1": mean_f1(truth, told),
    }


def multiclass_statistics(truth: Floats, scores: Floats, *, odds: Floats | None = None) -> dict[str, Statistic]:
    """Those numbers, over draws."""
    told = scores.argmax(axis=1).astype(np.float64)
    return {
        "auroc": weighted.mean_auroc(truth, against_others(scores) if odds is None else odds),
        "balanced_accuracy": weighted.mean_recall(truth, told),
        "accuracy": weighted.accuracy(truth, told),
        "f1": weighted.mean_f1(truth, told),
    }


def regression_metrics(truth: Floats, predicted: Floats, *, train_mean: float) -> dict[str, float]:
    """All numbers of a numeric target, in its own unit."""
    r = pearson_r(truth, predicted)
    return {
        "mae": mean_absolute_error(truth, predicted),
        "mse": mean_squared_error(truth, predicted),
        "r": r,
        "r_squared": r**2,
        "r2": r2_about(train_mean, truth, predicted),
    }


def regression_statistics(truth: Floats, predicted: Floats, *, train_mean: float) -> dict[str, Statistic]:
    """Those numbers that a verdict rests on, over draws."""
    return {
        "mae": weighted.mean_of(np.abs(predicted - truth)),
        "mse": weighted.mean_of((predicted - truth) ** 2),
        "r": weighted.pearson_r(truth, predicted),
        "r2": weighted.r2_about(train_mean, truth, predicted),
    }


def bootstrap_interval(
    metric: Metric,
    truth: Floats,
    scores: Floats,
    *,
    draws: int,
    stratify: bool = False,
    clusters: NDArray[Any] | None = None,
) -> tuple[float, float]:
    """The middle 95 % of a metric over resampled units; the model is held fixed.

    Args:
        metric: of truths and scores; the metrics of this module take a hundredth of the time of others.
        truth: (n,).
        scores: (n,) or (n, k).
        draws: how many.
        stratify: whether `truth` holds classes; see `bootstrap`.
        clusters: (n,) what each unit is drawn with; None: each alone.
    """
    statistics = {"it": _statistic(metric, truth, scores)}
    return middle(bootstrap(statistics, truth=truth, draws=draws, stratify=stratify, clusters=clusters).values["it"])


def paired_interval(
    metric: Metric,
    truth: Floats,
    scores_a: Floats,
    scores_b: Floats,
    *,
    draws: int = 2000,
    stratify: bool = False,
    clusters: NDArray[Any] | None = None,
) -> tuple[float, float]:
    """The middle 95 % of a metric of `scores_a` minus that of `scores_b`, the same units drawn for both."""
    one, other = _statistic(metric, truth, scores_a), _statistic(metric, truth, scores_b)
    minus: Mapping[str, Statistic] = {"minus": lambda weights: one(weights) - other(weights)}
    return middle(bootstrap(minus, truth=truth, draws=draws, stratify=stratify, clusters=clusters).values["minus"])


def intervals_of(found: Draws) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each number."""
    return {name: middle(values) for name, values in found.values.items()}


# Metrics that are known over many draws at once.
_STATISTICS: Mapping[Metric, Callable[[Floats, Floats], Statistic]] = {
    auroc: weighted.auroc,
    accuracy: weighted.accuracy,
    balanced_accuracy: weighted.balanced_accuracy,
    f1: weighted.f1,
    mean_auroc: weighted.mean_auroc,
    mean_recall: weighted.mean_recall,
    mean_f1: weighted.mean_f1,
    mean_absolute_error: lambda truth, predicted: weighted.mean_of(np.abs(predicted - truth)),
    mean_squared_error: lambda truth, predicted: weighted.mean_of((predicted - truth) ** 2),
    pearson_r: weighted.pearson_r,
}


def _statistic(metric: Metric, truth: Floats, scores: Floats) -> Statistic:
    if metric in _STATISTICS:
        return _STATISTICS[metric](truth, scores)

    def one_by_one(weights: Floats) -> Floats:
        chosen = (np.repeat(np.arange(len(truth)), row.astype(np.int64)) for row in weights)
        return np.array([metric(truth[units], scores[units]) for units in chosen])

    return one_by_one


def _above(scores: Floats, cut: float) -> Floats:
    return (scores > cut).astype(np.float64)


def _group_means(values: Floats, group: NDArray[Any], num_groups: int) -> Floats:
    return np.bincount(group, weights=values, minlength=num_groups) / np.bincount(group, minlength=num_groups)
