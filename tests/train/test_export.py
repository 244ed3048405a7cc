"""What a run learnt leaves it whole: weights come back bit for bit, programs compute the same, and neither names a place."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fmristream.errors import UsageError
from tests.train.models.tiny_networks import NETWORKS, OPTIONS, example, network
from tools import import_checkpoint
from train import export
from train.checkpoint import Checkpoint, save_checkpoint
from train.config import ModelConfig, Recipe, as_tables, recipe_from
from train.export import (
    example_inputs,
    export_program,
    export_safetensors,
    largest_difference,
    options_of,
    save_program,
)
from train.models.imported import load_imported
from train.models.load import WeightsError
from train.scored import Weights, find_weights

# What the trainer takes from the data, and a recipe may not say.
FROM_DATA = ("img_size", "outputs")


def recipe_of(name, *, with_grid=True, **changed):
    options = OPTIONS[name] | changed
    tables = {
        "model": {"name": name, **{key: value for key, value in options.items() if key not in FROM_DATA}},
        "data": {"url": "file:///home/somebody/hcp", "target": "sex"},
    }
    if "img_size" in options and with_grid:
        tables["data"] |= {"grid": options["img_size"][:3], "window": options["img_size"][3]}
    return recipe_from(tables)


def as_run(folder, model, recipe, steps=(3, 7)):
    """Checkpoints as the trainer writes them; the older ones hold other weights."""
    for step in steps:
        state = {"recipe": as_tables(recipe), "loader": {}}
        weights = {key: tensor + (step != steps[-1]) for key, tensor in model.state_dict().items()}
        save_checkpoint(
            folder / "checkpoints",
            Checkpoint(step=step, model=weights, optimizer={}, rng={"cpu": torch.zeros(1, 8)}, state=state),
            keep_last=5,
        )
    return folder


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_and_import_give_every_bit_back_and_nothing_is_asked(tmp_path, name, dtype):
    model = network(name).to(dtype)
    export_safetensors(model, tmp_path / "ours.safetensors", recipe_of(name))
    assert (
        import_checkpoint.main([str(tmp_path / "ours.safetensors"), "--as", name, "--out", str(tmp_path / "in")]) == 0
    )
    before, after = model.state_dict(), load_file(tmp_path / "in" / "model.safetensors")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key])
    again = load_imported(tmp_path / "in").to(dtype).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in before.items())


@pytest.fixture(scope="module")
def swift_program():
    """Made once for all: that takes seconds."""
    return export_program(network("swift"), example("swift"))


def assert_same_program(name, program, folder):
    model, inputs = network(name), example(name)
    save_program(program, folder / "model.pt2", model=model, example=inputs)
    loaded = torch.export.load(folder / "model.pt2").module()
    other_inputs = example(name, seed=9)
    assert largest_difference(model, loaded, other_inputs) <= 1e-6
    assert largest_difference(network(name, 3), loaded, other_inputs) > 1e-3, "the comparison can fail"


@pytest.mark.parametrize(
    "name",
    [
        "brainlm",
        *(pytest.param(name, marks=pytest.mark.full) for name in NETWORKS if name.startswith(("t", "brainlm-"))),
    ],
)
def test_a_program_computes_what_its_network_does(tmp_path, name):
    model = network(name).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    program = export_program(model, example(name))
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert_same_program(name, program, tmp_path)


def test_a_program_computes_what_its_network_does_without_masks_too(tmp_path, swift_program):
    assert_same_program("swift", swift_program, tmp_path)


def test_a_program_names_no_place_and_keeps_no_inputs(tmp_path, swift_program):
    model, (bold,) = network("swift"), example("swift")
    save_program(swift_program, tmp_path / "model.pt2", model=model, example=(bold,))
    root, row = str(Path(export.__file__).parents[1]).encode(), bold.flatten()[:16].numpy().tobytes()
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert any(b"scaled_dot_product" in data or b"softmax" in data for data in members.values()), (
        "the graph is looked at"
    )
    for data in members.values():
        assert root not in data
        assert str(Path.home()).encode() + b"/" not in data
        assert row not in data


def test_a_program_that_gives_other_numbers_is_not_kept(tmp_path, swift_program):
    with pytest.raises(WeightsError, match="the program differs from its network by"):
        save_program(swift_program, tmp_path / "model.pt2", model=network("swift", 5), example=example("swift"))
    assert list(tmp_path.iterdir()) == []


def test_programs_go_to_files_that_say_so(tmp_path, swift_program):
    with pytest.raises(UsageError, match=r"are written to \.pt2"):
        save_program(swift_program, tmp_path / "a.bin", model=network("swift"), example=example("swift"))


class Wayward(nn.Module):
    """Does different things for different values, which no program of tensor operations does."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x * 2


