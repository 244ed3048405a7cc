"""What the outputs of a network are held against: the loss of each window, and its score in the target's own unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from fmristream.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One target, coded as (value - offset) / scale: to 0 and 1 by class, or to the training subjects' z."""

    kind: Literal["classification", "regression"]
    target: str
    offset: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """How many numbers the network gives per window."""
        return 1

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each window (b,) in float32; 0 where the target is missing."""
        known = torch.isfinite(targets)
        predicted = outputs.float().squeeze(-1)
        wanted = torch.where(known, (targets - self.offset) / self.scale, 0.0)
        if self.kind == "classification":
            losses = functional.binary_cross_entropy_with_logits(predicted, wanted, reduction="none")
        else:
            losses = functional.mse_loss(predicted, wanted, reduction="none")
        return torch.where(known, losses, 0.0)

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """What a window says about its subject (b,), float32: the logit of the upper class, or the value in its own unit."""
        predicted = outputs.float().squeeze(-1)
        return predicted if self.kind == "classification" else predicted * self.scale + self.offset

    def truth(self, targets: np.ndarray) -> np.ndarray:
        """Targets (float64) as the metrics want them: 0 and 1, or the value itself."""
        return (targets - self.offset) / self.scale if self.kind == "classification" else targets


def make_objective(
    kind: Literal["classification", "regression"], target: str, *, labels: Sequence[str], train_values: np.ndarray
) -> Objective:
    """The objective of a kind, its coding taken from the training subjects only."""
    make = classification if kind == "classification" else regression
    return make(target, labels=labels, train_values=train_values)


def classification(target: str, *, labels: Sequence[str], train_values: np.ndarray) -> Objective:
    """Two classes: a column of two labels (the first in sorted order is 0), or of two numbers (the smaller is 0).

    Args:
        target: name of the column.
        labels: empty for a numeric column.
        train_values: one coded value per training subject, NaN where it is not known.
    """
    found = np.unique(train_values[np.isfinite(train_values)].astype(np.float32))  # as batches carry them
    if len(labels) not in (0, 2) or len(found) != 2:
        raise UsageError(
            f"{target}: classification needs two classes among the training subjects, got {_some(labels, found)}; "
            f"choose another data.target or objective.kind"
        )
    low, high = float(found[0]), float(found[1])
    return Objective(kind="classification", target=target, offset=low, scale=high - low)


def regression(target: str, *, labels: Sequence[str], train_values: np.ndarray) -> Objective:
    """A number, standardised by its mean and SD over the training subjects; arguments as for classification."""
    known = train_values[np.isfinite(train_values)].astype(np.float64)
    found = np.unique(known)
    if labels or len(found) < 2:
        raise UsageError(
            f"{target}: regression needs numbers that differ between the training subjects, got {_some(labels, found)}; "
            f"choose another data.target or objective.kind"
        )
    return Objective(kind="regression", target=target, offset=float(known.mean()), scale=float(known.std()))


def _some(labels: Sequence[str], numbers: np.ndarray) -> str:
    """The values found, at most five of them."""
    values = [str(label) for label in labels] or [f"{number:g}" for number in numbers]
    return f"{', '.join(values[:5])}{', ...' if len(values) > 5 else ''}" if values else "no known value"
