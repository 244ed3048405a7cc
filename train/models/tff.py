"""TFF, the transformer framework for fMRI: a 3-D network turns each frame into a vector, BERT relates the vectors.

Three phases, each of which begins with the weights of the one before (`train.models.tff_load.hand_over`): `AutoEncoder`
rebuilds single frames, `EncoderTransformerDecoder` rebuilds them from the vectors that the transformer gives out, and
`EncoderTransformerHead` predicts from the transformer's pooled output. `EncoderTransformerContrast` trains encoder and
transformer on pairs of windows instead. All read bold (b, c, x, y, z, t) and handle frames one by one until the
transformer.

Parameters have the names of the published checkpoints. Two that are never used there do not exist here, because a
parameter without a gradient stops DDP: the word embeddings, and the pooler in phase 2; `train.models.tff_load` skips them.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fmristream.errors import UsageError
from train.models.convolution import Conv3d
from train.models.depth import depth_by_name
from train.models.heads import EMBEDDING_WIDTH
from train.models.tff_config import STAGES, TffConfig, tff_config

# Residual units at each of the four resolutions.
GREEN_UNITS = (1, 2, 2, 4)
CHANNELS_PER_GROUP = 4
EXPANDED_GROUPS = 2
# What the published code multiplies by a linear map to begin the sequence.
CLS_CONSTANT = 0.5
NORM_EPS = 1e-12
INIT_SD = 0.02
_BEFORE_LAYERS = ("encoder.", "into_bert.", "transformer.cls_embedding.", "transformer.bert.embeddings.")


class GreenUnit(nn.Module):
    """A residual unit: normalisation, leaky ReLU and convolution, twice, with plain dropout, added to what came in."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            OrderedDict(
                group_norm0=_group_norm(channels),
                relu0=nn.LeakyReLU(),
                conv0=Conv3d(channels, channels, 3, padding=1),
                group_norm1=_group_norm(channels),
                relu1=nn.LeakyReLU(),
                conv2=Conv3d(channels, channels, 3, padding=1),
            )
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(frames, channels, x, y, z), before and after."""
        out: Tensor = x + self.dropout(self.block(x))
        return out


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


class Encoder(nn.Module):
    """Four resolutions, three convolutions of stride 2 between them."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        stages = [_greens(config, stage) for stage in range(STAGES)]
        for stage in range(STAGES - 1):
            channels = config.stage_channels(stage)
            stages[stage][f"downsize_{stage}"] = Conv3d(channels, 2 * channels, 3, stride=2, padding=1)
        first = OrderedDict(conv0=cast(nn.Module, Conv3d(config.in_chans, config.model_depth, 3, padding=1)))
        self.down_block1 = nn.Sequential(first | stages[0])
        self.down_block2 = nn.Sequential(stages[1])
        self.down_block3 = nn.Sequential(stages[2])
        self.final_block = nn.Sequential(stages[3])

    def forward(self, frames: Tensor) -> Tensor:
        """(frames, c, x, y, z) to (frames, 8 x model_depth, eighths of x, y and z, rounded up)."""
        out: Tensor = self.final_block(self.down_block3(self.down_block2(self.down_block1(frames))))
        return out


def _greens(config: TffConfig, stage: int) -> OrderedDict[str, nn.Module]:
    """The residual units of a stage under their published names: green0, green10, green11, green20 and so on."""
    channels, beginning = config.stage_channels(stage), f"green{stage or ''}"
    return OrderedDict(
        (f"{beginning}{number}", GreenUnit(channels, config.dropout_green)) for number in range(GREEN_UNITS[stage])
    )