def test_a_network_that_cannot_be_a_program_is_told():
    with pytest.raises(WeightsError, match=r"Wayward: torch\.export cannot make it a program"):
        export_program(Wayward(), (torch.ones(2),))


def test_the_weights_file_tells_its_network_and_nothing_private(tmp_path):
    export_safetensors(network("swift"), tmp_path / "a.safetensors", recipe_of("swift"))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["fmristream"])
    expected = {key: value for key, value in OPTIONS["swift"].items() if key != "outputs"}
    unseen = {name: expected[name] for name in ("num_heads", "patch_size")}
    assert about == {"model": "swift", "options": expected, "network": unseen}
    assert b"somebody" not in (tmp_path / "a.safetensors").read_bytes()


def test_the_same_weights_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        export_safetensors(network("tff2"), tmp_path / f"{name}.safetensors", recipe_of("tff2"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_wrappers_leave_no_trace_in_the_names(tmp_path):
    model = network("tff1")
    export_safetensors(nn.DataParallel(model), tmp_path / "a.safetensors", recipe_of("tff1"))
    assert set(load_file(tmp_path / "a.safetensors")) == set(model.state_dict())


def test_files_are_not_replaced_unasked_and_not_left_half_written(tmp_path, monkeypatch):
    path, model = tmp_path / "a.safetensors", network("tff1")
    path.write_bytes(b"thesis")
    with pytest.raises(UsageError, match="is there already; give another name, or --force"):
        export_safetensors(model, path, recipe_of("tff1"))
    assert path.read_bytes() == b"thesis"
    monkeypatch.setattr(export.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        export_safetensors(model, path, recipe_of("tff1"), replace=True)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.safetensors", b"thesis")]
    monkeypatch.undo()
    mode = path.stat().st_mode
    export_safetensors(model, path, recipe_of("tff1"), replace=True)
    assert set(load_file(path)) == set(model.state_dict())
    assert path.stat().st_mode == mode, "as any new file's, not for its owner alone"
    with pytest.raises(UsageError, match=r"are written to \.safetensors"):
        export_safetensors(model, tmp_path / "a.pt", recipe_of("tff1"))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_newest_whole_checkpoint_of_a_run_is_exported(tmp_path, name, capsys):
    model = network(name)
    run = as_run(tmp_path / "run", model, recipe_of(name))
    arguments = [str(run), "--to", str(tmp_path / "w.safetensors")]
    assert export.main(arguments) == 0
    stored = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    assert f"{name} after 7 steps" in capsys.readouterr().out
    assert export.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert import_checkpoint.main([str(tmp_path / "w.safetensors"), "--as", name, "--out", str(tmp_path / "in")]) == 0
    restored = load_imported(tmp_path / "in").state_dict()
    assert all(torch.equal(tensor, restored[key]) for key, tensor in model.state_dict().items())


def test_a_run_that_averages_its_weights_is_exported_as_it_was_scored(tmp_path):
    model, recipe = network("swift"), recipe_of("swift")
    weights = model.state_dict()
    means = {name: one.detach() + 1 for name, one in model.named_parameters()}
    state, rng = {"recipe": as_tables(recipe), "loader": {}}, {"cpu": torch.zeros(1, 8)}
    kept = Checkpoint(step=3, model=weights, optimizer={}, rng=rng, state=state, extra={"ema": means})
    save_checkpoint(tmp_path / "checkpoints", kept, keep_last=1)
    exported = export.trained_network(find_weights(tmp_path), settings={})[0].state_dict()
    assert all(torch.equal(exported[name], mean) for name, mean in means.items())


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(tmp_path, capsys):
    run = as_run(tmp_path / "run", network("swift"), recipe_of("swift"))
    weights = run / "checkpoints" / "step-7" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert export.main([str(run), "--to", str(tmp_path / "w.safetensors")]) == 0
    told = capsys.readouterr()
    assert "step-7 is damaged and passed over" in told.err
    assert "after 3 steps" in told.out
    shutil.rmtree(run / "checkpoints" / "step-3")
    assert export.main([str(run), "--to", str(tmp_path / "v.safetensors")]) == 1
    assert "has no whole checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "v.safetensors").exists()


def test_a_program_is_written_beside_the_weights(tmp_path, capsys):
    run = as_run(tmp_path / "run", network("tff1"), recipe_of("tff1"))
    arguments = [
        str(run),
        "--to",
        str(tmp_path / "w.safetensors"),
        "--program",
        str(tmp_path / "p.pt2"),
        "--batch",
        "2",
    ]
    assert export.main(arguments) == 0
    assert "takes [2, 2, 9, 9, 9, 4] on a CPU" in capsys.readouterr().out
    bold = torch.cat([*example("tff1"), *example("tff1", seed=5)])
    program = torch.export.load(tmp_path / "p.pt2").module()
    assert largest_difference(network("tff1"), program, (bold,)) <= 1e-6


def test_a_grid_that_came_from_the_data_is_seen_or_asked_for(tmp_path, capsys):
    swift = as_run(tmp_path / "swift", network("swift"), recipe_of("swift", with_grid=False))
    assert export.main([str(swift), "--to", str(tmp_path / "swift.safetensors")]) == 0
    tff = as_run(tmp_path / "tff3", network("tff3"), recipe_of("tff3", with_grid=False))
    arguments = [str(tff), "--to", str(tmp_path / "tff3.safetensors")]
    assert export.main(arguments) == 2
    assert "img_size" in capsys.readouterr().err
    assert export.main([*arguments, "--set", "img_size=[9,9,9,4]"]) == 0


def test_options_that_a_recipe_leaves_to_the_network_are_its_defaults(tmp_path):
    options = {"patch_size": [2, 2, 2, 1], "embed_dim": 4, "depths": [2, 1], "num_heads": [1, 2]}
    recipe = recipe_from({"model": {"name": "swift", **options}, "data": {"grid": [8, 8, 8], "window": 4}})
    model = network("swift", window_size=[4] * 4, first_window_size=[4] * 4)
    run = as_run(tmp_path / "run", model, recipe)
    assert export.main([str(run), "--to", str(tmp_path / "w.safetensors")]) == 0
    out = tmp_path / "in"
    assert import_checkpoint.main([str(tmp_path / "w.safetensors"), "--as", "swift", "--out", str(out)]) == 0
    assert load_imported(out).model.config == model.model.config


def test_the_window_of_a_series_network_is_that_of_its_recipe():
    recipe = recipe_of("brainlm", num_timepoints_per_voxel=35)
    tables = as_tables(recipe)
    del tables["model"]["num_timepoints_per_voxel"]
    tables["data"]["window"] = 35
    state = network("brainlm").state_dict()
    checkpoint = Weights(step=1, tensors=state, averaged=False, state={"recipe": tables})
    assert export.trained_network(checkpoint, settings={})[0].window == 35


@pytest.mark.parametrize(("classes", "outputs"), [((), 1), ((0.0, 1.0, 2.0), 3)])
def test_a_network_under_names_of_our_own_is_built_by_the_recipe(monkeypatch, classes, outputs):
    monkeypatch.setattr(export, "family_of", lambda _: None)
    model = network("swift", outputs=outputs)
    state = {
        "recipe": as_tables(recipe_of("swift")),
        "objective": {"kind": "classification", "target": "sex", "classes": classes},
    }
    checkpoint = Weights(step=1, tensors=model.state_dict(), averaged=False, state=state)
    found, recipe = export.trained_network(checkpoint, settings={})
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert recipe.model.options["outputs"] == outputs
    with pytest.raises(WeightsError, match=r"step 1: \d+ names do not fit the model"):
        export.trained_network(checkpoint, settings={"embed_dim": 8})


def test_example_inputs_are_those_that_networks_take():
    for name in NETWORKS:
        model = network(name)
        inputs = example_inputs(model, OPTIONS[name], batch=2)
        assert len(inputs[0]) == 2
        if name != "brainlm":  # at 424 parcels; its forward pass is for the exported program
            export._with_plain_outputs(model)(*inputs)
    assert [tuple(tensor.shape) for tensor in example_inputs(network("brainlm"), {})] == [
        (1, 424, 20),
        (424, 3),
        (1, 424 * 4),
    ]
    series = example_inputs(nn.Linear(2, 2), {"parcels": 5, "frames": 7})
    assert [tuple(tensor.shape) for tensor in series] == [(1, 5, 7)]
    with pytest.raises(UsageError, match="its inputs are not known"):
        example_inputs(nn.Linear(2, 2), {})


def test_options_of_a_recipe_hold_its_grid():
    assert options_of(Recipe(model=ModelConfig(options={"a": 1}))) == {"a": 1}
    assert options_of(recipe_of("tff1"))["img_size"] == [9, 9, 9, 4]
