"""Finished runs and other data, made once."""

import pytest

from fmristream import convert
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from fmristream.synth.cohort import parse_url
from train.config import as_toml, recipe_from
from train.main import main

SWIFT = """
patch_size = [3, 3, 3, 1]
embed_dim = 6
depths = [1, 1]
num_heads = [1, 2]
window_size = [2, 2, 2, 4]
first_window_size = [2, 2, 2, 4]
"""
RECIPE = """
[data]
url = "{url}"
window = 8
stride = 7
{data}
[model]
{model}
[objective]
{objective}
[train]
steps = {steps}
batch_size = 4
checkpoint_every = 5
[eval]
bootstrap_draws = 50
{more}
"""


@pytest.fixture(scope="session")
def train_small(tmp_path_factory):
    """Train by the command line; gives the run's folder."""

    def run(url, *, data="", model=SWIFT, objective="", steps=4, more=""):
        out = tmp_path_factory.mktemp("trained")
        recipe = out / "small.toml"
        recipe.write_text(RECIPE.format(url=url, data=data, model=model, objective=objective, steps=steps, more=more))
        assert main([str(recipe), "--out", str(out / "run")]) == 0
        return out / "run"

    return run


@pytest.fixture(scope="session")
def trained_sex(cohort, train_small):
    """Classification, a few steps."""
    return train_small(cohort, steps=8)


@pytest.fixture(scope="session")
def convert_hands(tmp_path_factory):
    """Convert a cohort that nobody trained on, with a column `hand` of these words in turn."""

    def make(words, *, url="synth://?subjects=6&shape=12x12x12&frames=16&seed=9"):
        folder = tmp_path_factory.mktemp("hands")
        cohort = parse_url(url)
        rows = [f"{row['subject']},{words[place % len(words)]}" for place, row in enumerate(cohort.participants())]
        (folder / "people.csv").write_text("\n".join(["participant_id,hand", *rows]) + "\n")
        options = ConvertOptions(split="none", phenotypes=Phenotypes(url=str(folder / "people.csv")))
        convert(cohort.url(), str(folder / "dataset"), options=options)
        return str(folder / "dataset")

    return make


@pytest.fixture(scope="session")
def train_tables(tmp_path_factory):
    """Train a recipe given as tables, one step unless it says otherwise; gives the run's folder."""

    def run(**sections):
        out = tmp_path_factory.mktemp("trained")
        tables = {"train": {"steps": 1, "batch_size": 3}, "eval": {"bootstrap_draws": 20}} | sections
        (out / "small.toml").write_text(as_toml(recipe_from(tables)))
        assert main([str(out / "small.toml"), "--out", str(out / "run")]) == 0
        return out / "run"

    return run
