"""What simple readers find in vectors of subjects: linear ones and nearest neighbours, tuned on training subjects alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from train import metrics
from train.baselines_fit import Features, Floats, Kind, fit_reader
from train.evaluate import Subjects
from train.predictions import Target
from train.summary import measure, resampled
from train.units import clusters_of

READERS = ("linear", "k-nn")
NEIGHBOURS = (1, 3, 5, 9, 15, 25, 41)
NUM_FOLDS = 5
_PERMUTATIONS = 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """What is to be read, for every subject.

    Attributes:
        name: of the column, or of what is measured.
        kind: classes or a number.
        truth: number of the class, or the value, by subject; those of whom nothing is known are not there.
        classes: what they are called, as training subjects have them.
    """

    name: str
    kind: Kind
    truth: dict[str, float]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """How well a reader answers.

    Attributes:
        reader: `linear` or `k-nn`.
        setting: the penalty or the number of neighbours that inner cross-validation chose.
        train: how many subjects it was fitted to.
        test: the scored subjects.
        numbers: on those.
        intervals: 95 % over them.
        chance: mean, 2.5th and 97.5th percentile of numbers with the truths of test subjects shuffled.
        threshold: above which a subject of two classes is told positive, chosen on validation subjects; 0 without any.
    """

    reader: str
    setting: float
    train: int
    test: Subjects
    numbers: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    chance: dict[str, tuple[float, float, float]]
    threshold: float


def read(question: Question, parts: dict[str, Features], *, reader: str, draws: int, seed: int = 0) -> Found:
    """Fit on the part `train`, choose a threshold on `val`, score `test`.

    Args:
        question: what is read.
        parts: vectors of the subjects of each part.
        reader: which.
        draws: of the bootstrap.
        seed: of folds and shuffles.

    Raises:
        UsageError: the training or the test subjects do not allow it.
    """
    known = {
        name: rows.of([label for label in rows.subject if label in question.truth]) for name, rows in parts.items()
    }
    truth = {name: np.array([question.truth[label] for label in rows.subject]) for name, rows in known.items()}
    if len(known["test"].subject) < 2:
        raise UsageError(
            f"{len(known['test'].subject)} test subjects have a known {question.name}; 2 or more are needed"
        )
    if reader == "linear":
        fitted = fit_reader(known["train"], truth["train"], kind=question.kind, seed=seed)
        setting = fitted.penalty
        scores = {name: fitted.scores(rows.values) for name, rows in known.items()}
    else:
        neighbours = choose_neighbours(known["train"], truth["train"], kind=question.kind, seed=seed)
        setting = float(neighbours)
        scores = {
            name: neighbour_scores(
                known["train"].values, truth["train"], rows.values, kind=question.kind, neighbours=neighbours
            )
            for name, rows in known.items()
            if len(rows.subject)
        }
    mean = float(truth["train"].mean()) if question.kind == "regression" else 0.0
    target = Target(name=question.name, kind=question.kind, offset=mean, classes=question.classes, truth="", scores=())
    test = Subjects(
        label=known["test"].subject,
        truth=truth["test"],
        score=scores["test"],
        cluster=clusters_of(known["test"].group, known["test"].subject),
    )
    threshold = 0.0
    if "val" in scores and question.kind == "classification" and test.score.ndim == 1:
        threshold = metrics.youden_threshold(truth["val"], scores["val"])
    drawn = resampled(test, objective=target, threshold=threshold, draws=draws)
    return Found(
        reader=reader,
        setting=setting,
        train=len(known["train"].subject),
        test=test,
        numbers=measure(test, objective=target, threshold=threshold),
        intervals=metrics.intervals_of(drawn),
        chance=_chance(test, target, threshold, seed),
        threshold=threshold,
    )


def neighbour_scores(
    train: Floats, truth: Floats, values: Floats, *, kind: Kind, neighbours: int
) -> NDArray[np.float64]:
    """Scores of subjects by their nearest training subjects, features standardised by the training subjects.

    Of numbers the mean; of classes the logits of their shares, one vote added to each class so that all are finite.
    """
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    count = min(neighbours, len(train))
    model: Any
    if kind == "regression":
        model = KNeighborsRegressor(count).fit(scaler.transform(train), truth)
        return np.asarray(model.predict(scaler.transform(values)), dtype=np.float64)
    model = KNeighborsClassifier(count).fit(scaler.transform(train), truth)
    shares = np.asarray(model.predict_proba(scaler.transform(values)), dtype=np.float64)
    smoothed = np.log((shares * count + 1) / (count + shares.shape[1]))
    return np.asarray(smoothed[:, 1] - smoothed[:, 0] if shares.shape[1] == 2 else smoothed)


def choose_neighbours(features: Features, truth: Floats, *, kind: Kind, seed: int) -> int:
    """How many neighbours have the least loss on held-out training subjects; of equal numbers the largest.

    Raises:
        UsageError: the training subjects are of one class or value, or too few.
    """
    if len(np.unique(truth)) < 2:
        raise UsageError(f"{len(truth)} training subjects have one class or value; choose another target")
    allowed = [count for count in NEIGHBOURS if count <= max(1, len(truth) // 2)]
    losses = np.zeros(len(allowed))
    for train, held in folds(truth, features.group, kind=kind, seed=seed):
        for place, count in enumerate(allowed):
            scores = neighbour_scores(
                features.values[train], truth[train], features.values[held], kind=kind, neighbours=count
            )
            losses[place] += _loss(scores, truth[held], np.unique(truth[train]), kind)
    return int(allowed[np.flatnonzero(losses <= losses.min() * (1 + 1e-12))[-1]])


def folds(
    truth: Floats, group: Sequence[str], *, kind: Kind, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(training rows, held-out rows); groups stay whole, and every training fold has every class.

    Raises:
        UsageError: there are fewer than 2 groups of the rarest class.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    groups = np.unique(np.asarray(group), return_inverse=True)[1]
    each = [groups[truth == value] for value in np.unique(truth)] if kind == "classification" else [groups]
    number = min(NUM_FOLDS, *(len(np.unique(one)) for one in each))
    if number < 2:
        raise UsageError(f"{len(truth)} training subjects have fewer than 2 groups of the rarest class; give more")
    splitter: Any = GroupKFold(number)
    if kind == "classification":
        splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    for train, held in splitter.split(truth[:, None], truth, groups):
        if kind == "regression" or len(np.unique(truth[train])) == len(np.unique(truth)):
            yield train, held


def _loss(scores: Floats, truth: Floats, classes: Floats, kind: Kind) -> float:
    if kind == "regression":
        return float(((scores - truth) ** 2).sum())
    logits = np.stack([np.zeros_like(scores), scores], axis=1) if scores.ndim == 1 else scores
    place = np.searchsorted(classes, truth)
    return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(truth)), place]).sum())


def _chance(test: Subjects, target: Target, threshold: float, seed: int) -> dict[str, tuple[float, float, float]]:
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(_PERMUTATIONS):
        shuffled = Subjects(label=test.label, truth=rng.permutation(test.truth), score=test.score)
        for name, value in measure(shuffled, objective=target, threshold=threshold).items():
            drawn.setdefault(name, []).append(value)
    found = {}
    for name, values in drawn.items():
        known = [value for value in values if np.isfinite(value)]
        low, high = np.quantile(known, (0.025, 0.975)) if known else (np.nan, np.nan)
        found[name] = (float(np.mean(known)) if known else float("nan"), float(low), float(high))
    return found
