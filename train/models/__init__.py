"""The networks that a recipe can name: what builds them, what they learn by, what they take, and what they may begin with.

A supervised network maps its input to (b, outputs). `takes` "volume" is bold (b, c, x, y, z, t), "series" is
(b, parcels, t).
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn

from fmristream.errors import UsageError

_SUPERVISED = ("classification", "regression")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One name of a recipe's model section.

    Attributes:
        build: `module:function` that makes the network of options.
        variant: what that function is given first, where it makes several networks.
        begin: `module:function` that puts another run's weights into the network (`train.models.begin`).
        learns: kinds of objective.
        takes: what windows must be.
    """

    build: str
    begin: str
    learns: tuple[str, ...]
    variant: str = ""
    takes: Literal["volume", "series"] = "volume"


def _tff(phase: str, *learns: str) -> Family:
    return Family(
        build="train.models.tff:build_tff", variant=phase, begin="train.models.begin:begin_tff", learns=learns
    )


def _brainlm(variant: str) -> Family:
    return Family(
        build="train.models.brainlm_heads:build_brainlm",
        variant=variant,
        begin="train.models.begin:begin_brainlm",
        learns=("masked", *_SUPERVISED),
        takes="series",
    )


def _series(function: str) -> Family:
    return Family(
        build=f"train.models.series_nets:{function}",
        begin="train.models.begin:begin_same",
        learns=_SUPERVISED,
        takes="series",
    )


MODELS: Mapping[str, Family] = {
    "swift": Family(
        build="train.models.heads:build_swift",
        begin="train.models.begin:begin_swift",
        learns=(*_SUPERVISED, "contrastive"),
    ),
    "tff1": _tff("tff1", "reconstruct"),
    "tff2": _tff("tff2", "reconstruct"),
    "tff3": _tff("tff3", *_SUPERVISED),
    "tff-contrast": _tff("tff-contrast", "contrastive"),
    "brainlm": _brainlm("brainlm"),
    "brainlm-vitmae": _brainlm("brainlm-vitmae"),
    "cnn_rnn": Family(
        build="train.models.cnn_rnn:build_cnn_rnn", begin="train.models.cnn_rnn:load_lower_layers", learns=_SUPERVISED
    ),
    "mae4d": Family(
        build="train.models.mae4d:build_mae4d", begin="train.models.mae4d_load:load_encoder", learns=_SUPERVISED
    ),
    "mae4d-pretrain": Family(
        build="train.models.mae4d:build_mae4d_pretrain",
        begin="train.models.mae4d_load:load_encoder",
        learns=("masked",),
    ),
    "mlp": _series("build_mlp"),
    "lstm": _series("build_lstm"),
}


def family_of(name: str) -> Family:
    """What is known of a model.

    Raises:
        UsageError: there is none of this name, or its module is not part of this copy.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(MODELS)}"
        raise UsageError(f"there is no model {name!r}; {hint}")
    module = MODELS[name].build.partition(":")[0]
    if find_spec(module) is None:
        there = [other for other, family in MODELS.items() if find_spec(family.build.partition(":")[0]) is not None]
        raise UsageError(f"model {name!r} needs {module}, which this copy does not have; it has {', '.join(there)}")
    return MODELS[name]


def build_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A network from a recipe's model section: its own options, and what follows from data and objective.

    Raises:
        UsageError: there is no such model, or an option that it does not have or does not fit.
    """
    family = family_of(name)
    build = function_of(family.build)
    model: nn.Module = build(family.variant, options) if family.variant else build(options)
    return model


def function_of(place: str) -> Callable[..., Any]:
    """What `module:function` names."""
    module, _, function = place.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
