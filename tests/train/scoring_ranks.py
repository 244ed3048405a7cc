"""What one rank does in the test of scoring: `python scoring_ranks.py URL OUT`; also the pieces that the test uses itself.

A network that is not trained says something of three targets at once: two classes (with ties), a number, three classes.
"""

import hashlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from train import evaluate
from train.config import recipe_from
from train.data import open_part
from train.launch import join_world
from train.objectives import Objective
from train.predictions import FILE, encode, read_predictions, write_predictions
from train.report import report_text
from train.summary import report_of

OBJECTIVES = (
    Objective(kind="classification", target="sex", offset=0.0, scale=1.0),
    Objective(kind="regression", target="age", offset=30.0, scale=8.0),
    Objective(kind="classification", target="hand", classes=(0.0, 1.0, 2.0), names=("both", "left", "right")),
)
DRAWS = 60


class ThreeTargets:
    """A task whose rows are the scores of three objectives, one after the other."""

    target = "sex"

    def __init__(self, objectives=OBJECTIVES):
        self.objectives = objectives

    def losses(self, network, batch):
        raise NotImplementedError("nothing is trained here")

    def rows(self, network, batch):
        return network(batch.bold)

    def state(self):
        return {}


class Looks(nn.Module):
    """Five numbers of a window; the first is coarse, so that subjects tie."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.randn(5, 6 * 6 * 6, generator=torch.Generator().manual_seed(4)))

    def forward(self, bold):
        mean = bold.float().abs().mean(dim=(1, 5)).flatten(1)
        found = (mean[:, None, :] * self.weights).sum(dim=2)
        sex = (found[:, :1] * 2).round() / 2
        return torch.cat([sex, 30 + 4 * found[:, 1:2], found[:, 2:]], dim=1)


def recipe_of(url, **evaluation):
    """Windows of 4 frames every 3, in batches that no number of ranks divides."""
    return recipe_from(
        {
            "data": {"url": url, "window": 4, "stride": 3, "target": "sex", "columns": ["age", "hand"]},
            "eval": {"batch_size": 7, "bootstrap_draws": DRAWS, **evaluation},
        }
    )


def scored(recipe, world, objectives=OBJECTIVES):
    """The table of validation and test."""
    task = ThreeTargets(objectives)
    with ExitStack() as stack:
        parts = {name: open_part(recipe, split=name, seed=None, world=world, stack=stack) for name in ("val", "test")}
        about = evaluate.about_of(recipe, task=task, step=3, clips={name: part.clips for name, part in parts.items()})
        found = {
            name: (evaluate.predict(Looks(), part, task=task, world=world, bf16=False), part.clips)
            for name, part in parts.items()
        }
        return evaluate.table_of(found, task=task, about=about)


def write(table, out):
    """The files that a run leaves."""
    write_predictions(table, out / FILE)
    (out / "report.json").write_text(report_text(report_of(read_predictions(out / FILE))))


def main() -> None:
    url, out = sys.argv[1], Path(sys.argv[2])
    with join_world(timeout_s=60) as world:
        table = scored(recipe_of(url), world)
        digest = hashlib.sha256(encode(table)).hexdigest()
        (out / f"rank-{world.rank}.json").write_text(json.dumps({"size": world.size, "table": digest}))
        if world.is_main:
            write(table, out)


if __name__ == "__main__":
    main()
