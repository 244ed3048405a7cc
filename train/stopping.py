"""Which weights were the best for validation subjects, and when no better ones are to be expected."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fmristream.errors import UsageError
from train.config import Recipe
from train.sections import METRICS


class Best:
    """The best look at validation until now; a `Keeper`.

    Attributes:
        metric: that is compared.
        patience: looks in a row without a better one after which it is over; 0: never.
        value: the best, None before the first look.
        step: where it was.
        waited: looks since then.
    """

    def __init__(self, metric: str, *, patience: int) -> None:
        self.metric = metric
        self.patience = patience
        self.value: float | None = None
        self.step = 0
        self.waited = 0

    @property
    def _more_is_better(self) -> bool:
        return METRICS[self.metric.rpartition(".")[2]]

    @property
    def is_over(self) -> bool:
        """Whether training should end."""
        return 0 < self.patience <= self.waited

    def see(self, numbers: Mapping[str, float], *, step: int) -> bool:
        """Take in a look; whether it is the best one, the earlier of two equals.

        Raises:
            UsageError: the metric is not among the numbers, or is not a number.
        """
        value = numbers.get(self.metric, math.nan)
        if not math.isfinite(value):
            raise UsageError(
                f"step {step}: validation gives no {self.metric!r} to tell the best weights by ({_told(numbers)}); set "
                "eval.metric to another, give validation subjects of both classes, or leave train.patience and eval.use out"
            )
        if self.value is not None and not (value > self.value if self._more_is_better else value < self.value):
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        return True

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {"metric": self.metric, "value": self.value, "step": self.step, "waited": self.waited}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        if facts["metric"] != self.metric:
            return  # the best by another measure says nothing; it begins anew
        self.value, self.step, self.waited = facts["value"], int(facts["step"]), int(facts["waited"])


def make_best(recipe: Recipe, *, classes: int) -> Best | None:
    """What the recipe asks for; None where the last weights are scored and nothing ends a run early.

    Args:
        recipe: of the run.
        classes: of the first target; 0 for a number, or where there is none.

    Raises:
        UsageError: validation is never looked at.
    """
    if not wants_best(recipe):
        return None
    if not (recipe.train.eval_every and recipe.data.val_split):
        raise UsageError(
            "train.patience and eval.use = 'best' choose by validation, which this recipe never looks at; set train.eval_every "
            "and data.val_split"
        )
    if uses_best(recipe) and not recipe.train.keep_best:
        raise UsageError(
            "eval.use = 'best' scores the best checkpoint, and train.keep_best = 0 keeps none; set it to 1"
        )
    return Best(recipe.eval.metric or _usual_metric(recipe, classes), patience=recipe.train.patience)


def wants_best(recipe: Recipe) -> bool:
    """Whether looks at validation decide anything."""
    return recipe.train.patience > 0 or uses_best(recipe)


def uses_best(recipe: Recipe) -> bool:
    """Whether the best weights are scored at the end, or the last ones."""
    return recipe.eval.use == "best" or (recipe.eval.use is None and recipe.train.patience > 0)


def _usual_metric(recipe: Recipe, classes: int) -> str:
    if not recipe.targets:
        return "loss"
    name, kind = next(iter(recipe.targets.items()))
    prefix = f"{name}." if len(recipe.targets) > 1 else ""
    if kind == "regression":
        return f"{prefix}mae"
    return f"{prefix}balanced_accuracy" if classes > 2 else f"{prefix}auroc"


def _told(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items()) or "it has no number"