class IntoBert(nn.Module):
    """From the encoder's map to the vector of a frame, by a linear map where the flattened map has another width."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        channels, flat = config.stage_channels(STAGES - 1), prod(config.bottleneck)
        self.reduce_dimension = nn.Sequential(
            OrderedDict(
                group_normR=_group_norm(channels),
                reluR0=nn.LeakyReLU(),
                convR0=Conv3d(channels, config.bottleneck[0], 3, padding=1),
            )
        )
        self.into_bert = nn.Identity() if flat == config.intermediate_vec else nn.Linear(flat, config.intermediate_vec)

    def forward(self, encoded: Tensor) -> Tensor:
        """(frames, channels, x, y, z) to (frames, intermediate_vec)."""
        out: Tensor = self.into_bert(self.reduce_dimension(encoded).flatten(1))
        return out


class FromBert(nn.Module):
    """From a vector back to a map of the encoder's last shape; always through a linear map."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        channels, *grid = config.bottleneck
        self.out_of_bert = nn.Linear(config.intermediate_vec, prod(config.bottleneck))
        self.expand_dimension = nn.Sequential(
            OrderedDict(
                unflatten=nn.Unflatten(1, (channels, *grid)),
                group_normR=nn.GroupNorm(EXPANDED_GROUPS, channels),
                reluR0=nn.LeakyReLU(),
                convR0=Conv3d(channels, config.stage_channels(STAGES - 1), 3, padding=1),
            )
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """(frames, intermediate_vec) to (frames, channels, x, y, z)."""
        out: Tensor = self.expand_dimension(self.out_of_bert(vectors))
        return out


class UpGreen(nn.Module):
    """Half the channels, the grid of the stage above by repetition of the nearest voxel, and a residual unit."""

    def __init__(self, config: TffConfig, stage: int) -> None:
        super().__init__()
        channels = config.stage_channels(stage)
        self.grid = config.stage_grid(stage)
        self.conv = Conv3d(2 * channels, channels, 1)
        self.green = GreenUnit(channels, config.dropout_green)

    def forward(self, x: Tensor) -> Tensor:
        """(frames, 2 x channels, x, y, z) to (frames, channels) on the grid of the stage."""
        out: Tensor = self.green(F.interpolate(self.conv(x), size=self.grid, mode="nearest"))
        return out


class Decoder(nn.Module):
    """Back to the frames' grid."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        depth = config.model_depth
        self.decode_block = nn.Sequential(
            OrderedDict(
                upgreen0=UpGreen(config, 2),
                upgreen1=UpGreen(config, 1),
                upgreen2=UpGreen(config, 0),
                blue_block=Conv3d(depth, depth, 3, padding=1),
                output_block=Conv3d(depth, config.out_chans, 1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(frames, channels, x, y, z) on the smallest grid to (frames, out_chans, x, y, z) on the largest."""
        out: Tensor = self.decode_block(x)
        return out


class BertSelfAttention(nn.Module):
    """Attention of every vector to every vector, by several heads."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        width = config.intermediate_vec
        self.heads, self.dropout = config.num_attention_heads, config.dropout_transformer
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width), before and after."""
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


class BertOutput(nn.Module):
    """A linear map, added to what came into the part that it ends, and normalised."""

    def __init__(self, config: TffConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.intermediate_vec)
        self.LayerNorm = nn.LayerNorm(config.intermediate_vec, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout_transformer)

    def forward(self, x: Tensor, came_in: Tensor) -> Tensor:
        """(b, n, width of the part) and (b, n, intermediate_vec) to (b, n, intermediate_vec)."""
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + came_in)
        return out


class BertLayer(nn.Module):
    """Attention, then two linear maps with an exact GELU between."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": BertSelfAttention(config), "output": BertOutput(config, config.intermediate_vec)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.intermediate_vec, config.bert_intermediate_size)})
        self.output = BertOutput(config, config.bert_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width), before and after."""
        x = self.attention["output"](self.attention["self"](x), x)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class BertEmbeddings(nn.Module):
    """Where in the sequence a vector stands, and of which kind it is (all are of the first), added and normalised."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        width = config.intermediate_vec
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout_transformer)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width), before and after."""
        kind, places = self.token_type_embeddings.weight[0], self.position_embeddings.weight[: x.shape[1]]
        out: Tensor = self.dropout(self.LayerNorm(x + kind + places))
        return out


