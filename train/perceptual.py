"""Feature nets for the perceptual loss: VGG16's first layers with weights from a file, or fixed random filters.

The published loss uses VGG16 trained on ImageNet, whose weights are not ours to ship and are not downloaded here. Without
them `feature_net` gives a net of the same layout, narrower, with random filters that are the same on every machine: its
features still tell edges and textures from blur, but they were trained on nothing, so losses of the two nets must not be
compared.
"""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from train.models.load import Loaded, WeightsError, load_named, read_weights

VGG16_WIDTHS = (64, 128)
RANDOM_WIDTHS = (16, 32)
# Numbers of the convolutions in torchvision's VGG16, of which the first four are enough.
_CONVOLUTIONS = (0, 2, 5, 7)
_LATER_LAYERS = {
    "features.": "a later layer of VGG16, which the loss does not read",
    "classifier.": "VGG16's classifier",
}


class VggStart(nn.Module):
    """Two convolutions, halving, two convolutions, in the names of torchvision's VGG16; nothing is trained."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        first, second = widths
        sizes = ((3, first), (first, first), (first, second), (second, second))
        convolutions = (nn.Conv2d(ins, outs, 3, padding=1) for ins, outs in sizes)
        self.features = nn.ModuleDict({str(n): layer for n, layer in zip(_CONVOLUTIONS, convolutions, strict=True)})
        self.requires_grad_(False)

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, x, y) to relu1_2 (n, first width, x, y) and relu2_2 (n, second width, halves of x and y)."""
        relu1_2 = F.relu(self.features["2"](F.relu(self.features["0"](slices))))
        halved = F.max_pool2d(relu1_2, 2, ceil_mode=min(relu1_2.shape[2:]) < 2)
        return relu1_2, F.relu(self.features["7"](F.relu(self.features["5"](halved))))


def feature_net(weights: str | Path | None = None, *, seed: int = 0) -> VggStart:
    """VGG16 with the weights of a file, or without one the offline default.

    Args:
        weights: torchvision's state of VGG16 as safetensors or as a pickle of tensors (`.pth`, read with weights_only).
        seed: of the random filters.
    """
    if weights is None:
        return random_features(seed)
    net = VggStart(VGG16_WIDTHS)
    load_vgg16(net, weights)
    return net


def load_vgg16(net: VggStart, path: str | Path) -> Loaded:
    """Put the first four convolutions of a file into the net; later layers and the classifier are left out."""
    return load_named(net, _read_state(Path(path)), source=str(path), ignored=_LATER_LAYERS)


def random_features(seed: int = 0, widths: tuple[int, int] = RANDOM_WIDTHS) -> VggStart:
    """Filters uniform in +-sqrt(6 / inputs), which keep the size of a ReLU net's signal, and no bias.

    Made of the raw words of PCG64, which numpy keeps the same for good, where neither torch nor numpy promise that of
    their distributions.
    """
    net = VggStart(widths)
    words = np.random.PCG64(int.from_bytes(hashlib.sha256(f"fmristream random features {seed}".encode()).digest()[:8]))
    for layer in net.features.values():
        weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
        # The upper 24 bits: float32 holds them exactly.
        uniform = (words.random_raw(weight.numel()) >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - 1
        bound = np.float32((6 / weight[0].numel()) ** 0.5)
        weight.copy_(torch.from_numpy(uniform * bound).view(weight.shape))
        bias.zero_()
    return net


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_weights(path)
    if path.suffix not in (".pth", ".pt"):
        raise UsageError(f"{path}: weights of VGG16 are read from .safetensors, .pth or .pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: there is no such file of weights") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path}: not a whole file of tensors alone ({error}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {type(state).__name__}")
    return state
