"""What the tensors of a published checkpoint tell of the network they belong to, what they cannot tell, and how it is built.

Most sizes are shapes of tensors. What changes the function and leaves no trace in a shape (heads, windows, the grid before
a flattened map) has to be given, because a wrong guess would load without complaint and compute something else.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from train.models import brainlm, load, tff_load
from train.models.brainlm import Brainlm
from train.models.brainlm_config import (
    BRAINLM_SIZES,
    VITMAE_SIZES,
    BrainlmConfig,
    VitmaeConfig,
    brainlm_config,
    vitmae_config,
)
from train.models.brainlm_vitmae import BrainlmVitmae
from train.models.load import WeightsError, under_model
from train.models.swift_config import SwiftConfig
from train.models.tff import build_tff
from train.models.tff_config import TffConfig

Tensors = Mapping[str, Tensor]
Options = Mapping[str, Any]
# Option -> the tensor and the axis whose length it is.
Places = Mapping[str, tuple[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One network: how its weights are known, what they show, and what must be told beside them.

    `anchors` are names that every checkpoint of it has, and that no other family's have all of. `shown` reads options from
    tensors, with the help of options that are known. `asked` are options that change the function and that no tensor shows,
    with what they are; `assumed` those that all published weights share, as the config's defaults say. `head` begins the
    names of a head that may be left behind.

    `further` are options beside those of the config; `aliases` published names of options; `hints` are told, and are no
    options; `sizes` are words for several options.
    """

    anchors: tuple[str, ...]
    config: type
    shown: Callable[[Tensors, Options], dict[str, Any]]
    build: Callable[[Options], nn.Module]
    asked: Mapping[str, str]
    ignored: Mapping[str, str]
    licence: str
    assumed: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    head: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    sizes: Mapping[str, Options] = field(default_factory=dict)
    renamed: Callable[[Tensors], dict[str, Tensor]] = dict

    @property
    def options(self) -> tuple[str, ...]:
        """Names of all options that it has."""
        return (*(item.name for item in fields(self.config)), *self.further)


def family_of(tensors: Tensors) -> str | None:
    """The family whose names these are; None where they are of no known one."""
    for name, family in FAMILIES.items():
        renamed = family.renamed(tensors)
        if all(anchor in renamed for anchor in family.anchors) and not _is_of_another_phase(name, renamed):
            return name
    return None


def _is_of_another_phase(name: str, tensors: Tensors) -> bool:
    """Whether a TFF has parts beyond those of a phase, whose anchors the later phase has as well."""
    beyond = {"tff1": "transformer.", "tff2": "regression_head."}
    return name in beyond and any(key.startswith(beyond[name]) for key in tensors)


_FC = "model.patch_embed.fc.weight"
_GRID, _TIME = "model.pos_embeds.0.pos_embed", "model.pos_embeds.0.time_embed"
_SECOND_STAGE = "model.pos_embeds.1.pos_embed"
# A name of a head -> which head it is, and the tensor whose rows are its outputs; the first that is there decides.
_SWIFT_HEADS = {
    "output_head.hidden.weight": ("v2", "output_head.head.weight"),
    "output_head.fc1.weight": ("emb", "output_head.fc1.weight"),
    "output_head.head.weight": ("v1", "output_head.head.weight"),
}


