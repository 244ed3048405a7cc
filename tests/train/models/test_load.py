"""Weights are loaded by name, completely, or refused with a table of what does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from fmristream.errors import UsageError
from train.models import build_model
from train.models.load import WeightsError, load_backbone, load_model, read_weights

OPTIONS = {
    "img_size": [8, 8, 8, 4],
    "patch_size": [2, 2, 2, 1],
    "embed_dim": 4,
    "depths": [1, 1],
    "num_heads": [1, 2],
}
NEVER_APPLIED = {"model.norm.weight": torch.ones(8), "model.norm.bias": torch.zeros(8)}
OLD_HEAD = {"model.head.weight": torch.ones(1, 8), "model.head.bias": torch.zeros(1)}


def published(seed=1, **options):
    torch.manual_seed(seed)
    return dict(build_model("swift", OPTIONS | options).state_dict()) | NEVER_APPLIED


def test_a_published_state_dict_loads_completely():
    weights, model = published(), build_model("swift", OPTIONS)
    loaded = load_model(model, weights, source="a.safetensors")
    assert loaded.tensors == len(model.state_dict()) == len(weights) - 2
    assert set(loaded.ignored) == set(NEVER_APPLIED)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_classifier_of_older_releases_is_left_out_with_a_reason():
    loaded = load_model(build_model("swift", OPTIONS), published() | OLD_HEAD, source="a.safetensors")
    assert "older releases" in loaded.ignored["model.head.weight"]


def test_a_backbone_loads_whatever_head_the_weights_have():
    model = build_model("swift", OPTIONS | {"head": "emb", "outputs": 128})
    before = {name: tensor.clone() for name, tensor in model.output_head.state_dict().items()}
    weights = published() | OLD_HEAD
    loaded = load_backbone(model.model, weights, source="a.safetensors")
    assert set(loaded.ignored) == {*NEVER_APPLIED, *OLD_HEAD, "output_head.head.weight", "output_head.head.bias"}
    assert torch.equal(model.model.patch_embed.fc.weight, weights["model.patch_embed.fc.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.output_head.state_dict().items())


def test_a_backbone_loads_from_names_without_prefix():
    backbone = build_model("swift", OPTIONS).model
    weights = {name.removeprefix("model."): t for name, t in published().items() if name.startswith("model.")}
    assert set(load_backbone(backbone, weights, source="a.safetensors").ignored) == set(NEVER_APPLIED)
    assert torch.equal(backbone.patch_embed.fc.weight, weights["patch_embed.fc.weight"])


def test_the_prefix_of_ddp_is_stripped():
    weights = {f"module.{name}": tensor for name, tensor in published().items()}
    model = build_model("swift", OPTIONS)
    load_model(model, weights, source="a.safetensors")
    assert torch.equal(model.output_head.head.weight, weights["module.output_head.head.weight"])


def test_misfits_are_listed_and_nothing_is_loaded():
    weights = published()
    weights["model.layers.0.blocks.0.norm1.weight"] = torch.ones(5)
    weights["model.layers.0.blocks.7.norm1.weight"] = torch.ones(4)
    del weights["output_head.head.bias"]
    model = build_model("swift", OPTIONS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_model(model, weights, source="hcp.safetensors")
    sentence, *rows = str(caught.value).splitlines()
    assert sentence.startswith("hcp.safetensors: 3 names do not fit the model")
    assert [row.split() for row in rows] == [
        ["shape", "model.layers.0.blocks.0.norm1.weight", "model", "[4]", "weights", "[5]"],
        ["missing", "output_head.head.bias", "model", "[1]", "weights", "-"],
        ["unexpected", "model.layers.0.blocks.7.norm1.weight", "model", "-", "weights", "[4]"],
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_size_give_a_short_table():
    with pytest.raises(WeightsError, match=r"\.\.\. and \d+ more"):
        load_model(build_model("swift", OPTIONS), published(embed_dim=8), source="hcp.safetensors")


def test_no_weights_at_all_are_refused():
    with pytest.raises(WeightsError, match="names do not fit"):
        load_backbone(build_model("swift", OPTIONS).model, {}, source="empty.safetensors")


def test_weights_are_read_from_whole_safetensors_only(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(3)}, path)
    assert torch.equal(read_weights(path)["a"], torch.arange(3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        read_weights(path)
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"from \.safetensors only"):
        read_weights(tmp_path / "last.ckpt")
