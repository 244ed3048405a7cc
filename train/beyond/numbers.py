"""From windows to subjects to numbers, as the evaluation of a run does it: the one place where this package asks it."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from train import metrics, summary
from train.config import Recipe
from train.evaluate import Subjects
from train.objectives import Objective
from train.summary import centre_of

Floats = NDArray[np.float64]
Average = Literal["logit", "sigmoid"]

__all__ = ["average_of", "centre_of", "chances", "metrics_of", "numbers_of", "subject_scores"]


def average_of(recipe: Recipe) -> Average:
    """What of classes is averaged over windows: logits, or the chances that they mean."""
    return recipe.eval.average


def subject_scores(
    scores: Floats, objective: Objective, *, runs: NDArray[np.int64], subjects: NDArray[np.int64], average: Average
) -> tuple[NDArray[np.int64], Floats]:
    """(subjects in rising order, (subjects, k)): the mean over runs of the mean over each run's windows.

    Args:
        scores: (windows, k) of one target.
        objective: of it.
        runs: of each window.
        subjects: of each window.
        average: what of classes is averaged.
    """
    rows = chances(scores, objective) if average == "sigmoid" and objective.kind == "classification" else scores
    means = [metrics.subject_means(column, runs=runs, subjects=subjects) for column in rows.T]
    return means[0][0], np.stack([mean for _, mean in means], axis=1)


def chances(scores: Floats, objective: Objective) -> Floats:
    """(n, k) chances that logits mean: of the upper of two classes, or of each of several."""
    if not objective.classes:
        return np.asarray(1 / (1 + np.exp(-scores)))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def numbers_of(
    subjects: Subjects, objective: Objective, *, threshold: float, draws: int, average: Average = "logit"
) -> tuple[dict[str, float], Mapping[str, tuple[float, float]]]:
    """(metrics, their 95 % intervals) of scored subjects; `average` is what of classes was averaged."""
    drawn = summary.resampled(subjects, objective=objective, threshold=threshold, draws=draws, average=average)
    return metrics_of(subjects, objective, threshold=threshold, average=average), metrics.intervals_of(drawn)


def metrics_of(
    subjects: Subjects, objective: Objective, *, threshold: float, average: Average = "logit"
) -> dict[str, float]:
    """Metrics of scored subjects."""
    return summary.measure(subjects, objective=objective, threshold=threshold, average=average)
