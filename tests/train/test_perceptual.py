"""VGG16's first layers from a file, or random filters that are the same everywhere."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from train.models.load import WeightsError
from train.perceptual import feature_net, load_vgg16, random_features


def vgg16_state():
    """The names and shapes of torchvision's state; of the later layers only one and the classifier's first."""
    torch.manual_seed(0)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    convolutions = {number: nn.Conv2d(ins, outs, 3) for number, (outs, ins) in shapes.items()}
    state = {f"features.{n}.{name}": t for n, layer in convolutions.items() for name, t in layer.state_dict().items()}
    return state | {"classifier.0.weight": torch.zeros(4, 4), "classifier.0.bias": torch.zeros(4)}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_vgg16_reads_relu1_2_and_relu2_2(tmp_path, suffix):
    state, path = vgg16_state(), tmp_path / f"vgg16.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    pictures = torch.randn(2, 3, 9, 8)
    first, second = feature_net(path)(pictures)

    def convolve(x, number):
        return F.relu(F.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1))

    relu1_2 = convolve(convolve(pictures, 0), 2)
    relu2_2 = convolve(convolve(F.max_pool2d(relu1_2, 2, 2), 5), 7)
    torch.testing.assert_close(first, relu1_2)
    torch.testing.assert_close(second, relu2_2)
    assert second.shape == (2, 128, 4, 4)


def test_what_is_not_vgg16_is_refused_with_a_table(tmp_path):
    state = vgg16_state()
    del state["features.5.weight"]
    save_file(state | {"head.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="2 names do not fit") as caught:
        feature_net(tmp_path / "a.safetensors")
    assert "missing    features.5.weight" in str(caught.value)
    assert "unexpected head.weight" in str(caught.value)


def test_left_out_layers_are_told(tmp_path):
    save_file(vgg16_state(), tmp_path / "a.safetensors")
    net = feature_net(tmp_path / "a.safetensors")
    ignored = load_vgg16(net, tmp_path / "a.safetensors").ignored
    assert set(ignored) == {
        "features.10.weight",
        "features.10.bias",
        "classifier.0.weight",
        "classifier.0.bias",
    }


# Of all names and values; whoever changes it makes losses incomparable with earlier ones.
DIGEST = "4fd0d3b884052ffaa260d4f3e20e77aba82fe8f94d182718c0c7bc68bc37da6e"


class Harmful:
    def __reduce__(self):
        return (print, ("run by unpickling",))


def test_pickles_of_anything_but_tensors_are_refused(tmp_path, capsys):
    torch.save({"features.0.weight": Harmful()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="not a whole file of tensors alone"):
        feature_net(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""
    torch.save([torch.zeros(1)], tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="expected a state_dict of tensors, got list"):
        feature_net(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"PK")
    with pytest.raises(WeightsError, match="not a whole file"):
        feature_net(tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="no such file"):
        feature_net(tmp_path / "none.pth")
    with pytest.raises(UsageError, match=r"read from \.safetensors, \.pth or \.pt"):
        feature_net(tmp_path / "vgg16.bin")


def test_the_offline_filters_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for name, tensor in feature_net().state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == DIGEST
    assert not torch.equal(random_features(1).features["0"].weight, feature_net().features["0"].weight)


def test_the_offline_filters_keep_the_size_of_the_signal_and_learn_nothing():
    net = feature_net()
    pictures = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for features in net(pictures):
        assert 0.3 < features.square().mean() < 6
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_slices_of_one_voxel_have_features_too():
    assert [features.shape[2:] for features in feature_net()(torch.zeros(1, 3, 1, 5))] == [(1, 5), (1, 3)]
