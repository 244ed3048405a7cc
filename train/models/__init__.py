"""The networks that a recipe can name; each maps bold (b, c, x, y, z, t) to outputs (b, outputs)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fmristream.errors import UsageError

MODELS = ("swift", "tff3")


def build_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    """A network from a recipe's model section: `outputs`, `head` (v1, v2 or emb) and the options of the network itself."""
    if name == "tff3":
        from train.models.tff import build_tff

        return build_tff(name, config)
    if name != "swift":
        raise UsageError(f"there is no model {name!r}; known: {', '.join(MODELS)}")
    from train.models.heads import HeadedModel, build_head
    from train.models.swift import Swift
    from train.models.swift_config import swift_config

    options = dict(config)
    outputs, head = options.pop("outputs", 1), options.pop("head", "v1")
    backbone = Swift(swift_config(options))
    return HeadedModel(backbone, build_head(head, channels=backbone.num_features, outputs=outputs))
