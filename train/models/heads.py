"""What reads SwiFT's features: the published heads and the contrastive loss. All begin with the mean over all positions.

Heads compute in float32 also under autocast: bfloat16 scores would tie, and ties move a rank statistic.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from train.models.synced_norm import SyncedBatchNorm1d

EMBEDDING_WIDTH = 128


def mean_token(features: Tensor) -> Tensor:
    """(b, channels, ...) to (b, channels)."""
    return features.flatten(2).float().mean(2)


class LinearHead(nn.Module):
    """Version 1, for classes and for numbers: one linear map."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """(b, channels, ...) to (b, outputs)."""
        with torch.autocast(features.device.type, enabled=False):
            out: Tensor = self.head(mean_token(features))
        return out


class TwoLinearHead(nn.Module):
    """Version 2: two linear maps with nothing between, as published."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 4 * channels)
        self.head = nn.Linear(4 * channels, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """(b, channels, ...) to (b, outputs)."""
        with torch.autocast(features.device.type, enabled=False):
            out: Tensor = self.head(self.hidden(mean_token(features)))
        return out


class EmbeddingHead(nn.Module):
    """For contrastive pre-training: a linear map without bias, batch normalisation over all ranks, unit length."""

    def __init__(self, channels: int, outputs: int = EMBEDDING_WIDTH) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, outputs, bias=False)
        self.bn1 = SyncedBatchNorm1d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """(b, channels, ...) to (b, outputs) of length 1."""
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self.bn1(self.fc1(mean_token(features))), dim=1)


HEADS = {"v1": LinearHead, "v2": TwoLinearHead, "emb": EmbeddingHead}


def build_head(name: str, *, channels: int, outputs: int) -> nn.Module:
    """A published head by its name."""
    if name not in HEADS:
        raise UsageError(f"there is no head {name!r}; known: {', '.join(HEADS)}")
    if outputs < 1:
        raise UsageError(f"outputs must be a whole number above 0, got {outputs!r}")
    return HEADS[name](channels, outputs)


class HeadedModel(nn.Module):
    """A backbone and its head, under the names that a published checkpoint gives them."""

    def __init__(self, model: nn.Module, output_head: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output_head = output_head

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, outputs)."""
        out: Tensor = self.output_head(self.model(bold))
        return out


def build_swift(options: Mapping[str, Any]) -> HeadedModel:
    """SwiFT from a recipe's model section: `head` (v1 and v2 for a target, emb), its `outputs`, and the backbone's options."""
    from train.models.swift import Swift
    from train.models.swift_config import swift_config

    rest = dict(options)
    head = rest.pop("head", "v1")
    outputs = rest.pop("outputs", EMBEDDING_WIDTH if head == "emb" else 1)
    backbone = Swift(swift_config(rest))
    return HeadedModel(backbone, build_head(head, channels=backbone.num_features, outputs=outputs))


def nt_xent(first: Tensor, second: Tensor, *, temperature: float, cosine: bool = True) -> Tensor:
    """Contrastive loss of two views (b, width): each row should find its other view among all 2b - 1 other rows."""
    rows = torch.cat([first, second]).float()
    if cosine:
        rows = F.normalize(rows, dim=1)
    scores = rows @ rows.T / temperature
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    other_view = torch.arange(len(rows), device=rows.device).roll(len(first))
    return F.cross_entropy(scores.masked_fill(itself, float("-inf")), other_view)
