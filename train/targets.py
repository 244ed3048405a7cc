"""The targets of a run: each coded by its training subjects, and the outputs of a network dealt to them in order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmristream.errors import UsageError
from train.config import Recipe
from train.data import Part
from train.objectives import Objective, make_objective, require_known_classes


def objectives_of(recipe: Recipe, parts: Mapping[str, Part]) -> tuple[Objective, ...]:
    """The targets in the order of the network's outputs, coded by the training subjects alone; none without a target.

    Raises:
        UsageError: a column does not fit, or other subjects have classes that those of training lack.
    """
    return tuple(_objective(recipe, target, parts) for target in recipe.targets)


def objective_of(recipe: Recipe, parts: Mapping[str, Part]) -> Objective | None:
    """The only target, for those that read one; None for objectives without a target.

    Raises:
        UsageError: as for `objectives_of`, or there are several.
    """
    if len(recipe.targets) > 1:
        raise UsageError(
            f"objective.kind 'multitask' has {len(recipe.targets)} targets ({', '.join(recipe.targets)}), and one is read here; "
            "give objective.kind 'classification' or 'regression' and data.target"
        )
    found = objectives_of(recipe, parts)
    return found[0] if found else None


def blank_objectives(recipe: Recipe) -> tuple[Objective, ...]:
    """The targets as far as the recipe tells them: words of a column count as two classes until the data say more."""
    return tuple(Objective(kind=kind, target=target) for target, kind in recipe.targets.items())


def num_outputs(objectives: Sequence[Objective]) -> int | None:
    """How many numbers a network gives per window; None where nothing is to be scored."""
    return sum(objective.outputs for objective in objectives) or None


def saved_outputs(state: Mapping[str, Any]) -> int | None:
    """How many outputs a checkpoint's objective gave its network; None where it had no target."""
    if state.get("kind") == "multitask":
        return sum(saved_outputs(one) or 0 for one in state["objectives"])
    return (len(state.get("classes", ())) or 1) if state.get("kind") in ("classification", "regression") else None


def dealt(objectives: Sequence[Objective], outputs: Tensor) -> tuple[Tensor, ...]:
    """(b, outputs of all) as one (b, outputs) for each objective."""
    return torch.split(outputs, [objective.outputs for objective in objectives], dim=1)


def summed_losses(objectives: Sequence[Objective], outputs: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """(b,) float32: the weighted losses of a sample's known targets, added; 0 where it has none."""
    pairs = zip(objectives, dealt(objectives, outputs), strict=True)
    losses = [objective.losses(own, targets[objective.target]) for objective, own in pairs]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)


def joined_scores(objectives: Sequence[Objective], outputs: Tensor) -> Tensor:
    """(b, columns) float32: the scores of each objective side by side; as many columns as outputs."""
    pairs = zip(objectives, dealt(objectives, outputs), strict=True)
    return torch.cat([one.scores(own).view(len(own), one.outputs) for one, own in pairs], dim=1)


def _objective(recipe: Recipe, target: str, parts: Mapping[str, Part]) -> Objective:
    asked = recipe.objective
    values = {name: np.array(part.clips.target_values[target], dtype=np.float64) for name, part in parts.items()}
    objective = make_objective(
        recipe.targets[target],
        target,
        labels=parts["train"].clips.target_labels[target],
        train_values=values["train"],
        loss=asked.loss or "mse",
        huber_delta=asked.huber_delta or 1.0,
        weight=(asked.weights or {}).get(target, 1.0),
        balance=bool(asked.balance),
    )
    for name, known in values.items():
        require_known_classes(objective, known, split=name)
    return objective
