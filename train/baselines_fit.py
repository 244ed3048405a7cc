"""Linear readers of features, one row per subject: scaled and tuned within the training subjects alone, in float64."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import MissingExtraError, UsageError

Floats = NDArray[np.float64]
Kind = Literal["classification", "regression"]

NUM_FOLDS = 5
# Weights of half the squared coefficients (logistic) or of the squares (ridge). Scaled features are divided by the root
# of their number, so that a subject's row is about 1 long and one range fits 10 features and 100,000.
PENALTIES = np.logspace(-5, 3, 17)

# Directions of the training rows with less than this share of the largest variance are rounding, and no penalty above
# 1e-5 lets them count.
_LEAST_VARIANCE = 1e-10
# Below this share of its mean, a feature's SD is rounding of a constant.
_CONSTANT = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """One row per subject, and what a subject must not be parted from when rows are divided (a family, or itself)."""

    subject: tuple[str, ...]
    group: tuple[str, ...]
    values: Floats  # (subjects, features); NaN where not known
    names: tuple[str, ...] = ()  # of the features, where they have any

    def __post_init__(self) -> None:
        if not len(self.subject) == len(self.group) == len(self.values) == len(set(self.subject)):
            raise UsageError(
                f"features of {len(set(self.subject))} different subjects, {len(self.group)} groups and "
                f"{len(self.values)} rows; expected one row and one group for each subject"
            )

    def of(self, subjects: Sequence[str]) -> "Features":
        """The rows of these subjects, in this order."""
        place = {subject: number for number, subject in enumerate(self.subject)}
        rows = [place[subject] for subject in subjects]
        group = tuple(self.group[row] for row in rows)
        return Features(subject=tuple(subjects), group=group, values=self.values[rows], names=self.names)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """A fitted linear reader: score = ((x - centre) x scale, NaN as 0) @ weights + offset.

    Attributes:
        kind: of its target.
        classes: the values of the truth, rising; empty for numbers.
        centre: (features,) means over the training subjects.
        scale: (features,) what they are multiplied by; 0 for features that are constant there.
        weights: (features, outputs).
        offset: (outputs,).
        penalty: the chosen one.
        losses: (penalties,) the held-out loss of each, mean over training subjects: log loss, or squared error in the
            target's unit.
    """

    kind: Kind
    classes: Floats
    centre: Floats
    scale: Floats
    weights: Floats
    offset: Floats
    penalty: float
    losses: Floats

    def scores(self, values: Floats) -> Floats:
        """What features say: (n,) logits of the upper of two classes or numbers; (n, classes) logits of more classes."""
        rows = _scaled(values, self.centre, self.scale) @ self.weights + self.offset
        return rows[:, 0] if rows.shape[1] == 1 else rows


def fit_reader(
    features: Features,
    truth: Floats,
    *,
    kind: Kind,
    penalties: Floats = PENALTIES,
    folds: int = NUM_FOLDS,
    seed: int = 0,
) -> Reader:
    """Logistic regression of classes or ridge regression of numbers, its penalty chosen by cross-validation.

    Everything is learnt from the given subjects: in each fold means, SDs and the reader from the other folds' subjects.
    Groups are not divided between folds. Of equal penalties the largest is taken.

    Args:
        features: of the training subjects.
        truth: (subjects,) numbers of classes or values; subjects with NaN are left out.
        kind: which of the two.
        penalties: to choose from, rising.
        folds: how many, or as many as there are groups (of the rarest class).
        seed: of the division into folds.

    Raises:
        UsageError: there is one class or one value only, or too few groups for two folds.
        MissingExtraError: scikit-learn is not installed.
    """
    require_scikit_learn()
    known = np.flatnonzero(np.isfinite(truth))
    values, truth = features.values[known], np.asarray(truth, dtype=np.float64)[known]
    if len(np.unique(truth)) < 2:
        raise UsageError(
            f"a baseline cannot be fitted to {len(truth)} training subjects of one class or value; choose another target"
        )
    losses, count = np.zeros(len(penalties)), 0
    for train, held in _folds(truth, [features.group[row] for row in known], kind=kind, folds=folds, seed=seed):
        rotated = _Rotated.of(values[train])
        losses += _held_out_losses(rotated, truth[train], values[held], truth[held], kind=kind, penalties=penalties)
        count += len(held)
    if not count:
        raise UsageError("every fold of the training subjects lacks a class, groups being kept whole; group by less")
    losses /= count
    chosen = np.flatnonzero(losses <= losses.min() * (1 + 1e-12))[-1]
    rotated = _Rotated.of(values)
    final = _Fit.of(rotated, truth, kind=kind, penalty=penalties[chosen])
    return Reader(
        kind=kind,
        classes=np.unique(truth) if kind == "classification" else np.zeros(0),
        centre=rotated.centre,
        scale=rotated.scale,
        weights=rotated.unrotated(final.weights),
        offset=final.offset,
        penalty=float(penalties[chosen]),
        losses=losses,
    )


def require_scikit_learn() -> None:
    """Raise before the work starts if nothing can be fitted.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("baselines need scikit-learn: pip install 'fmristream[train]'") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rotated:
    """Training rows in as few coordinates as they span.

    With a squared penalty, coefficients are combinations of the training rows, so that nothing is lost, and 80,000
    correlations of 500 subjects become 499 numbers. They come from the rows' products: as precise as needed (see
    _LEAST_VARIANCE), and a tenth of the time of a singular value decomposition.
    """

    centre: Floats
    scale: Floats
    axes: Floats | None  # (features, coordinates); None where there are fewer features than rows
    rows: Floats  # (n, coordinates) of the training subjects

    @classmethod
    def of(cls, values: Floats) -> "_Rotated":
        centre, scale = _scaling(values)
        rows = _scaled(values, centre, scale)
        if rows.shape[1] <= len(rows):
            return cls(centre=centre, scale=scale, axes=None, rows=rows)
        variances, directions = np.linalg.eigh(rows @ rows.T)
        kept = variances > _LEAST_VARIANCE * max(variances[-1], np.finfo(np.float64).tiny)
        lengths = np.sqrt(variances[kept])
        return cls(
            centre=centre,
            scale=scale,
            axes=rows.T @ (directions[:, kept] / lengths),
            rows=directions[:, kept] * lengths,
        )

    def project(self, values: Floats) -> Floats:
        """Other subjects' rows in the same coordinates."""
        rows = _scaled(values, self.centre, self.scale)
        return rows if self.axes is None else rows @ self.axes

    def unrotated(self, weights: Floats) -> Floats:
        """(coordinates, outputs) weights as (features, outputs)."""
        return weights if self.axes is None else self.axes @ weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Fit:
    """A reader of coordinates."""

    weights: Floats  # (coordinates, outputs)
    offset: Floats  # (outputs,)

    @classmethod
    def of(cls, rotated: _Rotated, truth: Floats, *, kind: Kind, penalty: float) -> "_Fit":
        from sklearn.linear_model import LogisticRegression, Ridge

        model: Any
        if kind == "regression":
            mean, sd = truth.mean(), truth.std()
            model = Ridge(alpha=penalty).fit(rotated.rows, (truth - mean) / sd)
            return cls(weights=sd * model.coef_[:, None], offset=np.array([mean + sd * model.intercept_]))
        # Far beyond what a score needs: what is chosen must not hang on where an optimiser stopped.
        model = LogisticRegression(C=1 / penalty, tol=1e-7, max_iter=10_000).fit(rotated.rows, truth)
        return cls(weights=model.coef_.T, offset=model.intercept_)

    def scores(self, rows: Floats) -> Floats:
        """(n, outputs)"""
        return np.asarray(rows @ self.weights + self.offset)


