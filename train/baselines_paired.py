"""A network against a baseline, subject by subject: the paired difference that a verdict rests on, and its sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmristream.errors import UsageError
from train import metrics
from train.baselines_fit import Floats, Kind
from train.evaluate import Subjects

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
_SEED = 2000
# With fewer unrelated subjects a percentile bootstrap covers far less than it says: a rule of thumb of ours.
LEAST_DRAWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A number of a network, of a baseline on the same subjects, and the network's minus the baseline's."""

    metric: str
    network: float
    baseline: float
    difference: float
    interval: tuple[float, float]  # of the difference: 95 %, the same subjects drawn for both
    drawn: int  # families and single subjects that it is drawn from

    @property
    def says(self) -> str:
        """`better`, `worse`, `not told apart`, `too few` to tell, or `unknown` where a side has no number."""
        low, high = self.interval
        if not np.isfinite([self.difference, low, high]).all():
            return "unknown"
        if self.drawn < LEAST_DRAWN:
            return "too few"
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
        network: its scored subjects; of one with several sessions the mean, as baselines say one thing of a subject.
        baseline: the same subjects, in any order.
        kind: of the target.
        thresholds: of the network and the baseline, above which a subject of two classes is told positive.
        draws: of the bootstrap.
        family: of each subject where any is known: families are drawn whole.

    Raises:
        UsageError: the subjects or their truths are not the same.
    """
    network = _by_subject(network)
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
    drawn = None if family is None else clusters(network.label, family) or network.label
    return [
        _difference(name, metric, truth, *both, draws=draws, stratify=kind == "classification", clusters=drawn)
        for name, (metric, both) in measured.items()
    ]


def clusters(labels: Sequence[str], family: Mapping[str, str]) -> tuple[str, ...]:
    """What each subject is drawn with; empty where everybody is drawn alone."""
    found = tuple(f"family {family[label]}" if label in family else f"subject {label}" for label in labels)
    return found if len(set(found)) < len(found) else ()


def _by_subject(units: Subjects) -> Subjects:
    """Means over sessions, where those are the units.

    Raises:
        UsageError: the truth differs between a subject's sessions.
    """
    labels, first, of = np.unique(np.array(units.label), return_index=True, return_inverse=True)
    if len(labels) == len(units.label):
        return units
    if (units.truth != units.truth[first][of]).any():
        raise UsageError("the network's truths differ between sessions of a subject, of whom a baseline says one thing")
    scores = np.zeros((len(labels), *units.score.shape[1:]))
    np.add.at(scores, of, units.score)
    counts = np.bincount(of).reshape(-1, *[1] * (units.score.ndim - 1))
    return Subjects(label=tuple(labels.tolist()), truth=units.truth[first], score=scores / counts)


def numbers_of(subjects: Subjects, *, kind: Kind, threshold: float) -> dict[str, float]:
    """The numbers that differences are told of."""
    measured = _measured((subjects.score,), kind=kind, thresholds=(threshold,))
    return {name: metric(subjects.truth, columns[0]) for name, (metric, columns) in measured.items()}


def cluster_interval(
    metric: metrics.Metric, truth: Floats, scores: Floats, *, clusters: Sequence[str], draws: int
) -> tuple[float, float]:
    """The middle 95 % of a metric over resampled clusters of subjects, each taken whole.

    Draws of one class only, which have no number, are left out.
    """
    _, of = np.unique(np.asarray(clusters), return_inverse=True)
    members = [np.flatnonzero(of == number) for number in range(int(of.max()) + 1)]
    rng = np.random.default_rng(_SEED)
    values = np.empty(draws)
    for draw in range(draws):
        chosen = np.concatenate([members[number] for number in rng.integers(0, len(members), len(members))])
        values[draw] = metric(truth[chosen], scores[chosen])
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def verdict_metric(kind: Kind, *, classes: int) -> str:
    """Which difference is told first."""
    if kind == "regression":
        return VERDICT_METRIC["regression"]
    return VERDICT_METRIC["classes" if classes > 2 else "two classes"]


def sentence(difference: Difference, *, target: str, baseline: str, subjects: int) -> str:
    """What a difference says, and what it does not."""
    low, high = difference.interval
    told = (
        f"difference in {_NAMES[difference.metric]} {difference.difference:+.3f} [{low:+.3f}, {high:+.3f}] on {subjects} test "
        "subjects"
    )
    says = difference.says
    if says == "better":
        return f"{target}: the net is better than {baseline} ({told})."
    if says == "worse":
        return f"{target}: the net is worse than {baseline} ({told})."
    if says == "too few":
        return (
            f"{target}: {difference.drawn} unrelated test subjects or families are too few to compare the net with {baseline} "
            f"({told}, which is narrower than the truth); have {LEAST_DRAWN} or more."
        )
    if says == "unknown":
        return (
            f"{target}: the net and {baseline} cannot be compared: one of them has no {_NAMES[difference.metric]}, as where "
            "all test subjects are alike; have more."
        )
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
    clusters: Sequence[str] | None,
) -> Difference:
    def minus(truth: Floats, both: Floats) -> float:
        return metric(truth, both[:, 0]) - metric(truth, both[:, 1])

    both = np.stack([one, other], axis=1)
    if clusters is None or len(set(clusters)) == len(clusters):
        interval = metrics.bootstrap_interval(minus, truth, both, draws=draws, stratify=stratify)
    else:
        interval = cluster_interval(minus, truth, both, clusters=clusters, draws=draws)
    measured = metric(truth, one), metric(truth, other)
    return Difference(
        metric=name,
        network=measured[0],
        baseline=measured[1],
        difference=measured[0] - measured[1],
        interval=interval,
        drawn=len(truth) if clusters is None else len(set(clusters)),
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
