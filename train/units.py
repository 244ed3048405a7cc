"""From windows to what is scored: the mean of a run's windows, then of a unit's runs; units are subjects or sessions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from train import metrics
from train.predictions import Floats, PredictionTable, Target

Unit = Literal["subject", "session"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """One row per subject, or per session of one, whose target is known; sorted by label.

    Attributes:
        label: of the subject.
        truth: 0 or 1 for two classes, number of the class for more, else the value.
        score: (n,) of class 1, or the value; (n, classes) of each. Logits, or means of sigmoids where those are averaged.
        session: where sessions are scored; else empty.
        cluster: what each is drawn with: its family, or the subject itself; empty where every row is a subject of its own.
    """

    label: tuple[str, ...]
    truth: Floats
    score: Floats
    session: tuple[str, ...] = ()
    cluster: tuple[str, ...] = ()

    @property
    def clusters(self) -> NDArray[np.int64] | None:
        """(n,) numbers of the clusters; None where every row is its own."""
        return codes(self.cluster)[1] if self.cluster else None

    @property
    def num_subjects(self) -> int:
        """However many sessions they have."""
        return len(set(self.label))


def unit_of(table: PredictionTable, target: Target) -> Unit:
    """What is scored: as asked, or sessions where the label of some subject is not the same in all of them."""
    if table.about.unit != "auto":
        return table.about.unit
    truth = table.values[target.truth]
    known = np.isfinite(truth)
    _, subject = codes(table.words["subject"][known])
    return "session" if _varies(truth[known], subject) else "subject"


def units_of(table: PredictionTable, target: Target, *, unit: Unit) -> Subjects:
    """The units of the rows given, those without a label left out.

    Raises:
        UsageError: a unit has no single label.
    """
    known = table.at(np.isfinite(table.values[target.truth]))
    names, of_row = _units(known, unit)
    truth = known.values[target.truth]
    if _varies(truth, of_row):
        wrong = names[int(of_row[np.flatnonzero(truth != _first_of(truth, of_row))[0]])]
        raise UsageError(
            f"{target.name}: {unit} {' '.join(part for part in wrong if part)} has no single value of it; set eval.unit, or "
            "choose another data.target"
        )
    first = np.unique(of_row, return_index=True)[1]
    return Subjects(
        label=tuple(label for label, _ in names),
        truth=truth[first],
        score=_mean_scores(known, target, of_row),
        session=tuple(session for _, session in names) if unit == "session" else (),
        cluster=clusters_of(known.words["family"][first], known.words["subject"][first]),
    )


def all_units(table: PredictionTable, target: Target, *, unit: Unit) -> tuple[list[tuple[str, str]], Floats]:
    """((subject, session or "") of each unit, labelled or not; their mean scores, as `Subjects` has them)."""
    names, of_row = _units(table, unit)
    return names, _mean_scores(table, target, of_row)


def clusters_of(families: Iterable[str | None], subjects: Iterable[str]) -> tuple[str, ...]:
    """What units are drawn with: their family, or else their subject; empty where every unit is alone."""
    pairs = zip(families, subjects, strict=True)
    found = tuple(f"subject {one}" if family is None else f"family {family}" for family, one in pairs)
    return found if len(set(found)) < len(found) else ()


def _units(table: PredictionTable, unit: Unit) -> tuple[list[tuple[str, str]], NDArray[np.int64]]:
    """(subject and session of each unit; the unit of each row)."""
    session = [one or "" for one in table.words["session"]] if unit == "session" else [""] * len(table)
    return codes(list(zip(table.words["subject"], session, strict=True)))


def _mean_scores(table: PredictionTable, target: Target, of_row: NDArray[np.int64]) -> Floats:
    """(n,) or (n, k): the mean over a unit's runs of the mean over a run's windows."""
    _, run = codes(table.words["run"])
    scores = np.stack([table.values[name] for name in target.scores], axis=1)
    rows = window_scores(scores, target, table.about.average)
    means = [metrics.subject_means(column, runs=run, subjects=of_row)[1] for column in rows.T]
    return np.stack(means, axis=1) if len(target.scores) > 1 else means[0]


def window_scores(scores: Floats, target: Target, average: str) -> Floats:
    """(n, k) what is averaged of each window: what the network gave, or its sigmoid, of several classes its softmax."""
    if target.kind == "regression" or average == "logit":
        return scores
    rest = np.zeros_like(scores) if scores.shape[1] == 1 else None
    total = np.logaddexp.reduce(scores if rest is None else np.concatenate([scores, rest], axis=1), axis=1)
    chances: Floats = np.exp(scores - total[:, None])
    return chances


def codes(labels: Sequence[Any] | NDArray[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """(each label once, sorted; which of them each is)."""
    listed = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    found = sorted(set(listed))
    place = {label: number for number, label in enumerate(found)}
    return found, np.fromiter((place[label] for label in listed), dtype=np.int64, count=len(listed))


def _first_of(values: Floats, group: NDArray[np.int64]) -> Floats:
    """(n,) the first value of each row's group."""
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    return values[first][inverse]


def _varies(values: Floats, group: NDArray[np.int64]) -> bool:
    return bool((values != _first_of(values, group)).any())
