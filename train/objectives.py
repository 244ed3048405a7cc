"""What the outputs of a network are held against: the loss of each window, and its score in the target's own unit."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from fmristream.errors import UsageError

Loss = Literal["mse", "l1", "huber"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One target, coded as (value - offset) / scale: to 0 and 1 by class, or to the training subjects' z.

    Attributes:
        kind: what it is.
        target: its column.
        offset: as above; 0 for several classes.
        scale: as above; 1 for several classes.
        classes: of more than two, their values in rising order; a network has an output for each.
        names: their words.
        loss: of numbers.
        huber_delta: where Huber's loss turns from square to straight, in SD.
        weight: of this target's loss beside those of others.
        class_weights: by what the loss of each class is multiplied, in rising order of their values; empty: by 1.
    """

    kind: Literal["classification", "regression"]
    target: str
    offset: float = 0.0
    scale: float = 1.0
    classes: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    loss: Loss = "mse"
    huber_delta: float = 1.0
    weight: float = 1.0
    class_weights: tuple[float, ...] = ()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return asdict(self)

    @property
    def outputs(self) -> int:
        """How many numbers the network gives per window."""
        return len(self.classes) or 1

    @property
    def values(self) -> tuple[float, ...]:
        """What known targets may be; empty for numbers."""
        if self.kind == "regression":
            return ()
        return self.classes or (self.offset, self.offset + self.scale)

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each window (b,) in float32; 0 where the target is missing."""
        known = torch.isfinite(targets)
        if self.classes:
            classes = torch.tensor(self.classes, device=targets.device)
            wanted = torch.where(known[:, None], (targets[:, None] == classes).float(), 0.0)
            distances = functional.cross_entropy(outputs.float(), wanted, reduction="none")
        else:
            wanted = torch.where(known, (targets - self.offset) / self.scale, 0.0)
            distances = self._distances(outputs.float().squeeze(-1), wanted)
        return torch.where(known, self.weight * self._by_class(distances, wanted), 0.0)

    def _by_class(self, distances: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The losses (b,), each times the weight of its class; `wanted` is 0 and 1, or one-hot."""
        if not self.class_weights:
            return distances
        weights = wanted.new_tensor(self.class_weights)
        return distances * (wanted @ weights if self.classes else torch.where(wanted > 0.5, weights[1], weights[0]))

    def _distances(self, predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if self.kind == "classification":
            return functional.binary_cross_entropy_with_logits(predicted, wanted, reduction="none")
        if self.loss == "huber":
            return functional.huber_loss(predicted, wanted, reduction="none", delta=self.huber_delta)
        distance = functional.mse_loss if self.loss == "mse" else functional.l1_loss
        return distance(predicted, wanted, reduction="none")

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """What a window says about its subject, float32: logit of the upper class or the value (b,), or all logits (b, k)."""
        predicted = outputs.float() if self.classes else outputs.float().squeeze(-1)
        return predicted if self.kind == "classification" else predicted * self.scale + self.offset

    def truth(self, targets: np.ndarray) -> np.ndarray:
        """Targets (float64) as the metrics want them: 0 and 1, or number of the class, or the value itself; NaN: no class."""
        if self.classes:
            matches = targets[:, None] == np.array(self.classes)
            return np.where(matches.any(axis=1), matches.argmax(axis=1), np.nan)
        return (targets - self.offset) / self.scale if self.kind == "classification" else targets


def make_objective(
    kind: Literal["classification", "regression"],
    target: str,
    *,
    labels: Sequence[str],
    train_values: np.ndarray,
    loss: Loss = "mse",
    huber_delta: float = 1.0,
    weight: float = 1.0,
    balance: bool = False,
) -> Objective:
    """The objective of a kind, its coding taken from the training subjects only.

    `loss` and `huber_delta` are of numbers, `balance` (weigh each class by its inverse frequency) is of classes; `weight`
    multiplies either's loss.
    """
    if kind == "regression":
        found = regression(target, labels=labels, train_values=train_values, loss=loss, huber_delta=huber_delta)
        return replace(found, weight=weight)
    found = classification(target, labels=labels, train_values=train_values)
    return replace(found, weight=weight, class_weights=balanced_weights(found, train_values) if balance else ())


def balanced_weights(objective: Objective, train_values: np.ndarray) -> tuple[float, ...]:
    """For each class n / (classes x n of that class), n training subjects with a class: their mean over subjects is 1."""
    known = train_values[np.isfinite(train_values)].astype(np.float32)
    counts = [int(np.sum(known == np.float32(value))) for value in objective.values]
    return tuple(sum(counts) / (len(counts) * count) for count in counts)


def classification(target: str, *, labels: Sequence[str], train_values: np.ndarray) -> Objective:
    """Classes: those of the words that training subjects have (of two, the first in sorted order is 0), or two numbers.

    Args:
        target: name of the column.
        labels: empty for a numeric column.
        train_values: one coded value per training subject, NaN where it is not known.
    """
    found = np.unique(train_values[np.isfinite(train_values)].astype(np.float32))  # as batches carry them
    if len(found) < 2 or (len(found) > 2 and not labels):
        raise UsageError(
            f"{target}: classification needs two classes among the training subjects, or several words, got "
            f"{_some([labels[int(code)] for code in found] if labels else (), found)}; "
            f"choose another data.target or objective.kind"
        )
    if len(found) == 2:
        low, high = float(found[0]), float(found[1])
        return Objective(kind="classification", target=target, offset=low, scale=high - low)
    names = tuple(labels[int(code)] for code in found)
    return Objective(kind="classification", target=target, classes=tuple(map(float, found)), names=names)


def regression(
    target: str,
    *,
    labels: Sequence[str],
    train_values: np.ndarray,
    loss: Loss = "mse",
    huber_delta: float = 1.0,
) -> Objective:
    """A number, standardised by its mean and SD over the training subjects; arguments as for classification."""
    known = train_values[np.isfinite(train_values)].astype(np.float64)
    found = np.unique(known)
    if labels or len(found) < 2:
        labels = [label for label in labels if not _is_number(label)] or labels  # one word makes a column words
        raise UsageError(
            f"{target}: regression needs numbers that differ between the training subjects, got {_some(labels, found)}; "
            f"choose another data.target or objective.kind"
        )
    return Objective(
        kind="regression",
        target=target,
        offset=float(known.mean()),
        scale=float(known.std()),
        loss=loss,
        huber_delta=huber_delta,
    )


def require_known_classes(objective: Objective, values: np.ndarray, *, split: str) -> None:
    """Raise UsageError where subjects of a split have a class that no training subject has."""
    if not objective.values:
        return
    known = values[np.isfinite(values)].astype(np.float32)
    strange = np.unique(known[~np.isin(known, np.array(objective.values, dtype=np.float32))])
    if len(strange):
        raise UsageError(
            f"{objective.target}: subjects of split {split!r} have classes that no training subject has "
            f"({len(strange)} of them, codes {_some((), strange)}); leave them out with data.where, or split otherwise"
        )


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _some(labels: Sequence[str], numbers: np.ndarray) -> str:
    """The values found, at most five of them."""
    values = [str(label) for label in labels] or [f"{number:g}" for number in numbers]
    return f"{', '.join(values[:5])}{', ...' if len(values) > 5 else ''}" if values else "no known value"