class Bert(nn.Module):
    """BERT over given vectors, with the pooler (a linear map of the first vector, and tanh) where one is asked for."""

    def __init__(self, config: TffConfig, *, has_pooler: bool) -> None:
        super().__init__()
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.transformer_hidden_layers))
        self.embeddings = BertEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": layers})
        if has_pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.intermediate_vec, config.intermediate_vec)})
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width), before and after."""
        x = self.embeddings(x)
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            x = layer(x)
        return x

    def pool(self, sequence: Tensor) -> Tensor:
        """(b, n, width) to (b, width)."""
        return torch.tanh(self.pooler["dense"](sequence[:, 0]))


def _initialise(module: nn.Module) -> None:
    """As BERT begins: small normal weights, no bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_SD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class Transformer(nn.Module):
    """BERT over the frames' vectors, after a learned vector that stands for the whole window."""

    def __init__(self, config: TffConfig, *, has_pooler: bool) -> None:
        super().__init__()
        if config.img_size[3] >= config.max_position_embeddings:
            raise UsageError(
                f"tff: clips of {config.img_size[3]} frames and the vector before them need more than the "
                f"{config.max_position_embeddings} places of max_position_embeddings; raise it (for trained weights see "
                "train.models.tff_load.resize_positions) or shorten the window"
            )
        width = config.intermediate_vec
        self.bert = Bert(config, has_pooler=has_pooler)
        self.cls_embedding = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU())

    def forward(self, vectors: Tensor) -> Tensor:
        """(b, t, width) to (b, 1 + t, width)."""
        cls = self.cls_embedding(vectors.new_full((1, vectors.shape[2]), CLS_CONSTANT))
        out: Tensor = self.bert(torch.cat([cls.expand(len(vectors), 1, -1).to(vectors.dtype), vectors], dim=1))
        return out


