"""Weights into a TFF: a checkpoint of the same phase strictly, or what one phase hands to the next, by name.

A hand-over copies whole parts (encoder, transformer, decoder and so on) that both phases have. Inside a shared part every
name must fit; a part that only one side has begins anew, or is left out, and is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from train.models.load import Loaded, WeightsError, load_named
from train.models.tff import EncoderTransformerDecoder

_POOLER = "transformer.bert.pooler."
# Beginnings of published names that belong to no parameter of ours, and why.
NEVER_USED = {
    "transformer.bert.embeddings.word_embeddings.": "made by the published code, which has no words to embed",
    "transformer.bert.embeddings.position_ids": "0, 1, 2 and so on: a counter, not a weight",
}
POOLER_OF_PHASE_2 = {_POOLER: "made by the published phase 2, which reads no pooled vector"}
CLS_BEGINS_ANEW = "begins anew in every phase, as published; keep_cls keeps it"
# What is handed over, or not, as one; a name belongs to the first that it begins with.
PARTS = (
    "encoder.",
    "into_bert.",
    _POOLER,
    "transformer.cls_embedding.",
    "transformer.",
    "from_bert.",
    "decoder.",
    "regression_head.",
    "projection.",
)
_ALWAYS_SHARED = ("encoder.", "into_bert.")
_POSITIONS = "transformer.bert.embeddings.position_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """What a hand-over did: parts that were copied, parts that keep their first values, and names left out with reason."""

    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: Mapping[str, str]


def load_tff(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Load a checkpoint of the model's own phase; `source` names the weights in errors.

    Raises:
        WeightsError: a name is missing, unexpected or of another shape; the model is unchanged.
    """
    ignored = NEVER_USED | (POOLER_OF_PHASE_2 if isinstance(model, EncoderTransformerDecoder) else {})
    return load_named(model, weights, source=source, ignored=ignored)


def hand_over(model: nn.Module, weights: Mapping[str, Tensor], *, source: str, keep_cls: bool = False) -> HandedOver:
    """Begin a phase with the weights of another one.

    Args:
        model: network of the phase that begins.
        weights: state of the phase before, ours or published.
        source: name of the weights in errors.
        keep_cls: copy the embedding of the window's own vector too, which the published code makes anew.

    Raises:
        WeightsError: encoder or bottleneck are not in the weights, a shared part does not fit, or a name is of no part;
            the model is unchanged.
    """
    own = model.state_dict()
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    known = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(NEVER_USED))}
    shared = {_part(name) for name in own} & {_part(name) for name in known} - {""}
    missing = [part.removesuffix(".") for part in _ALWAYS_SHARED if part not in shared]
    if missing:
        raise WeightsError(
            f"{source}: no weights of {' and '.join(missing)}, which every phase of TFF has; give the state of a TFF"
        )
    if not keep_cls:
        shared.discard("transformer.cls_embedding.")
    reasons = {name: _reason(name, shared) for name in weights if _part(name) not in shared and _part(name)}
    _load_parts(model, {name: t for name, t in weights.items() if name not in reasons}, shared, source=source)
    fresh = {_part(name) for name in own} - shared
    unused = {
        name: reason for beginning, reason in NEVER_USED.items() for name in weights if name.startswith(beginning)
    }
    return HandedOver(copied=_sorted(shared), fresh=_sorted(fresh), left_out=reasons | unused)


def _load_parts(model: nn.Module, weights: Mapping[str, Tensor], shared: set[str], *, source: str) -> None:
    """Strictly, with the model's own values standing in for the parts that are not handed over."""
    stand_in = {name: tensor for name, tensor in model.state_dict().items() if _part(name) not in shared}
    load_named(model, {**weights, **stand_in}, source=source, ignored=NEVER_USED)


def _part(name: str) -> str:
    """The part that a name belongs to; empty where it is of none."""
    return next((part for part in PARTS if name.startswith(part)), "")


def _reason(name: str, shared: set[str]) -> str:
    cls_is_new = _part(name) == "transformer.cls_embedding." and "transformer." in shared
    return CLS_BEGINS_ANEW if cls_is_new else "of a part that this phase does not have"


def _sorted(parts: set[str]) -> tuple[str, ...]:
    return tuple(part.removesuffix(".") for part in PARTS if part in parts)


def resize_positions(
    weights: Mapping[str, Tensor], *, places: int, how: Literal["slice", "interpolate"]
) -> dict[str, Tensor]:
    """The same weights with a table of `places` positions (max_position_embeddings) for windows of up to places - 1 frames.

    "slice" keeps the first rows, for windows shorter than trained. "interpolate" keeps row 0, which is the window's own
    vector, and stretches the frames' rows linearly from the first frame to the last.
    """
    if _POSITIONS not in weights:
        raise WeightsError(f"the weights have no {_POSITIONS}; give the state of a phase with a transformer")
    table = weights[_POSITIONS]
    if places < 2:
        raise UsageError(f"places must be 2 or more (the window and a frame), got {places}")
    if how == "slice":
        if places > len(table):
            raise UsageError(f"{len(table)} trained positions cannot be cut to {places}; choose how='interpolate'")
        return {**weights, _POSITIONS: table[:places].clone()}
    frames = F.interpolate(table[1:].float().T.unsqueeze(0), size=places - 1, mode="linear", align_corners=True)
    stretched = torch.cat([table[:1], frames.squeeze(0).T.to(table.dtype)])
    return {**weights, _POSITIONS: stretched}
