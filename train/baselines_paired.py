"""A network against a baseline, subject by subject: the paired difference that a verdict rests on, and its sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from train import metrics
from train.baselines_fit import Floats, Kind
from train.units import Subjects, clusters_of, codes

# The number that a verdict is told by; the others stand beside it. The error of a number is always known, where a
# correlation is not.
VERDICT_METRIC: Mapping[str, str] = {
    "two classes": "auroc",
    "classes": "balanced_accuracy",
    "regression": "mae",
}
_LOWER_IS_BETTER = frozenset({"mae", "mse"})
_NAMES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "mae": "mean absolute error",
    "r": "Pearson r",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A number of a network, of a baseline on the same subjects, and the network's minus the baseline's."""

    metric: str
    network: float
    baseline: float
    difference: float
    interval: tuple[float, float]  # of the difference: 95 %, the same subjects drawn for both

    @property
    def says(self) -> str:
        """`better`, `worse`, `not told apart`, or `unknown` where a side has no number."""
        low, high = self.interval
        if not np.isfinite([self.difference, low, high]).all():
            return "unknown"
        sign = -1 if self.metric in _LOWER_IS_BETTER else 1
        if low > 0 or high < 0:
            return "better" if sign * self.difference > 0 else "worse"
        return "not told apart"


def paired_differences(
    network: Subjects,
    baseline: Subjects,
    *,
    kind: Kind,
    thresholds: tuple[float, float] = (0.0, 0.0),
    draws: int = 2000,
    family: Mapping[str, str] | None = None,
) -> list[Difference]:
    """The network against a baseline on the same subjects.

    Args:
        network: its scored subjects, or their sessions.
        baseline: the same subjects, in any order; each stands against all of a subject's sessions.
        kind: of the target.
        thresholds: of the network and the baseline, above which a subject of two classes is told positive.
        draws: of the bootstrap.
        family: of each subject where any is known: families, and sessions of a subject, are drawn whole.

    Raises:
        UsageError: the subjects or their truths are not the same.
    """
    place = {label: row for row, label in enumerate(baseline.label)}
    if set(place) != set(network.label):
        raise UsageError(
            f"{len(set(network.label) ^ set(place))} subjects were scored by one of the two only (network {len(network.label)}, "
            f"baseline {len(place)}); give the same part of the same dataset"
        )
    rows = [place[label] for label in network.label]
    truth = network.truth
    if not np.allclose(truth, baseline.truth[rows], rtol=1e-6):
        raise UsageError("network and baseline were scored against different truths; give the same target and coding")
    pairs = (network.score, baseline.score[rows])
    measured = _measured(pairs, kind=kind, thresholds=thresholds)
    of_label = clusters_of(((family or {}).get(label) for label in network.label), network.label)
    clusters = codes(of_label)[1] if of_label else None
    return [
        _difference(name, metric, truth, *both, draws=draws, stratify=kind == "classification", clusters=clusters)
        for name, (metric, both) in measured.items()
    ]


def numbers_of(subjects: Subjects, *, kind: Kind, threshold: float) -> dict[str, float]:
    """The numbers that differences are told of."""
    measured = _measured((subjects.score,), kind=kind, thresholds=(threshold,))
    return {name: metric(subjects.truth, columns[0]) for name, (metric, columns) in measured.items()}


def verdict_metric(kind: Kind, *, classes: int) -> str:
    """Which difference is told first."""
    if kind == "regression":
        return VERDICT_METRIC["regression"]
    return VERDICT_METRIC["classes" if classes > 2 else "two classes"]


def sentence(difference: Difference, *, target: str, baseline: str, subjects: int, unit: str = "subject") -> str:
    """What a difference says, and what it does not."""
    low, high = difference.interval
    told = (
        f"difference in {_NAMES[difference.metric]} {difference.difference:+.3f} [{low:+.3f}, {high:+.3f}] on {subjects} test "
        f"{unit}s"
    )
    says = difference.says
    if says == "better":
        return f"{target}: the net is better than {baseline} ({told})."
    if says == "worse":
        return f"{target}: the net is worse than {baseline} ({told})."
    if says == "unknown":
        return f"{target}: the net and {baseline} cannot be compared: one of them has no {_NAMES[difference.metric]}."
    return (
        f"{target}: the net is not told apart from {baseline} ({told}); that is no proof that they are equal, the interval "
        "says how much either may be ahead."
    )


def as_row(difference: Difference) -> dict[str, Any]:
    """For JSON."""
    return {
        "metric": difference.metric,
        "network": difference.network,
        "baseline": difference.baseline,
        "difference": difference.difference,
        "interval": list(difference.interval),
        "says": difference.says,
    }


def _difference(
    name: str,
    metric: metrics.Metric,
    truth: Floats,
    one: Floats,
    other: Floats,
    *,
    draws: int,
    stratify: bool,
    clusters: NDArray[np.int64] | None,
) -> Difference:
    interval = metrics.paired_interval(metric, truth, one, other, draws=draws, stratify=stratify, clusters=clusters)
    measured = metric(truth, one), metric(truth, other)
    return Difference(
        metric=name,
        network=measured[0],
        baseline=measured[1],
        difference=measured[0] - measured[1],
        interval=interval,
    )


def _measured(
    scores: Sequence[Floats], *, kind: Kind, thresholds: Sequence[float]
) -> dict[str, tuple[metrics.Metric, Sequence[Floats]]]:
    """Each number with the columns, one of each model, that it is computed from."""
    if kind == "regression":
        return {"mae": (metrics.mean_absolute_error, scores), "r": (metrics.pearson_r, scores)}
    told = [_told(score, threshold) for score, threshold in zip(scores, thresholds, strict=True)]
    if scores[0].ndim == 1:
        return {"auroc": (metrics.auroc, scores), "balanced_accuracy": (metrics.balanced_accuracy, told)}
    return {"accuracy": (metrics.accuracy, told), "balanced_accuracy": (metrics.mean_recall, told)}


def _told(score: Floats, threshold: float) -> Floats:
    """The class that a subject is told to have."""
    told = score > threshold if score.ndim == 1 else score.argmax(axis=1)
    return np.asarray(told, dtype=np.float64)