def _swift_shown(weights: Tensors, told: Options) -> dict[str, Any]:
    width = _length(weights, _FC, 0)
    stages = range(_numbers_after(weights, "model.layers."))
    shown: dict[str, Any] = {
        "embed_dim": width,
        "depths": [_numbers_after(weights, f"model.layers.{stage}.blocks.") for stage in stages],
        "c_multiplier": max(1, _length(weights, _SECOND_STAGE, 1) // width),
    }
    patch: Any = told.get("patch_size")
    if _are_counts(patch, 4):
        grid = [_length(weights, _GRID, axis) * patch[axis - 2] for axis in (2, 3, 4)]
        shown["img_size"] = [*grid, _length(weights, _TIME, 5)]
        shown["in_chans"] = max(1, _length(weights, _FC, 1) // math.prod(patch))
    found = next((name for name in _SWIFT_HEADS if name in weights), None)
    if found:
        head, rows = _SWIFT_HEADS[found]
        shown |= {"head": head, **_lengths(weights, {"outputs": (rows, 0)})}
    return shown


def _swift_names(weights: Tensors) -> dict[str, Tensor]:
    """A backbone that was saved alone has no `model.` before its names."""
    return under_model(weights) if _FC.removeprefix("model.") in weights else dict(weights)


def _build_swift(options: Options) -> nn.Module:
    from train.models import build_model

    return build_model("swift", options)


_FIRST_CONV, _POSITIONS = "encoder.down_block1.conv0.weight", "transformer.bert.embeddings.position_embeddings.weight"
_INTO_BERT, _OUT_OF_BERT = "into_bert.into_bert.weight", "from_bert.out_of_bert.weight"
_BERT_MLP = "transformer.bert.encoder.layer.0.intermediate.dense.weight"
_REBUILT = "decoder.decode_block.output_block.weight"
_REGRESSION = "regression_head.0.weight"
_TFF_PLACES: Places = {
    "in_chans": (_FIRST_CONV, 1),
    "model_depth": (_FIRST_CONV, 0),
    "out_chans": (_REBUILT, 0),
    "max_position_embeddings": (_POSITIONS, 0),
    "bert_intermediate_size": (_BERT_MLP, 0),
    "outputs": (_REGRESSION, 0),
}
# Whichever of these is there has the width of a frame's vector along that axis.
_TFF_WIDTHS = ((_INTO_BERT, 0), (_POSITIONS, 1), (_OUT_OF_BERT, 1))


def _tff_shown(weights: Tensors, told: Options) -> dict[str, Any]:
    shown: dict[str, Any] = _lengths(weights, _TFF_PLACES)
    width = next((place for place in _TFF_WIDTHS if place[0] in weights), None)
    if width:
        shown["intermediate_vec"] = _length(weights, *width)
    if _POSITIONS in weights:
        shown["transformer_hidden_layers"] = _numbers_after(weights, "transformer.bert.encoder.layer.")
    if _are_counts(told.get("dim"), 3) and _are_counts([told.get("sequence_length")], 1):
        shown["img_size"] = [*told["dim"], told["sequence_length"]]
    return shown


def _without_outputs(phase: str) -> Callable[[Options], nn.Module]:
    """The network of a phase that has no outputs of its own; a file of another phase then gives a table, not a puzzle."""
    return lambda options: build_tff(phase, {name: value for name, value in options.items() if name != "outputs"})


_LAYER, _DECODER_LAYER = "vit.encoder.layer.0.", "decoder.decoder_layers.0."
_TRANSFORMER_PLACES: Places = {
    "intermediate_size": (f"{_LAYER}intermediate.dense.weight", 0),
    "decoder_hidden_size": ("decoder.decoder_embed.weight", 0),
    "decoder_intermediate_size": (f"{_DECODER_LAYER}intermediate.dense.weight", 0),
}
_SIGNAL = "vit.embeddings.signal_embedding_projection.weight"
_PATCHES = "vit.embeddings.patch_embeddings.projection.weight"
_CONV, _TABLE = f"{_LAYER}attention.self.conv.weight", "vit.embeddings.position_embeddings"
_BRAINLM_PLACES: Places = {
    **_TRANSFORMER_PLACES,
    "hidden_size": (_SIGNAL, 0),
    "timepoint_patching_size": (_SIGNAL, 1),
    # A convolution of each head's values: as many maps as heads.
    "num_attention_heads": (_CONV, 0),
    "conv_kernel_size": (_CONV, 2),
    "decoder_num_attention_heads": (f"{_DECODER_LAYER}attention.self.conv.weight", 0),
}
_VITMAE_PLACES: Places = {
    **_TRANSFORMER_PLACES,
    "hidden_size": (_PATCHES, 0),
    "num_channels": (_PATCHES, 1),
    "patch_size": (_PATCHES, 2),
}


def _brainlm_shown(weights: Tensors, _told: Options) -> dict[str, Any]:
    return _lengths(weights, _BRAINLM_PLACES) | _layers(weights)


def _vitmae_shown(weights: Tensors, _told: Options) -> dict[str, Any]:
    grid = math.isqrt(_length(weights, _TABLE, 1) - 1)
    return {
        **_lengths(weights, _VITMAE_PLACES),
        **_layers(weights),
        "image_size": max(1, grid * _length(weights, _PATCHES, 2)),
        "qkv_bias": f"{_LAYER}attention.attention.query.bias" in weights,
    }


def _layers(weights: Tensors) -> dict[str, int]:
    return {
        "num_hidden_layers": _numbers_after(weights, "vit.encoder.layer."),
        "decoder_num_hidden_layers": _numbers_after(weights, "decoder.decoder_layers."),
    }


def _lengths(weights: Tensors, places: Places) -> dict[str, Any]:
    """The options whose tensors are there."""
    return {option: _length(weights, *place) for option, place in places.items() if place[0] in weights}


def _length(weights: Tensors, name: str, axis: int) -> int:
    shape = tuple(weights[name].shape)
    if len(shape) <= axis or not shape[axis]:
        raise WeightsError(f"{name}: expected a tensor of {axis + 1} axes or more, none of length 0, got {list(shape)}")
    return shape[axis]


def _numbers_after(weights: Tensors, beginning: str) -> int:
    """How many numbers follow a beginning; where one is left out, the table of misfits says which."""
    numbers = {name[len(beginning) :].split(".")[0] for name in weights if name.startswith(beginning)}
    return sum(number.isdecimal() for number in numbers)


def _are_counts(value: Any, number: int) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == number
    return is_list and all(type(item) is int and item > 0 for item in value)


_HEADS_OF = "attention heads; nothing in the tensors depends on their number"
_TFF_GRID = "(x, y, z, longest clip) in voxels and frames, such as [75, 93, 81, 20]: the flattened map hides it"
_SWIFT_LICENCE = "code Apache-2.0; ask those who give the weights under which terms they do"
_TFF_LICENCE = "the published repository names no licence; ask those who give the weights"
_BRAINLM_LICENCE = "published weights are CC BY-NC-ND 4.0: no commercial use, and converted copies may not be passed on"
_TFF_ALIASES = {"inChannels": "in_chans", "outChannels": "out_chans"}


def _tff(
    phase: str, *, anchors: tuple[str, ...], build: Callable[[Options], nn.Module], further: tuple[str, ...]
) -> Family:
    has_transformer = phase != "tff1"
    return Family(
        anchors=(_FIRST_CONV, "into_bert.reduce_dimension.convR0.weight", *anchors),
        config=TffConfig,
        shown=_tff_shown,
        build=build,
        asked={"img_size": _TFF_GRID} | ({"num_attention_heads": _HEADS_OF} if has_transformer else {}),
        ignored=tff_load.NEVER_USED | (tff_load.POOLER_OF_PHASE_2 if phase == "tff2" else {}),
        licence=_TFF_LICENCE,
        further=("outputs", *further),
        aliases=_TFF_ALIASES,
        hints=("dim", "sequence_length"),
    )


FAMILIES: Mapping[str, Family] = {
    "swift": Family(
        anchors=(_FC, _GRID, _TIME, _SECOND_STAGE, "model.layers.0.blocks.0.attn.qkv.weight"),
        config=SwiftConfig,
        shown=_swift_shown,
        build=_build_swift,
        asked={
            "patch_size": "voxels and frames that become one token, such as [6, 6, 6, 1]",
            "num_heads": "attention heads of each stage, such as [3, 6, 12, 24]",
            "window_size": "tokens along (x, y, z, t) that attend to each other, such as [4, 4, 4, 4]",
            "first_window_size": "the same for the first stage; the published scripts give [4, 4, 4, 4]",
            "last_layer_full_MSA": "whether the last stage attends over its whole grid; true in the published scripts",
        },
        ignored=load.NEVER_APPLIED,
        licence=_SWIFT_LICENCE,
        further=("head", "outputs"),
        head="output_head.",
        renamed=_swift_names,
    ),
    "tff1": _tff("tff1", anchors=(_OUT_OF_BERT, _REBUILT), build=_without_outputs("tff1"), further=()),
    "tff2": _tff(
        "tff2", anchors=(_POSITIONS, _BERT_MLP, _OUT_OF_BERT, _REBUILT), build=_without_outputs("tff2"), further=()
    ),
    "tff3": _tff(
        "tff3",
        anchors=(_POSITIONS, _BERT_MLP, _REGRESSION),
        build=lambda options: build_tff("tff3", options),
        further=("activation",),
    ),
    "brainlm": Family(
        anchors=(_SIGNAL, *(name for name, _ in _TRANSFORMER_PLACES.values())),
        config=BrainlmConfig,
        shown=_brainlm_shown,
        build=lambda options: Brainlm(brainlm_config(options)),
        asked={
            "num_timepoints_per_voxel": "frames of the windows that it was trained on, such as 200",
            "num_attention_heads": _HEADS_OF,
            "decoder_num_attention_heads": _HEADS_OF,
        },
        ignored=brainlm.NEVER_APPLIED,
        licence=_BRAINLM_LICENCE,
        assumed=("layer_norm_eps", "use_tanh_decoder"),
        sizes=BRAINLM_SIZES,
    ),
    "brainlm-vitmae": Family(
        anchors=(_PATCHES, _TABLE, *(name for name, _ in _TRANSFORMER_PLACES.values())),
        config=VitmaeConfig,
        shown=_vitmae_shown,
        build=lambda options: BrainlmVitmae(vitmae_config(options)),
        asked={"num_attention_heads": _HEADS_OF, "decoder_num_attention_heads": _HEADS_OF},
        ignored={},
        licence=_BRAINLM_LICENCE,
        assumed=("layer_norm_eps",),
        sizes=VITMAE_SIZES,
    ),
}
