"""A run while it goes on, what all ranks know of a step, and how it ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from train.config import Recipe
from train.data import Part
from train.evaluate import Subjects, Windows
from train.launch import World
from train.predictions import PredictionTable
from train.report import Log
from train.tasks import Task

if TYPE_CHECKING:
    from fmristream.stream.augment import Compose


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
    network: nn.Module  # the model, or the model in DDP
    optimizer: torch.optim.Optimizer
    log: Log
    augment: "Compose | None" = None
    step: int = 0  # optimiser steps done

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
