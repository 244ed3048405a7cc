"""An import is on disk whole or not at all, replaces nothing unasked, and names no machine and no user."""

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmristream.errors import UsageError
from tests.train.models.tiny_networks import NETWORKS, OPTIONS, example, network, published, run, unseen
from train.build import begin
from train.config import load_recipe, recipe_from
from train.models.checkpoint_files import read_checkpoint
from train.models.imported import load_imported, read_about, recipe_text, write_import
from train.models.importing import Told, fit_weights
from train.models.load import WeightsError

FILES = {"model.safetensors", "recipe.toml", "imported.json"}


def prepared(tmp_path, name="swift", dtype=torch.float32, **options):
    """A file and what was made of it."""
    path = tmp_path / "given" / "hcp.ckpt"
    path.parent.mkdir(exist_ok=True)
    heads = {"head": options.pop("head")} if "head" in options else {}
    torch.save({"state_dict": published(name, dtype=dtype, **heads), "hyper_parameters": unseen(name) | options}, path)
    file = read_checkpoint(path)
    return fit_weights(
        file.tensors, name, source=file.name, told=[Told(by="its hyper-parameters", options=file.options)]
    ), file


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_stored_as_they_were_bit_for_bit(tmp_path, name, dtype):
    fitted, file = prepared(tmp_path, name, dtype)
    write_import(tmp_path / "out", fitted, file)
    weights, stored = published(name, dtype=dtype), load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == set(network(name).state_dict())
    for key, tensor in stored.items():
        assert tensor.dtype == weights[key].dtype
        assert torch.equal(tensor, weights[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_an_import_gives_the_network_back(tmp_path, name):
    write_import(tmp_path / "out", *prepared(tmp_path, name))
    inputs = example(name)
    for ours, theirs in zip(
        run(load_imported(tmp_path / "out").eval(), inputs), run(network(name, 1), inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_training_does_not_begin_with_weights_that_are_not_those_that_were_imported(tmp_path):
    out = tmp_path / "out"
    write_import(out, *prepared(tmp_path))
    begins = {"data": {"target": "sex"}, "start": {"from": str(out)}}
    recipe = recipe_from(tomllib.loads((out / "recipe.toml").read_text()) | begins)
    begin(recipe, network("swift"))
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    with pytest.raises(WeightsError, match="not that of what was imported"):
        begin(recipe, network("swift"))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recipe_names_the_network_and_what_the_weights_fix(tmp_path, name):
    write_import(tmp_path / "out", *prepared(tmp_path, name))
    recipe = load_recipe(str(tmp_path / "out" / "recipe.toml"))
    size, frames = OPTIONS[name].get("img_size"), OPTIONS[name].get("num_timepoints_per_voxel")
    if size:
        assert (*recipe.data.grid, recipe.data.window) == tuple(size)
    elif frames:
        assert recipe.data.window == frames
    from_data = {"img_size", "in_chans", "outputs", "num_timepoints_per_voxel"}
    assert recipe.model.name == name
    assert dict(recipe.model.options) == {key: value for key, value in OPTIONS[name].items() if key not in from_data}


@pytest.mark.parametrize(("head", "said"), [("v1", True), ("v2", True), ("emb", False)])
def test_the_head_of_a_contrast_is_not_asked_of_the_next_run(tmp_path, head, said):
    fitted, file = prepared(tmp_path, head=head)
    assert (f'head = "{head}"' in recipe_text(fitted, file)) is said


def test_a_file_name_with_lines_in_it_cannot_write_into_the_recipe(tmp_path):
    fitted, file = prepared(tmp_path)
    text = recipe_text(fitted, replace(file, name='a\n[model]\nname = "other".ckpt'))
    assert text.count("[model]\n") == 1


def test_the_record_tells_source_options_and_reasons_and_no_place(tmp_path):
    fitted, file = prepared(tmp_path, dataset_path="/home/somebody/hcp", user="somebody")
    write_import(tmp_path / "out", fitted, file)
    about = read_about(tmp_path / "out")
    assert about["model"] == "swift"
    assert about["options"] == OPTIONS["swift"]
    assert about["known_from"]["embed_dim"] == "tensors"
    assert about["source"] | {"sha256": "", "bytes": 0} == {
        "name": "hcp.ckpt",
        "bytes": 0,
        "sha256": "",
        "layout": "Lightning",
        "stripped": "",
    }
    assert about["ignored"] == dict.fromkeys(
        ["model.norm.weight", "model.norm.bias"], "made by the published code but never applied"
    )
    assert about["tensors"] == len(network("swift").state_dict())
    assert about["dtypes"] == {"float32": about["tensors"]}
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        for private in (str(tmp_path), "somebody", Path.home().name + "/"):
            assert private.encode() not in content


def test_the_licence_of_the_weights_stays_with_them(tmp_path):
    write_import(tmp_path / "out", *prepared(tmp_path, "brainlm"))
    assert "CC BY-NC-ND 4.0" in read_about(tmp_path / "out")["licence"]


def test_who_may_read_an_import_is_for_the_umask_to_say(tmp_path):
    (tmp_path / "plain").write_text("")
    write_import(tmp_path / "out", *prepared(tmp_path))
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_weights_of_our_own_runs_are_not_given_the_published_licence(tmp_path):
    fitted, file = prepared(tmp_path, "brainlm")
    write_import(tmp_path / "out", fitted, replace(file, network="brainlm"))
    assert read_about(tmp_path / "out")["licence"].startswith("exported by this trainer")


def test_nothing_is_overwritten_unasked(tmp_path):
    fitted, file = prepared(tmp_path)
    out = tmp_path / "out"
    write_import(out, fitted, file)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = replace(fitted, tensors={name: tensor + 1 for name, tensor in fitted.tensors.items()})
    with pytest.raises(UsageError, match="is there already; give another --out, or --force"):
        write_import(out, changed, file)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write_import(out, changed, file, force=True)
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"given", "out"}


def test_force_replaces_an_import_and_nothing_else(tmp_path):
    fitted, file = prepared(tmp_path)
    (tmp_path / "empty").mkdir()
    write_import(tmp_path / "empty", fitted, file)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    (tmp_path / "note").write_text("...")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name, said in (
        ("thesis", "holds other things than an import"),
        ("note", "not a folder"),
        ("link", "not a fol"),
    ):
        with pytest.raises(UsageError, match=said):
            write_import(tmp_path / name, fitted, file, force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("force", [True, False])
def test_a_failure_half_way_leaves_nothing_or_what_was_there(tmp_path, monkeypatch, at, force):
    fitted, file = prepared(tmp_path)
    out = tmp_path / "out"
    if force:
        write_import(out, fitted, file)
    flushes = iter(range(9))

    def failing(_descriptor):
        if next(flushes) == at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        write_import(out, fitted, file, force=force)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == ({"given", "out"} if force else {"given"})
    if force:
        load_imported(out)


def test_tensors_that_share_memory_are_written_each_for_itself(tmp_path):
    _, file = prepared(tmp_path)
    weights = dict(published("swift"))
    rows = torch.randn(9, 4)
    for place, name in enumerate(["norm1.weight", "norm1.bias", "norm2.weight"]):
        weights[f"model.layers.0.blocks.0.{name}"] = rows[place]
    weights["model.layers.0.blocks.0.norm2.bias"] = rows[0]
    weights["model.patch_embed.fc.weight"] = torch.randn(8, 4).T
    told = [Told(by="its hyper-parameters", options=file.options)]
    write_import(tmp_path / "out", fit_weights(weights, "swift", source="w", told=told), file)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored.items())


def test_damage_is_told(tmp_path):
    out = tmp_path / "out"
    write_import(out, *prepared(tmp_path))
    weights, about = (out / "model.safetensors").read_bytes(), (out / "imported.json").read_text()
    (out / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(WeightsError, match="its sha256 is not that of what was imported"):
        load_imported(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors: cannot be read"):
        load_imported(out)
    for text in ("", "[]", "{}", json.dumps(json.loads(about) | {"format": 2}), '{"format": 1}'):
        (out / "imported.json").write_text(text)
        with pytest.raises(WeightsError, match=r"imported\.json: "):
            load_imported(out)
    with pytest.raises(WeightsError, match="give the folder of an import"):
        load_imported(tmp_path / "given")


def test_a_backbone_gets_a_head_that_begins_anew(tmp_path):
    _, file = prepared(tmp_path)
    told = [Told(by="its hyper-parameters", options=file.options)]
    fitted = fit_weights(file.tensors, "swift", source=file.name, told=told, backbone=True)
    write_import(tmp_path / "out", fitted, file)
    about, weights = read_about(tmp_path / "out"), published("swift")
    assert about["backbone_only"]
    assert about["ignored"]["output_head.head.bias"] == "the head of the task that the weights were trained on"
    model = load_imported(tmp_path / "out")
    assert torch.equal(model.model.patch_embed.fc.weight, weights["model.patch_embed.fc.weight"])
    assert not torch.equal(model.output_head.head.weight, weights["output_head.head.weight"])
