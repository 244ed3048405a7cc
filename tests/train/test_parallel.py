"""One process, DDP, FSDP, pieces of a batch and compiled networks take the same steps."""

import numpy as np
import pytest
import torch
from torch import nn

from fmristream.errors import UsageError
from tests.train.test_launch import finish, results, start_ranks
from train import loop
from train.config import as_toml, recipe_from
from train.launch import World
from train.parallel import blocks_of, spread
from train.report import read_history
from train.sections import TrainConfig

ALONE = World()
STEPS = 20
SWIFT = {
    "name": "swift",
    "patch_size": [3, 3, 3, 1],
    "embed_dim": 6,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": [2, 2, 2, 4],
    "first_window_size": [2, 2, 2, 4],
}
BRAINLM = {
    "name": "brainlm",
    "timepoint_patching_size": 4,
    "conv_kernel_size": 3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
}
SERIES = {"target": "age", "normalize": "parcels | voxel-zscore", "window": 8, "stride": 4}
# Name -> (data, model, objective). The last has parameters that get no gradient: its decoder, and SwiFT's keys' biases.
NETWORKS = {
    "swift": ({"window": 8, "stride": 7}, SWIFT, {"kind": "classification"}),
    "masked": (SERIES | {"target": None}, BRAINLM, {"kind": "masked", "mask_ratio": 0.5}),
    "series": (SERIES, BRAINLM, {"kind": "regression"}),
}
WAYS = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "ddp-pieces": {"accumulate": 4},
    "fsdp-pieces": {"parallel": "fsdp", "accumulate": 4},
    "fsdp-again": {"parallel": "fsdp", "checkpoint_every": 10, "ema": 0.9},
}


@pytest.fixture(scope="module")
def make(cohort, parcelled):
    """A recipe of one of the networks."""

    def _make(name, *, optim=None, **train):
        data, model, objective = NETWORKS[name]
        url = cohort if model is SWIFT else parcelled
        tables = {
            "data": {"url": url, **{key: value for key, value in data.items() if value is not None}, "test_split": ""},
            "model": model,
            "objective": objective,
            "optim": optim or {},
            "train": {"steps": STEPS, "batch_size": 8, "checkpoint_every": 100, "keep_last": 9} | train,
        }
        return recipe_from(tables)

    return _make


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory):
    """Losses, norms and validation of one process with the whole batch, by network."""
    found = {}
    for name in NETWORKS:
        out = tmp_path_factory.mktemp(name)
        outcome = loop.train(make(name), out=out, world=ALONE)
        steps = read_history(out / "log.jsonl").steps
        val = outcome.val.numbers["loss"] if name == "masked" else outcome.val.score
        found[name] = ([step["loss"] for step in steps], [step["gradient_norm"] for step in steps], val)
    return found


def on_ranks(size, recipes, folder):
    """What every rank found of each recipe."""
    (folder / "recipes").mkdir()
    for name, recipe in recipes.items():
        (folder / "recipes" / f"{name}.toml").write_text(as_toml(recipe))
    ended = finish(start_ranks(size, ["several", str(folder)], RECIPES=str(folder / "recipes")), timeout=300)
    assert [code for code, _ in ended] == [0] * size, ended
    return results(folder, "several", size)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, make, tmp_path_factory):
    """What two and three ranks found: with three, shares of 8 samples are 2, 3 and 3."""
    recipes = {f"{name}.{way}": make(name, **WAYS[way]) for name in NETWORKS for way in WAYS}
    return on_ranks(request.param, recipes, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", [way for way in WAYS if not way.endswith("again")])
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_norms_and_scores_are_those_of_one_process(alone, ranks, name, way):
    losses, norms, val = alone[name]
    for found in (rank[f"{name}.{way}"] for rank in ranks):
        np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
        np.testing.assert_allclose(found["norms"], norms, rtol=1e-4)
        np.testing.assert_allclose(found["val"], val, rtol=1e-4, atol=1e-5)
        assert found["val"] == ranks[0][f"{name}.{way}"]["val"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sharded_run_goes_on_bit_for_bit(ranks, name):
    found = ranks[0][f"{name}.fsdp-again"]
    assert len(found["whole"]["losses"]) == STEPS
    assert found["again"] == found["whole"]
