"""Files of others are read as data: what a pickle would run is refused before it runs, and damage is told."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from fmristream.errors import UsageError
from train.models import checkpoint_files
from train.models.checkpoint_files import read_checkpoint
from train.models.load import WeightsError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(3)}


class Harmful:
    """Unpickling this makes a file: what a hostile checkpoint could do, made visible."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def assert_state(tensors):
    assert set(tensors) == set(STATE)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(
    ("name", "content", "layout"),
    [
        ("lightning.ckpt", {"state_dict": STATE, "hyper_parameters": {"embed_dim": 4}, "epoch": 3}, "Lightning"),
        (
            "tff.pth",
            {"model_state_dict": STATE, "loss_value": 0.5, "lr": [1e-3]},
            "model_state_dict beside other states",
        ),
        ("mae.pt", {"model": STATE, "epoch": 3}, "model"),
        ("pytorch_model.bin", STATE, "state_dict"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_is_read(tmp_path, name, content, layout, zipped):
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / name)
    assert_state(found.tensors)
    assert (found.name, found.layout) == (name, layout)
    assert found.options == content.get("hyper_parameters", {})
    assert found.size_bytes == (tmp_path / name).stat().st_size


def test_safetensors_are_read_and_say_nothing_of_options(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert_state(found.tensors)
    assert (found.layout, found.network, found.options) == ("safetensors", None, {})


@pytest.mark.parametrize("wrapper", ["module.", "module._orig_mod."])
def test_what_wrappers_put_before_every_name_is_taken_off(tmp_path, wrapper):
    torch.save({wrapper + name: tensor for name, tensor in STATE.items()}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert_state(found.tensors)
    assert found.wrapper == wrapper


def test_the_harmful_pickle_of_these_tests_does_harm_where_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(Harmful(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("where", ["beside the weights", "among the weights", "instead of a checkpoint"])
@pytest.mark.parametrize("writer", ["torch", "torch, old layout", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_before_it_runs(tmp_path, where, writer):
    harmful = Harmful(tmp_path / "marker")
    content = {
        "beside the weights": {"state_dict": STATE, "hyper_parameters": harmful},
        "among the weights": {"state_dict": STATE | {"b": harmful}},
        "instead of a checkpoint": harmful,
    }[where]
    path = tmp_path / "bad.ckpt"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    assert not (tmp_path / "marker").exists()
    assert "bad.ckpt: " in str(caught.value)
    if writer != "pickle":
        assert "its pickle asks for posix.system" in str(caught.value)


def test_hyper_parameters_of_unknown_classes_are_refused_with_the_way_out(tmp_path):
    torch.save({"state_dict": STATE, "hyper_parameters": argparse.Namespace(embed_dim=4)}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(tmp_path / "last.ckpt")
    text = str(caught.value)
    assert "its pickle asks for argparse.Namespace, which is neither a tensor nor a plain value" in text
    assert "torch.load('last.ckpt', map_location=\"cpu\", weights_only=False)" in text
    assert "--set or --config" in text
    assert str(tmp_path) not in text.partition("If you trust")[2], "the recipe names the file, not where it lies"


def test_the_way_out_gives_a_file_that_is_read(tmp_path, monkeypatch):
    torch.save({"state_dict": STATE, "hyper_parameters": argparse.Namespace(embed_dim=4)}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(tmp_path / "last.ckpt")
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {})
    assert_state(read_checkpoint(tmp_path / "state.pt").tensors)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, 0.99])
def test_a_truncated_pickle_is_told(tmp_path, zipped, kept):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.randn(50, 50)}}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(WeightsError, match="not a whole file"):
        read_checkpoint(path)


def test_a_truncated_safetensors_file_is_told(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_an_archive_that_unpacks_to_more_than_it_holds_is_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "packed.pt").stat().st_size < 1 << 14
    with pytest.raises(WeightsError, match="unpacks to more than it holds"):
        read_checkpoint(tmp_path / "packed.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "expected a state_dict of tensors, got list"),
        ({}, "got an empty one"),
        ({"state_dict": STATE, "model": STATE}, "holds state_dict and model"),
        ({"state_dict": STATE | {"n": 3, "m": "x"}}, "got other values for n, m"),
        ({"state_dict": {"a": torch.ones(3, 3).to_sparse()}}, "got other values for a"),
        ({"state_dict": {"a": torch.ones(1).expand(1 << 40)}}, "got other values for a"),
        ({1: torch.ones(1)}, "got other values for 1"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_told(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=said):
        read_checkpoint(tmp_path / "a.pt")


def test_other_files_are_told(tmp_path):
    with pytest.raises(UsageError, match="is a folder; name the file of weights in it"):
        read_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"got '\.index\.json'|got '\.json'"):
        read_checkpoint(tmp_path / "pytorch_model.bin.index.json")
    for name in ("none.ckpt", "none.safetensors"):
        with pytest.raises(WeightsError, match="there is no such file of weights"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "a.bin").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(WeightsError, match="not a whole file of tensors"):
        read_checkpoint(tmp_path / "a.bin")


def test_a_torch_that_can_be_fooled_is_refused(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(WeightsError, match=r"torch 2\.9\.1\+cpu does not refuse every harmful pickle"):
        read_checkpoint(tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git")
    assert_state(read_checkpoint(tmp_path / "a.pt").tensors)


def test_our_own_metadata_are_read_and_checked(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", {checkpoint_files.OWN_METADATA: '{"model": "x", "options": {"n": 3}}'})
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert (found.network, found.options) == ("x", {"n": 3})
    assert checkpoint_files.trained_options(tmp_path / "a.safetensors") == {"n": 3}
    about = '{"model": "x", "options": {"n": 3}, "network": {"heads": 2}}'
    save_file(STATE, tmp_path / "a.safetensors", {checkpoint_files.OWN_METADATA: about})
    assert checkpoint_files.trained_options(tmp_path / "a.safetensors") == {"heads": 2}
    save_file(STATE, tmp_path / "a.safetensors")
    assert checkpoint_files.trained_options(tmp_path / "a.safetensors") == {}
    save_file(STATE, tmp_path / "a.safetensors", {checkpoint_files.OWN_METADATA: "[]"})
    with pytest.raises(WeightsError, match=r"not say what train\.export writes"):
        read_checkpoint(tmp_path / "a.safetensors")
