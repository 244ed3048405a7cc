"""One process, DDP, FSDP, pieces of a batch and compiled networks take the same steps."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from fmristream.errors import UsageError
from tests.train.test_launch import finish, results, start_ranks
from train import loop
from train.config import as_toml, recipe_from
from train.launch import World
from train.log import read_history
from train.parallel import blocks_of, spread
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
# Name -> (data, model, objective). Parameters without a gradient: the decoder of the last, which is frozen.
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
    "fsdp-again": {"parallel": "fsdp", "checkpoint_every": 10, "ema": 0.9, "accumulate": 4},
    "ddp-compiled": {"compile": True, "compile_backend": "aot_eager"},
    "ddp-recompute": {"checkpointing": True, "accumulate": 2},
    "fsdp-recompute": {"checkpointing": True, "parallel": "fsdp", "accumulate": 2},
    "fsdp-compiled": {"parallel": "fsdp", "compile": True, "compile_backend": "aot_eager", "accumulate": 2},
}
QUICK = (("swift", "ddp-pieces"), ("swift", "fsdp-again"))


@pytest.fixture(scope="module")
def make(cohort, parcelled):
    """A recipe of one of the networks."""

    def _make(name, *, optim=None, checkpointing=False, **train):
        data, model, objective = NETWORKS[name]
        url = cohort if model is SWIFT else parcelled
        tables = {
            "data": {"url": url, **{key: value for key, value in data.items() if value is not None}, "test_split": ""},
            "model": model | ({"checkpointing": True} if checkpointing else {}),
            "objective": objective,
            "optim": optim or {},
            "train": {"steps": STEPS, "batch_size": 8, "checkpoint_every": 100, "keep_last": 9} | train,
        }
        return recipe_from(tables)

    return _make


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory):
    """Losses, norms and validation of one process with the whole batch, by network; each is trained once."""

    @functools.cache
    def found(name):
        out = tmp_path_factory.mktemp(name)
        outcome = loop.train(make(name), out=out, world=ALONE)
        steps = read_history(out / "log.jsonl").steps
        val = outcome.val.numbers["loss"] if name == "masked" else outcome.val.score
        return [step["loss"] for step in steps], [step["gradient_norm"] for step in steps], val

    return found


def on_ranks(size, recipes, folder, *, duty="several", timeout=300):
    """What every rank found of each recipe."""
    (folder / "recipes").mkdir()
    for name, recipe in recipes.items():
        (folder / "recipes" / f"{name}.toml").write_text(as_toml(recipe))
    ended = finish(start_ranks(size, [duty, str(folder)], RECIPES=str(folder / "recipes")), timeout=timeout)
    assert [code for code, _ in ended] == [0] * size, ended
    return results(folder, duty, size)


@pytest.fixture(scope="module")
def three(make, tmp_path_factory):
    """What three ranks found, whose shares of 8 samples are 2, 3 and 3."""
    recipes = {f"{name}.{way}": make(name, **WAYS[way]) for name, way in QUICK}
    return on_ranks(3, recipes, tmp_path_factory.mktemp("three"))


def assert_as_alone(expected, ranks, case):
    losses, norms, val = expected
    for found in (rank[case].get("whole", rank[case]) for rank in ranks):
        np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
        np.testing.assert_allclose(found["norms"], norms, rtol=1e-4)
        if not case.endswith("again"):  # which score averaged weights
            np.testing.assert_allclose(found["val"], val, rtol=1e-4, atol=1e-5)


def assert_goes_on(found):
    assert len(found["whole"]["losses"]) == STEPS
    assert found["again"] == found["whole"]


@pytest.mark.parametrize(("name", "way"), QUICK)
def test_uneven_shares_in_pieces_and_in_shards_take_the_steps_of_one_process(alone, three, name, way):
    assert_as_alone(alone(name), three, f"{name}.{way}")


def test_a_sharded_run_goes_on_bit_for_bit(three):
    assert_goes_on(three[0]["swift.fsdp-again"])


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_of_sharing_the_work_takes_the_steps_of_one_process(alone, make, tmp_path, name, size):
    ways = [way for way in WAYS if size == 2 or not way.endswith("compiled")]  # which takes most of the time
    ranks = on_ranks(size, {f"{name}.{way}": make(name, **WAYS[way]) for way in ways}, tmp_path)
    for way in ways:
        assert_as_alone(alone(name), ranks, f"{name}.{way}")
    assert_goes_on(ranks[0][f"{name}.fsdp-again"])


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_on_ranks_stays_near_the_exact_steps(alone, make, tmp_path, precision):
    recipes = {way: make("swift", precision=precision, accumulate=2, parallel=way) for way in ("ddp", "fsdp")}
    ranks = on_ranks(3, recipes, tmp_path)
    for way in recipes:
        assert ranks[0][way]["losses"] == ranks[2][way]["losses"]
        np.testing.assert_allclose(ranks[0][way]["losses"], alone("swift")[0], rtol=0.03)


@pytest.mark.parametrize("name", ["swift", pytest.param("masked", marks=pytest.mark.full)])
def test_a_compiled_network_takes_the_steps_of_the_eager_one(alone, make, tmp_path, name):
    recipe = make(name, compile=True, compile_backend="aot_eager", accumulate=2)
    loop.train(recipe, out=tmp_path, world=ALONE)
    steps = read_history(tmp_path / "log.jsonl").steps
    np.testing.assert_allclose([step["loss"] for step in steps], alone(name)[0], rtol=1e-5)
    np.testing.assert_allclose([step["gradient_norm"] for step in steps], alone(name)[1], rtol=1e-4)


@pytest.mark.full
def test_the_default_compiler_takes_the_steps_of_the_eager_network(alone, make, tmp_path):
    loop.train(make("series", compile=True), out=tmp_path, world=ALONE)
    steps = read_history(tmp_path / "log.jsonl").steps
    np.testing.assert_allclose([step["loss"] for step in steps], alone("series")[0], rtol=1e-5)


def test_an_unknown_compiler_is_refused_by_name():
    with pytest.raises(UsageError, match=r"no compiler 'indcutor'; it has .*inductor"):
        spread(nn.Linear(2, 2), ALONE, TrainConfig(compile=True, compile_backend="indcutor"))


def test_blocks_are_the_items_of_innermost_lists_or_those_that_a_model_names():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()])

    model = nn.Module()
    model.stages = nn.ModuleList([Stage(), Stage()])
    assert blocks_of(model) == [block for stage in model.stages for block in list(stage.blocks)[:2]]
    model.blocks_to_shard = [model.stages[0]]
    assert blocks_of(model) == [model.stages[0]]
    assert isinstance(model.stages[0].blocks[0].weight, torch.nn.Parameter)


def test_ranks_score_with_the_running_statistics_that_the_checkpoint_has(cohort, tmp_path):
    """Each rank's batch normalisation has followed its own windows."""
    tables = {
        "data": {"url": cohort, "window": 8, "stride": 14, "test_split": ""},
        "model": {"name": "cnn_rnn", "channels": [4, 4], "norm": "batch", "hidden": 6},
        "train": {"steps": 3, "batch_size": 4},
    }
    recipes = {way: recipe_from(tables | {"train": tables["train"] | {"parallel": way}}) for way in ("ddp", "fsdp")}
    for rank in on_ranks(2, recipes, tmp_path, duty="twice"):
        for trained, restarted in rank.values():
            assert trained == restarted
