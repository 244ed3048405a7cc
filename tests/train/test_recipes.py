"""Every shipped recipe from the first step to the report, on a small cohort; pre-training hands its weights over."""

import json
import math

import pytest
import torch

from tests.train.test_tasks import DECODER, TFF, TOKENS, VIT
from train.checkpoint import newest_whole
from train.config import RECIPES, load_recipe
from train.log import read_history
from train.main import main

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
# What makes a recipe small, by the beginning of its name or of its model's: sections, keys, values.
GRID = {"data.grid": [12, 12, 12]}
SMALL = {
    "swift": GRID
    | {
        "model.patch_size": [3, 3, 3, 1],
        "model.embed_dim": 6,
        "model.depths": [1, 1],
        "model.num_heads": [1, 2],
        "model.window_size": [2, 2, 2, 4],
        "model.first_window_size": [2, 2, 2, 4],
    },
    "tff": GRID | {"data.normalize": "tff"} | {f"model.{name}": value for name, value in TFF.items()},
    "brainlm": {"model.timepoint_patching_size": 4, "model.conv_kernel_size": 3}
    | {f"model.{name}": value for name, value in TOKENS.items()},
    "mae4d": GRID | {f"model.{name}": value for name, value in VIT.items()},
    "mae4d_pretrain": {f"model.{name}": value for name, value in DECODER.items()},
    "cnn_rnn": GRID | {"model.channels": [4, 4], "model.norm_groups": 2, "model.hidden": 6},
    "mlp": {"model.hidden": [6]},
    "lstm": {"model.hidden": 6},
    "tff3_probe": {"start.freeze": ["encoder.", "into_bert.", "transformer."]},
    "brainlm_forecast": {"data.context": 4, "objective.mask_frames": 4},
}
# Pre-training, what begins with it, and the part of the network that both have.
PAIRS = [
    ("swift_contrastive", "swift_finetune", "model."),
    ("swift_contrastive", "swift_probe", "model."),
    ("tff1", "tff2", "encoder."),
    ("tff2", "tff3", "encoder."),
    ("tff2", "tff3_probe", ("encoder.", "transformer.")),
    ("brainlm_pretrain", "brainlm_finetune", "model.vit."),
    ("brainlm_pretrain", "brainlm_probe", "model.vit."),
    ("mae4d_pretrain", "mae4d_finetune", "encoder."),
    ("mae4d_pretrain", "mae4d_probe", "encoder."),
]
# A number, two words, three words.
KINDS = {"regression": ("age", 1), "classification": ("sex", 1), "several classes": ("hand", 3)}
BEFORE = {second: first for first, second, _ in PAIRS}


def overrides(name, url, **changes):
    """What `--set` says so that a recipe takes two small steps."""
    recipe = load_recipe(name)
    window = {0: 0, 1: 1, 20: 4 if name.startswith("tff") else 8}.get(recipe.data.window, 8)
    values = {
        "data.url": url,
        "data.window": window,
        "data.threads": 1,
        "data.prefetch_batches": 1,
        "optim.warmup_steps": min(1, recipe.optim.warmup_steps),
        "train.steps": 2,
        "train.batch_size": 3,
        "train.eval_every": 1,
        "train.checkpoint_every": 1,
        "eval.bootstrap_draws": 10,
    }
    if recipe.data.stride is not None:
        values["data.stride"] = window
    for beginning, small in SMALL.items():
        values |= small if name.startswith(beginning) else {}
    return [part for key, value in (values | changes).items() for part in ("--set", f"{key}={json.dumps(value)}")]


def run(name, url, out, **changes):
    assert main([name, "--out", str(out), "--nproc", "1", *overrides(name, url, **changes)]) == 0
    assert [math.isfinite(step["loss"]) for step in read_history(out / "log.jsonl").steps] == [True, True]
    assert (out / "report.json").is_file()
    return newest_whole(out / "checkpoints")[0]


@pytest.fixture(scope="module")
def pretrained(parcelled, tmp_path_factory):
    """The folder of a run of a recipe that others begin with, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            run(name, parcelled, made[name], **start_of(name))
        return made[name]

    def start_of(name):
        return {"start.from": str(folder(BEFORE[name]))} if name in BEFORE else {}

    return folder


def hand_over(pretrained, parcelled, out, pair, kind):
    """Learn a target of a kind from what was pre-trained; the parts of both, before and after."""
    first, second, shared = pair
    target, outputs = KINDS[kind]
    learnt = {"data.target": target, "objective.kind": "regression" if kind == "regression" else "classification"}
    task = {} if second == "tff2" else learnt
    folder = pretrained(first)
    after = run(second, parcelled, out, **{"start.from": str(folder)}, **task)
    (begun,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"begin"' in line]
    assert begun["tensors"] > 5
    heads = [tensor for name, tensor in after.model.items() if "head" in name and name.endswith("bias")]
    assert second == "tff2" or any(len(head) == outputs for head in heads)
    before = newest_whole(folder / "checkpoints")[0].model
    names = {name: name.removeprefix("model.") if first == "brainlm_pretrain" else name for name in after.model}
    parts = {new: old for new, old in names.items() if new.startswith(shared) and old in before}
    assert len(parts) > 5
    return [torch.equal(after.model[new], before[old]) for new, old in parts.items()]


def test_a_pair_of_recipes_pre_trains_and_probes(pretrained, parcelled, tmp_path):
    same = hand_over(pretrained, parcelled, tmp_path, PAIRS[-1], "several classes")
    assert all(same)  # a probe leaves the network as it is


@pytest.mark.full
@pytest.mark.parametrize(
    ("pair", "kind"),
    # Phase 2 of TFF has no target.
    [(pair, kind) for pair in PAIRS for kind in KINDS if pair[1] != "tff2" or kind == "regression"],
    ids=lambda part: part if isinstance(part, str) else f"{part[0]}-{part[1]}",
)
def test_what_was_pre_trained_is_fine_tuned_and_probed_for_every_kind_of_target(
    pretrained, parcelled, tmp_path, pair, kind
):
    same = hand_over(pretrained, parcelled, tmp_path, pair, kind)
    assert all(same) if pair[1].endswith("probe") else not all(same)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_from_the_first_step_to_the_report(pretrained, parcelled, tmp_path, name):
    start = {"start.from": str(pretrained(BEFORE[name]))} if name in BEFORE else {}
    checkpoint = run(name, parcelled, tmp_path, **start)
    assert checkpoint.step == 2
    assert main([name, "--out", str(tmp_path), "--nproc", "1", *overrides(name, parcelled, **start)]) == 0
    assert [step["step"] for step in read_history(tmp_path / "log.jsonl").steps] == [1, 2]  # nothing is done twice


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_begins_with_is_a_recipe_too(name):
    source = load_recipe(name).start.from_
    assert source == (f"runs/{BEFORE[name]}" if name in BEFORE else "")
