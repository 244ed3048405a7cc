"""Every shipped recipe's network is cut into shards, and takes the steps that it takes whole on every rank."""

import numpy as np
import pytest

from tests.train.test_parallel import on_ranks
from tests.train.test_recipes import NAMES, overrides
from train.config import load_recipe

STEPS = 3
WAYS = ("ddp", "fsdp")


def sets_of(name, url, way):
    """What `--set` says, without the words themselves: small steps of ranks, from weights of the seed."""
    changes = {"start.from": "", "train.parallel": way, "train.steps": STEPS, "train.batch_size": 4}
    return [part for part in overrides(name, url, **changes) if part != "--set"]


@pytest.mark.full
def test_every_recipe_takes_the_same_steps_in_shards_as_whole_on_every_rank(parcelled, tmp_path):
    recipes = {f"{name}.{way}": load_recipe(name, sets_of(name, parcelled, way)) for name in NAMES for way in WAYS}
    for rank in on_ranks(2, recipes, tmp_path, timeout=550):
        for name in NAMES:
            whole, shards = (rank[f"{name}.{way}"] for way in WAYS)
            assert len(shards["losses"]) == STEPS
            np.testing.assert_allclose(shards["losses"], whole["losses"], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(shards["norms"], whole["norms"], rtol=1e-4, err_msg=name)
            np.testing.assert_allclose(shards["val"], whole["val"], rtol=1e-3, atol=1e-4, err_msg=name)
