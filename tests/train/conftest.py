"""A small converted cohort and a net that takes milliseconds a step."""

import pytest
import torch

from fmristream import convert
from fmristream.ingest.options import ConvertOptions
from train.config import recipe_from


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Nets this small are fastest on one thread, by far so where other tests want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """20 subjects (10 train, 4 val, 6 test) of 36 frames: 50 training windows of 8 frames every 7."""
    url = str(tmp_path_factory.mktemp("cohort") / "dataset")
    source = "synth://?subjects=20&shape=12x12x12&frames=36&effect=coupling&strength=1.6"
    convert(source, url, options=ConvertOptions(split="exact", split_ratios=(0.5, 0.2, 0.3)))
    return url


@pytest.fixture
def small_recipe(cohort):
    """Make a recipe for the cohort; keywords are sections and what to change in them."""

    def make(**sections):
        tables = {
            "data": {"url": cohort, "window": 8, "stride": 7},
            "model": {
                "patch_size": [3, 3, 3, 1],
                "embed_dim": 6,
                "depths": [1, 1],
                "num_heads": [1, 2],
                "window_size": [2, 2, 2, 4],
                "first_window_size": [2, 2, 2, 4],
            },
            "train": {"steps": 12, "batch_size": 4, "checkpoint_every": 5, "keep_last": 9},
            "eval": {"bootstrap_draws": 50},
        }
        for section, changes in sections.items():
            tables.setdefault(section, {}).update(changes)
        return recipe_from(tables)

    return make
