"""A run in shards goes on with another number of ranks, in shards, whole on each, or alone; average and best go along."""

import json
import shutil

import numpy as np
import pytest

from tests.train.test_parallel import SWIFT, on_ranks
from train import loop
from train.config import recipe_from
from train.launch import World
from train.log import read_history

STEPS, CUT = 16, 8
# Name -> (ranks, how they share the work); what the run in shards of 3 ranks was goes on so.
GOES_ON = {"in-shards": (2, "fsdp"), "whole": (2, "ddp"), "alone": (1, "ddp")}


@pytest.fixture(scope="module")
def make(cohort):
    """A recipe with an average of weights, recomputed activations and the best look at validation."""

    def _make(parallel="ddp", steps=STEPS, checkpointing=True):
        return recipe_from(
            {
                "data": {"url": cohort, "window": 8, "stride": 7, "test_split": ""},
                "model": SWIFT | {"checkpointing": checkpointing},
                "optim": {"schedule": "constant"},
                "eval": {"use": "best", "metric": "auroc", "bootstrap_draws": 10},
                "train": {
                    "steps": steps,
                    "batch_size": 8,
                    "accumulate": 2,
                    "ema": 0.9,
                    "eval_every": 4,
                    "checkpoint_every": CUT,
                    "keep_last": 9,
                    "parallel": parallel,
                },
            }
        )

    return _make


def looks(out):
    """What every look at validation found, by step, and the look whose weights were scored at the end."""
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = {event["step"]: event["auroc"] for event in events if event["event"] == "eval"}
    return seen, [event["step"] for event in events if event["event"] == "best"][-1]


@pytest.fixture(scope="module")
def undisturbed(make, tmp_path_factory):
    """A run of one process from the first to the last step."""
    out = tmp_path_factory.mktemp("undisturbed")
    outcome = loop.train(make(checkpointing=False), out=out, world=World())
    return outcome, out


@pytest.fixture(scope="module")
def cut(make, tmp_path_factory):
    """The folder of a run of 3 ranks in shards that took half of the steps."""
    folder = tmp_path_factory.mktemp("cut")
    on_ranks(3, {"cut": make("fsdp", CUT)}, folder)
    return folder / "ranks" / "cut"


@pytest.mark.full
@pytest.mark.parametrize("name", GOES_ON)
def test_a_run_in_shards_goes_on_with_other_ranks_as_if_it_had_been_alone(make, undisturbed, cut, tmp_path, name):
    size, parallel = GOES_ON[name]
    shutil.copytree(cut, tmp_path / "ranks" / name)
    ranks = on_ranks(size, {name: make(parallel)}, tmp_path)
    outcome, alone = undisturbed
    steps = read_history(alone / "log.jsonl").steps
    for rank in ranks:
        np.testing.assert_allclose(rank[name]["losses"], [step["loss"] for step in steps], rtol=1e-5)
        np.testing.assert_allclose(rank[name]["norms"], [step["gradient_norm"] for step in steps], rtol=1e-4)
        np.testing.assert_allclose(rank[name]["val"], outcome.val.score, rtol=1e-4, atol=1e-5)
    assert looks(tmp_path / "ranks" / name) == looks(alone)
    assert len(looks(alone)[0]) == STEPS // 4