def _held_out_losses(
    rotated: _Rotated, truth: Floats, held: Floats, held_truth: Floats, *, kind: Kind, penalties: Floats
) -> list[float]:
    """The summed loss of each penalty over one fold's held-out subjects."""
    from threadpoolctl import threadpool_limits

    rows = rotated.project(held)
    # Many small fits: threads only wait for each other, ten times as long where others want the cores too.
    with threadpool_limits(1):
        fits = [_Fit.of(rotated, truth, kind=kind, penalty=penalty) for penalty in penalties]
    return [_loss(fit.scores(rows), held_truth, truth, kind) for fit in fits]


def _scaling(values: Floats) -> tuple[Floats, Floats]:
    """(centre, scale) of each feature over the rows in which it is known."""
    known = np.isfinite(values)
    counts = np.maximum(known.sum(axis=0), 1)
    centre = np.where(known, values, 0).sum(axis=0) / counts
    sd = np.sqrt((np.where(known, values - centre, 0) ** 2).sum(axis=0) / counts)
    varies = sd > _CONSTANT * np.abs(centre)
    scale = np.where(varies, 1 / np.where(varies, sd, 1), 0)
    return centre, scale / np.sqrt(max(1, int(varies.sum())))


def _scaled(values: Floats, centre: Floats, scale: Floats) -> Floats:
    """Scaled features; what is not known is the training subjects' mean."""
    return np.where(np.isfinite(values), (values - centre) * scale, 0.0)


def _folds(
    truth: Floats, group: Sequence[str], *, kind: Kind, folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(training rows, held-out rows) of each fold; folds whose training rows lack a class are left out."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    _, groups = np.unique(np.asarray(group), return_inverse=True)
    members = (
        [np.unique(groups[truth == value]) for value in np.unique(truth)] if kind == "classification" else [groups]
    )
    number = min(folds, *(len(np.unique(one)) for one in members))
    splitter: Any
    if number >= 2:
        if kind == "classification":
            splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        else:
            splitter = GroupKFold(number)
        for train, held in splitter.split(truth[:, None], truth, groups):
            if len(np.unique(truth[train])) == len(np.unique(truth)) or kind == "regression":
                yield train, held
        return
    raise UsageError(
        f"a baseline's penalty is chosen by cross-validation, which needs 2 groups of subjects of every class or more; the "
        f"{len(truth)} training subjects have {min(len(np.unique(one)) for one in members)} in the rarest"
    )


def _loss(scores: Floats, truth: Floats, train_truth: Floats, kind: Kind) -> float:
    """Summed over held-out subjects."""
    if kind == "regression":
        return float(((scores[:, 0] - truth) ** 2).sum())
    number = np.searchsorted(np.unique(train_truth), truth)
    logits = np.concatenate([np.zeros_like(scores), scores], axis=1) if scores.shape[1] == 1 else scores
    return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(truth)), number]).sum())
