"""A finished run of each kind that is used here, made once."""

import pytest

from train.main import main

SMALL = """
[data]
url = "{url}"
window = 8
stride = 7
{data}
[model]
patch_size = [3, 3, 3, 1]
embed_dim = 6
depths = [1, 1]
num_heads = [1, 2]
window_size = [2, 2, 2, 4]
first_window_size = [2, 2, 2, 4]
{objective}
[train]
steps = {steps}
batch_size = 4
checkpoint_every = 5
[eval]
bootstrap_draws = 50
"""


@pytest.fixture(scope="session")
def train_small(tmp_path_factory):
    """Train by the command line; gives the run's folder."""

    def run(url, *, data="", objective="", steps=6):
        out = tmp_path_factory.mktemp("trained")
        recipe = out / "small.toml"
        recipe.write_text(SMALL.format(url=url, data=data, objective=objective, steps=steps))
        assert main([str(recipe), "--out", str(out / "run")]) == 0
        return out / "run"

    return run


@pytest.fixture(scope="session")
def trained_sex(cohort, train_small):
    """Classification, a few steps."""
    return train_small(cohort, steps=8)