class _Frames(nn.Module):
    """What all phases begin with: frames to vectors, a chunk of frames at a time."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.into_bert = IntoBert(config)

    @property
    def num_layers(self) -> int:
        """Of the transformer."""
        return self.config.transformer_hidden_layers

    def layer_depth(self, name: str) -> int:
        """See `train.models.depth`; frames are encoded before the first layer, and all else lies above them.

        Raises:
            UsageError: phase 1 has no transformer.
        """
        if not hasattr(self, "transformer"):
            raise UsageError("tff: phase 1 has no transformer whose layers could differ; set optim.layer_decay = 1")
        return depth_by_name(
            name, before=_BEFORE_LAYERS, layers="transformer.bert.encoder.layer.", number=self.num_layers
        )

    def encode(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, t, width)."""
        self._check(bold)
        frames = bold.permute(0, 5, 1, 2, 3, 4).flatten(0, 1)
        return self._by_chunks(self._encode_frames, frames).view(len(bold), bold.shape[5], -1)

    def _encode_frames(self, frames: Tensor) -> Tensor:
        out: Tensor = self.into_bert(self.encoder(frames))
        return out

    def _by_chunks(self, function: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        """`function` of some frames at a time; with `recompute` only what goes in and comes out of it is kept."""
        chunks = torch.split(frames, self.config.frame_chunk or len(frames))
        if self.config.recompute and torch.is_grad_enabled():
            outputs = [cast(Tensor, checkpoint(function, chunk, use_reentrant=False)) for chunk in chunks]
        else:
            outputs = [function(chunk) for chunk in chunks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _check(self, bold: Tensor) -> None:
        grid, frames = self.config.img_size[:3], self.config.img_size[3]
        expected = (self.config.in_chans, *grid)
        if bold.dim() != 6 or tuple(bold.shape[1:5]) != expected or not 1 <= bold.shape[5] <= frames or not len(bold):
            raise UsageError(
                f"tff: expected (batch, {', '.join(map(str, expected))}, 1 to {frames}) as (b, c, x, y, z, t), "
                f"got {tuple(bold.shape)}; give the model the img_size and in_chans of the data"
            )


class _Rebuilding(_Frames):
    """Vectors back to frames."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__(config)
        self.from_bert = FromBert(config)
        self.decoder = Decoder(config)

    def decode(self, vectors: Tensor) -> Tensor:
        """(b, t, width) to (b, out_chans, x, y, z, t)."""
        frames = self._by_chunks(self._decode_frames, vectors.flatten(0, 1))
        return frames.view(*vectors.shape[:2], *frames.shape[1:]).permute(0, 2, 3, 4, 5, 1)

    def _decode_frames(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.from_bert(vectors))
        return out


class AutoEncoder(_Rebuilding):
    """Phase 1: every frame through its vector and back."""

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, out_chans, x, y, z, t)."""
        return self.decode(self.encode(bold))


class EncoderTransformerDecoder(_Rebuilding):
    """Phase 2: the frames are rebuilt from what the transformer makes of their vectors."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config, has_pooler=False)

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, out_chans, x, y, z, t)."""
        return self.decode(self.transformer(self.encode(bold))[:, 1:])


class _Pooling(_Frames):
    """Windows to vectors."""

    def __init__(self, config: TffConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config, has_pooler=True)

    def summarise(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, width), in float32: the pooled vector of each window."""
        sequence = self.transformer(self.encode(bold))
        with torch.autocast(bold.device.type, enabled=False):
            return self.transformer.bert.pool(sequence.float())


class EncoderTransformerHead(_Pooling):
    """Phase 3: one linear map of the pooled vector.

    `activation` is "none" for logits and values, which the losses here expect; the published code ends in "sigmoid" for
    classes and "leaky_relu" for numbers. It has no weights, so checkpoints do not tell.
    """

    def __init__(self, config: TffConfig, *, outputs: int = 1, activation: str = "none") -> None:
        super().__init__(config)
        if activation not in ACTIVATIONS:
            raise UsageError(f"tff: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if outputs < 1:
            raise UsageError(f"outputs must be a whole number above 0, got {outputs!r}")
        self.activation = ACTIVATIONS[activation]
        self.regression_head = nn.Sequential(nn.Linear(config.intermediate_vec, outputs))

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, outputs) in float32, also under autocast: bfloat16 scores would tie."""
        pooled = self.summarise(bold)
        with torch.autocast(bold.device.type, enabled=False):
            return self.activation(self.regression_head(pooled))


class EncoderTransformerContrast(_Pooling):
    """Pre-training of encoder and transformer on pairs of windows: the pooled vector, projected, of length 1.

    The projection (two linear maps with a ReLU between) has no batch normalisation, because TFF's batches are of 1 to 4.
    """

    def __init__(self, config: TffConfig, *, outputs: int = EMBEDDING_WIDTH) -> None:
        super().__init__(config)
        width = config.intermediate_vec
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, outputs) in float32."""
        pooled = self.summarise(bold)
        with torch.autocast(bold.device.type, enabled=False):
            return F.normalize(self.projection(pooled), dim=1)


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}

Phase = Literal["tff1", "tff2", "tff3", "tff-contrast"]
# Phase -> its network, and what it takes beside the sizes.
PHASES: Mapping[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "tff1": (AutoEncoder, ()),
    "tff2": (EncoderTransformerDecoder, ()),
    "tff3": (EncoderTransformerHead, ("outputs", "activation")),
    "tff-contrast": (EncoderTransformerContrast, ("outputs",)),
}


def build_tff(phase: str, options: Mapping[str, Any]) -> nn.Module:
    """The network of a phase from a recipe's model section: the sizes, and `outputs` and `activation` where it has them."""
    if phase not in PHASES:
        raise UsageError(f"there is no phase {phase!r} of tff; known: {', '.join(PHASES)}")
    network, own = PHASES[phase]
    sizes = {name: value for name, value in options.items() if name not in own}
    return network(tff_config(sizes), **{name: options[name] for name in own if name in options})
