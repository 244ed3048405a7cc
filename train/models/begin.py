"""Begin with the weights of another run or of a published checkpoint: what both networks have, by name, the rest told.

Every function takes the network, the weights and their name for errors, changes the network or raises WeightsError, and
says what it left out.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from train.models.brainlm import NEVER_APPLIED
from train.models.brainlm_heads import FineTuned
from train.models.heads import HeadedModel
from train.models.load import Loaded, load_backbone, load_named
from train.models.tff_load import hand_over

_WRAPPED = "model."
_NOT_WANTED = {
    "output_head.": "the head of another task",
    "decoder.decoder_pred.": NEVER_APPLIED["decoder.decoder_pred."],
}


def begin_swift(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """The backbone, whatever head the weights have; the head begins anew."""
    return load_backbone(cast(HeadedModel, model).model, weights, source=source)


def begin_tff(model: nn.Module, weights: Mapping[str, Tensor], *, source: str, keep_cls: bool = False) -> Loaded:
    """The parts that both phases have."""
    left_out = hand_over(model, weights, source=source, keep_cls=keep_cls).left_out
    return Loaded(tensors=len(weights) - len(left_out), ignored=left_out)


def begin_brainlm(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """The pre-trained network inside a fine-tuned one, or the same; a head of another task is left out."""
    if any(name.startswith(_WRAPPED) for name in weights):
        weights = {name.removeprefix(_WRAPPED): tensor for name, tensor in weights.items()}
    inner = model.model if isinstance(model, FineTuned) else model
    return load_named(inner, weights, source=source, ignored=_NOT_WANTED)


def begin_same(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """A network of the same sizes, every name of it."""
    return load_named(model, weights, source=source, ignored={})
