"""A run while it goes on, what all ranks know of a step, and how it ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from train.averaging import Ema
from train.checkpoint_async import Saver
from train.config import Recipe
from train.data import Part
from train.evaluate import Subjects, Windows
from train.launch import World
from train.log import Log
from train.predictions import PredictionTable
from train.scaling import LossScale
from train.stopping import Best
from train.tasks import Task

if TYPE_CHECKING:
    from fmristream.stream.augment import Compose


class Keeper(Protocol):
    """Something beside model and optimiser that a run must go on with: what a checkpoint keeps of it, and puts back."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What goes into `<name>.safetensors`; none where there is nothing."""

    def facts(self) -> Mapping[str, Any]:
        """What goes into state.json under `extra`: plain JSON."""

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Go on with what was kept."""


@dataclass(kw_only=True)
class Run:
    """What changes while training, and what it is made of."""

    recipe: Recipe
    out: Path
    world: World
    train: Part
    val: Part | None
    test: Part | None
    task: Task
    model: nn.Module
    network: nn.Module  # the model as a step calls it: in DDP, compiled, or the sharded model itself
    optimizer: torch.optim.Optimizer
    log: Log
    saver: Saver
    augment: "Compose | None" = None
    step: int = 0  # optimiser steps done
    look_is_due: bool = False  # at validation after this step: one that a signal broke off
    extra: dict[str, Keeper] = field(default_factory=dict)  # by the name that a checkpoint keeps it under

    @property
    def loss_scale(self) -> LossScale | None:
        """What losses are multiplied by in float16."""
        found = self.extra.get("scaler")
        assert found is None or isinstance(found, LossScale)
        return found

    @property
    def ema(self) -> Ema | None:
        """The weights' running mean, where there is one."""
        found = self.extra.get("ema")
        assert found is None or isinstance(found, Ema)
        return found

    @property
    def best(self) -> Best | None:
        """The best look at validation, where looks decide anything."""
        found = self.extra.get("best")
        assert found is None or isinstance(found, Best)
        return found

    @property
    def bf16(self) -> bool:
        precision = self.recipe.train.precision
        return precision == "bf16" or (precision == "auto" and self.world.device.type == "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a finished run: its scores by subject, or by window where there is no target.

    `val` and `test` are of the first target; all of them are in `table`, from which the report is made.
    """

    step: int
    task: Task
    val: Subjects | Windows | None
    test: Subjects | Windows | None
    table: PredictionTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What all ranks know of a step before it is taken."""

    loss: float  # of the global batch
    gradient_norm: float
    stopping: bool
    wait_s: float  # the longest that a rank waited for its batch
    windows: list[int]  # of the global batch, in order; empty where they are not logged
    overflows: bool = False  # the gradient has numbers that float16 lacks, and must be taken again
