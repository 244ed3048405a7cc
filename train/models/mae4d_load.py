"""Move trained weights of the 4-D masked autoencoder: its encoder under another head, or to clips of another length."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from train.models.load import HEAD_OF_ANOTHER_TASK, Loaded, WeightsError, load_named
from train.models.mae4d import Mae4d, Mae4dPretrain

_BRAIN = "encoder.patches.brain"
_TIMES = ("encoder.positions.time", "decoder.positions.time")
NOT_OF_THE_ENCODER = {
    "decoder.": "the decoder, of pre-training only",
    "pool.": "of the head of another task",
    **HEAD_OF_ANOTHER_TASK,
}


def load_encoder(
    model: Mae4d | Mae4dPretrain,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    brain: Literal["same", "weights", "model"] = "same",
) -> Loaded:
    """Take the encoder of a pre-trained or fine-tuned network strictly by its names, and leave the rest as it is.

    A decoder is taken too where both have one: pre-training goes on.

    Args:
        model: whose encoder is loaded.
        weights: state of a `Mae4dPretrain` or `Mae4d`.
        source: name of the weights in errors.
        brain: where the model has a mask already and the weights have another one: refuse (same), take that of the weights,
            so that features are those of pre-training and voxels outside it are not read, or keep the model's, so that
            patches may appear that were never trained.

    Raises:
        WeightsError: names or shapes do not fit, or the masks differ and nothing was said; the model is unchanged.
    """
    if brain not in ("same", "weights", "model"):
        raise UsageError(f"mae4d: brain must be same, weights or model, got {brain!r}")
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    own, theirs = model.encoder.patches.brain, weights.get(_BRAIN)
    is_set = not bool(own.all())
    if theirs is not None and theirs.shape == own.shape and is_set and not torch.equal(theirs.to(own.device), own):
        if brain == "same":
            shared = int((theirs.to(own.device) & own).sum())
            raise WeightsError(
                f"{source}: the weights' brain has {int(theirs.sum())} voxels and the model's {int(own.sum())}, {shared} of "
                "them the same; pass brain='weights' or brain='model' to say which one holds"
            )
        if brain == "model":
            weights[_BRAIN] = own
    holder: nn.Module = nn.Module()
    holder.encoder = model.encoder
    if isinstance(model, Mae4dPretrain) and any(name.startswith("decoder.") for name in weights):
        holder = model
    return load_named(holder, weights, source=source, ignored=NOT_OF_THE_ENCODER)


def resize_times(
    weights: Mapping[str, Tensor], *, times: int, how: Literal["slice", "interpolate"]
) -> dict[str, Tensor]:
    """The same weights with learned tables of `times` times, frames / patch_size[3], for clips of another length.

    "slice" keeps the first times, for shorter clips. "interpolate" stretches the tables linearly from the first time to the
    last. Sinusoidal tables are in no weights: they have the length that the network is built for.
    """
    tables = [name for name in weights if name.removeprefix("module.") in _TIMES]
    if not tables:
        raise WeightsError("the weights have no learned table of times; give those of a mae4d with learned positions")
    if times < 1 or how not in ("slice", "interpolate"):
        raise UsageError(f"times must be 1 or more and how be slice or interpolate, got {times} and {how!r}")
    return {**weights, **{name: _resized(weights[name], times, how) for name in tables}}


def _resized(table: Tensor, times: int, how: str) -> Tensor:
    if how == "slice":
        if times > len(table):
            raise UsageError(f"{len(table)} trained times cannot be cut to {times}; choose how='interpolate'")
        return table[:times].clone()
    stretched = F.interpolate(table.float().T.unsqueeze(0), size=times, mode="linear", align_corners=True)
    return stretched.squeeze(0).T.to(table.dtype).contiguous()
