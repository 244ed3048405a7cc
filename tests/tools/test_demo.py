"""What the demo tells the trainer is what the trainer takes."""

from itertools import pairwise
from pathlib import Path

import pytest

from tools.demo import DECODER, TINY, TUNING, training_command, two_processes
from train.build import check_recipe
from train.config import load_recipe

BEFORE = two_processes("mae4d_pretrain", TINY | DECODER, Path("out"))
AFTER = two_processes("mae4d_finetune", TINY | TUNING | {"start.from": "somewhere"}, Path("out"))


def recipe_of(command):
    """The recipe that a command of the demo trains."""
    words = command[command.index("train") + 1 :]
    return load_recipe(words[0], [after for word, after in pairwise(words) if word == "--set"])


@pytest.mark.parametrize(
    "command",
    [
        training_command(Path("cohort"), Path("out"), steps=8, checkpoint_every=4, seed=1),
        BEFORE,
        AFTER,
    ],
    ids=["swift", "pre-training", "fine-tuning"],
)
def test_a_recipe_of_the_demo_can_be_built(command):
    check_recipe(recipe_of(command))


def test_the_pair_of_the_demo_shares_its_encoder_and_its_input():
    before, after = recipe_of(BEFORE), recipe_of(AFTER)
    for name in ("size", "embed_dim", "depth", "num_heads", "patch_size"):
        assert before.model.options[name] == after.model.options[name]
    for name in ("window", "normalize", "grid"):
        assert getattr(before.data, name) == getattr(after.data, name)
    assert after.start.from_ == "somewhere"
