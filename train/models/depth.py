"""How deep in a network a parameter lies, for learning rates that fall from layer to layer.

A network tells it by `num_layers` and `layer_depth(name)`: 0 for what lies before the first layer, 1 to `num_layers` for the
layers, and above for what reads the last one: its normalisation, a head, a decoder.
"""

from typing import Any

from torch import nn

from fmristream.errors import UsageError


def layer_depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of every parameter by name, and that of what lies above all layers.

    Raises:
        UsageError: the network does not tell.
    """
    inner: Any = getattr(model, "model", None)
    teller: Any = inner if hasattr(inner, "layer_depth") else model
    if not hasattr(teller, "layer_depth"):
        raise UsageError(
            f"optim.layer_decay: {type(model).__name__} does not tell its layers (num_layers and layer_depth, see "
            "train/models/depth.py); set it to 1"
        )
    top: int = teller.num_layers + 1
    beginning = "" if teller is model else "model."
    depths: dict[str, int] = {}
    for name, _ in model.named_parameters():
        of_teller = name.startswith(beginning)
        depths[name] = teller.layer_depth(name.removeprefix(beginning)) if of_teller else top
    return depths, top


def depth_by_name(name: str, *, before: tuple[str, ...], layers: str, number: int) -> int:
    """The depth of a parameter of a plain stack.

    Args:
        name: of the parameter.
        before: beginnings of names of what lies before the first layer.
        layers: the beginning of names of layers; their number follows.
        number: of layers.
    """
    if name.startswith(layers):
        return 1 + int(name.removeprefix(layers).partition(".")[0])
    return 0 if name.startswith(before) else number + 1
