"""What a run scored is what everybody takes from it, wherever its checkpoints lie; and who its weights have seen is told."""

import json
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from fmristream import convert
from fmristream.ingest.options import ConvertOptions
from train import build, export
from train.beyond.opened import open_for
from train.beyond.predict import score_windows, table_of
from train.beyond.trained import load_trained
from train.checkpoint import find_checkpoint
from train.config import load_recipe, recipe_from
from train.html_facts import gather
from train.html_origin import leaks_section
from train.launch import World
from train.leaks import read_audit
from train.units import units_of

TABLES = {
    "data": {"window": 8, "normalize": "parcels", "target": "age"},
    "model": {"name": "lstm", "hidden": 6},
    "objective": {"kind": "regression"},
    "eval": {"bootstrap_draws": 20, "baselines": False},
    "train": {"steps": 1, "batch_size": 3},
}


def tables(url, **sections):
    """The recipe above with other values in some sections."""
    own = {**TABLES, "data": {**TABLES["data"], "url": url}}
    return {name: {**own.get(name, {}), **sections.get(name, {})} for name in {**own, **sections}}


@pytest.fixture(scope="module")
def averaged(parcelled, train_tables):
    """A run that scored the running mean of its best weights, and keeps its checkpoints elsewhere."""
    train = {"steps": 6, "ema": 0.5, "eval_every": 1, "checkpoints": "memory://averaged/checkpoints", "keep_best": 1}
    return train_tables(**tables(parcelled, train=train, eval={"use": "best"}, optim={"lr": 0.1}))


def test_predictions_are_of_the_weights_that_were_scored_wherever_they_lie(averaged, parcelled):
    report = json.loads((averaged / "report.json").read_text())
    assert not (averaged / "checkpoints").exists()
    for source in (
        str(averaged),
        f"memory://averaged/checkpoints/step-{report['step']}",
        "memory://averaged/checkpoints/best",
    ):
        trained = load_trained(source)
        assert (trained.step, trained.weights_are) == (report["step"], "the running mean (train.ema)")
        assert any("running mean" in note for note in trained.notes)
        with ExitStack() as stack:
            opened = open_for(trained, parcelled, split="test", world=World(), stack=stack)
            table = table_of(opened, score_windows(opened), url=parcelled, split="test")
        found = units_of(table, table.about.targets[0], unit="subject")
        assert found.score.tolist() == [row["score"] for row in report["test"]["subjects"]]
    assert trained.content_digest


def test_export_and_start_take_the_same_weights(averaged, tmp_path):
    scored, bare = load_trained(str(averaged)), find_checkpoint(averaged)[0].section("model")
    assert any(not torch.equal(tensor, bare[name]) for name, tensor in scored.weights.items())
    arguments = [str(averaged), "--to", str(tmp_path / "w.safetensors"), "--set", "parcels=27", "--set", "frames=8"]
    assert export.main(arguments) == 0
    exported = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in scored.weights.items())
    recipe = load_recipe(str(averaged / "recipe.toml"))
    recipe = recipe_from(tables(recipe.data.url, start={"from": str(averaged)}))
    model = build.make_model(recipe, scored.signal, outputs=1)
    begun = build.begin(recipe, model)
    assert begun.origin.averaged
    begin = [name for name in model.state_dict() if name not in begun.ignored and "head" not in name]
    assert begin
    assert all(torch.equal(model.state_dict()[name], scored.weights[name]) for name in begin)


@pytest.mark.parametrize(("split", "shared"), [("train", 0), ("test", 3)])
def test_whom_the_weights_were_trained_on_is_held_against_validation_and_test(parcelled, train_tables, split, shared):
    none = {"train_split": split, "val_split": "", "test_split": ""}
    first = train_tables(**tables(parcelled, data=none))
    second = train_tables(**tables(parcelled, start={"from": str(first)}))
    start = read_audit(second)["start"]
    assert start["known"]
    by_part = {pair["other"]: pair["same_subject"] for pair in start["pairs"]}
    assert by_part == {"val": 0, "test": shared}
    assert ("nobody of validation and test" in start["says"]) == (shared == 0)
    assert start["says"] in str(leaks_section(gather(second)))
    logged = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    assert [entry["says"] for entry in logged if entry["event"] == "audit of start.from"] == [start["says"]]
    assert [entry["weights"] for entry in logged if entry["event"] == "begin"] == ["as the last step left them"]


def test_weights_of_other_data_are_not_known_to_be_free_of_leaks(parcelled, train_tables, tmp_path):
    other = str(tmp_path / "other")
    options = ConvertOptions(split="exact", split_ratios=(0.5, 0.25, 0.25))
    convert("synth://?subjects=8&shape=12x12x12&frames=16&seed=9", other, options=options)
    volumes = {
        "data": {"normalize": "voxel-zscore"},
        "model": {"name": "cnn_rnn", "channels": [4, 4], "norm_groups": 2},
    }
    first = train_tables(**tables(other, **volumes))
    start = read_audit(train_tables(**tables(parcelled, **volumes, start={"from": str(first)})))["start"]
    assert (start["known"], start["pairs"]) == (False, [])
    assert "not known: they were trained on other data" in start["says"]
