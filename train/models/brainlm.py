"""BrainLM's token model: parcel series (b, parcels, t) and parcel positions to the series completed where it was hidden.

Parameters have the names of the published checkpoints, but for `decoder.decoder_pred.*`: the published code makes that
layer and never applies it. Here it does not exist, because a parameter without a gradient stops DDP, and `load_brainlm`
skips it by name. The published Nyström attention is exact softmax attention at every published size, because its number
of landmarks equals its nominal sequence length; what remains of it is a depthwise convolution of the values over tokens.
Only tokens that are shown are embedded: hidden ones cost nothing before the decoder.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fmristream.errors import UsageError
from train.models.brainlm_config import BrainlmConfig
from train.models.depth import depth_by_name
from train.models.load import Loaded, load_named
from train.models.series_masking import (
    Masking,
    Reconstruction,
    TokenChoice,
    choose_random,
    choose_trailing,
    complete_tokens,
    draw_noise,
    take_tokens,
)

# Rows of the published time table, whatever the window: more patches than any run has.
TIME_TABLE_ROWS = 5000
NEVER_APPLIED = {"decoder.decoder_pred.": "made by the published code but never applied"}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, tokens, channels) to (b, heads, tokens, width)."""
    b, tokens, channels = x.shape
    return x.view(b, tokens, heads, channels // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(b, heads, tokens, width) to (b, tokens, channels)."""
    return x.transpose(1, 2).flatten(2)


def run_layers(layers: nn.ModuleList, x: Tensor, *, checkpointing: bool) -> Tensor:
    """One layer after the other; with checkpointing, only what enters a layer is kept for the gradient."""
    for layer in layers:
        recompute = checkpointing and torch.is_grad_enabled()
        x = cast(Tensor, checkpoint(layer, x, use_reentrant=False)) if recompute else layer(x)
    return x


class SelfAttention(nn.Module):
    """Exact softmax attention, plus a convolution of each head's values along the tokens."""

    def __init__(self, channels: int, heads: int, kernel: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.conv = (
            None
            if kernel is None
            else nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        q, k, v = (split_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(q, k, v)
        if self.conv is not None:
            context = context + self.conv(v)
        return join_heads(context)


class ResidualOutput(nn.Module):
    """A linear map, added to what a part of the layer began with, then normalised."""

    def __init__(self, inputs: int, channels: int, config: BrainlmConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, channels)
        self.LayerNorm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, beginning: Tensor) -> Tensor:
        """(b, tokens, inputs) and (b, tokens, channels) to the latter's shape."""
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + beginning)
        return out


class Attention(nn.Module):
    """Self-attention and its output, under their published names."""

    def __init__(self, channels: int, heads: int, config: BrainlmConfig) -> None:
        super().__init__()
        self.self = SelfAttention(channels, heads, config.conv_kernel_size)
        self.output = ResidualOutput(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        out: Tensor = self.output(self.self(x), x)
        return out


class Intermediate(nn.Module):
    """The widening half of the MLP, with an exact GELU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels) to (b, tokens, width)."""
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Attention, then an MLP; each is added to its input and normalised after that."""

    def __init__(self, channels: int, heads: int, width: int, config: BrainlmConfig) -> None:
        super().__init__()
        self.attention = Attention(channels, heads, config)
        self.intermediate = Intermediate(channels, width)
        self.output = ResidualOutput(width, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        x = self.attention(x)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class TimeTable(nn.Module):
    """Sines and cosines over the patch number, as published: a buffer that checkpoints hold."""

    pe: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        position = torch.arange(TIME_TABLE_ROWS).unsqueeze(1)
        rates = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
        table = torch.zeros(TIME_TABLE_ROWS, channels)
        table[:, 0::2] = torch.sin(position * rates)
        table[:, 1::2] = torch.cos(position * rates[: channels // 2])
        self.register_buffer("pe", table)


class Embeddings(nn.Module):
    """Tokens of the patches that are shown, after the cls token."""

    def __init__(self, config: BrainlmConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.signal_embedding_projection = nn.Linear(config.timepoint_patching_size, config.hidden_size)
        self.xyz_embedding_projection = nn.Linear(3, config.hidden_size)
        self.pos_embedding = TimeTable(config.hidden_size)

    def forward(self, patches: Tensor, xyz: Tensor, shown: Tensor) -> Tensor:
        """(b, parcels, patches, frames), (b, parcels, 3) and token numbers (b, kept) to (b, 1 + kept, channels)."""
        number = patches.shape[2]
        signal = self.signal_embedding_projection(take_tokens(patches.flatten(1, 2), shown))
        place = take_tokens(self.xyz_embedding_projection(xyz), shown // number)
        tokens = signal + place + self.pos_embedding.pe[shown % number]
        cls = self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([cls, tokens], dim=1)


class Encoder(nn.Module):
    """The layers that read what is shown."""

    def __init__(self, config: BrainlmConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config.hidden_size, config.num_attention_heads, config.intermediate_size, config)
            for _ in range(config.num_hidden_layers)
        )


class Vit(nn.Module):
    """Embeddings, layers and a last normalisation."""

    def __init__(self, config: BrainlmConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Decoder(nn.Module):
    """Completes the tokens, adds place and time once more, and predicts every patch."""

    def __init__(self, config: BrainlmConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.tanh = config.use_tanh_decoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.decoder_xyz_projection = nn.Linear(3, width)
        self.pos_embedding = TimeTable(width)
        self.decoder_layers = nn.ModuleList(
            Layer(width, config.decoder_num_attention_heads, config.decoder_intermediate_size, config)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred1 = nn.Linear(width, width // 2)
        self.decoder_pred2 = nn.Linear(width // 2, config.timepoint_patching_size)

    def forward(self, latent: Tensor, xyz: Tensor, restore: Tensor, *, checkpointing: bool) -> Tensor:
        """(b, 1 + kept, channels) to (b, tokens, frames of a patch)."""
        x = self.decoder_embed(latent)
        tokens = complete_tokens(x[:, 1:], self.mask_token, restore)
        b, parcels = xyz.shape[:2]
        grid = tokens.view(b, parcels, -1, tokens.shape[-1])
        grid = grid + self.decoder_xyz_projection(xyz).unsqueeze(2) + self.pos_embedding.pe[: grid.shape[2]]
        x = torch.cat([x[:, :1].to(grid.dtype), grid.flatten(1, 2)], dim=1)
        x = self.decoder_norm(run_layers(self.decoder_layers, x, checkpointing=checkpointing))
        predicted: Tensor = self.decoder_pred2(F.leaky_relu(self.decoder_pred1(x[:, 1:]), 0.1))
        return predicted.tanh() if self.tanh else predicted


class Brainlm(nn.Module):
    """Encoder and decoder; `checkpointing` trades a second forward pass of every layer for its activations."""

    takes = "series"

    def __init__(self, config: BrainlmConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.vit = Vit(config)
        self.decoder = Decoder(config)
        self.apply(self._initialise)
        for token in (self.vit.embeddings.cls_token, self.decoder.mask_token):
            nn.init.normal_(token, std=config.initializer_range)

    @property
    def num_features(self) -> int:
        """Width of the latent tokens."""
        return self.config.hidden_size

    @property
    def window(self) -> int:
        """Frames of the windows the model was built for."""
        return self.config.num_timepoints_per_voxel

    @property
    def patch(self) -> int:
        """Frames that are hidden together."""
        return self.config.timepoint_patching_size

    @property
    def num_layers(self) -> int:
        """Of the encoder."""
        return self.config.num_hidden_layers

    def layer_depth(self, name: str) -> int:
        """See `train.models.depth`; the decoder lies above all layers."""
        return depth_by_name(name, before=("vit.embeddings.",), layers="vit.encoder.layer.", number=self.num_layers)

    @property
    def masking(self) -> Masking:
        """What the configuration hides in pre-training."""
        return Masking(ratio=self.config.mask_ratio)

    def noise_size(self, parcels: int, frames: int) -> int:
        """How many random numbers the mask of a window of so many parcels and frames is made of."""
        return parcels * (frames // self.patch)

    def forward(
        self,
        series: Tensor,
        xyz: Tensor,
        *,
        masking: Masking | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Hide some of (b, parcels, t) and complete it.

        Args:
            series: any number of parcels; t at most the window, and a multiple of `timepoint_patching_size`.
            xyz: (parcels, 3) or (b, parcels, 3), mm, as in training.
            masking: what to hide; by default, what the configuration says.
            noise: (b, parcels * patches), parcel-major; drawn from `generator` by default.
            generator: of the noise.
        """
        patches, xyz = self._inputs(series, xyz)
        choice = self._choose(patches, masking or self.masking, noise, generator)
        latent = self.encode(patches, xyz, choice.shown)
        predicted = self.decoder(latent, xyz, choice.restore, checkpointing=self.checkpointing)
        hidden = choice.hidden.view(patches.shape[:3]).unsqueeze(-1).expand(patches.shape).flatten(2)
        return Reconstruction(
            series=predicted.view(patches.shape).flatten(2),
            hidden=hidden,
            latent=latent,
            hidden_tokens=choice.hidden,
            restore=choice.restore,
        )

    def encode(self, patches: Tensor, xyz: Tensor, shown: Tensor) -> Tensor:
        """(b, parcels, patches, frames), (b, parcels, 3) and token numbers (b, kept) to (b, 1 + kept, channels)."""
        x = self.vit.embeddings(patches, xyz, shown)
        latent: Tensor = self.vit.layernorm(run_layers(self.vit.encoder.layer, x, checkpointing=self.checkpointing))
        return latent

    def features(self, series: Tensor, xyz: Tensor) -> Tensor:
        """The latent tokens of a window of which nothing is hidden: (b, 1 + tokens, channels), cls first."""
        patches, xyz = self._inputs(series, xyz)
        return self.encode(patches, xyz, self._all_tokens(patches))

    def parcel_attention(self, series: Tensor, xyz: Tensor, *, layer: int = -1) -> Tensor:
        """How much each parcel attends to each other: (b, parcels, parcels), rows sum to 1.

        Nothing is hidden; mean over heads and over the patches of the attending parcel, sum over those of the attended one,
        without the cls token. One parcel's rows at a time, so that memory stays below that of a forward pass.
        """
        patches, xyz = self._inputs(series, xyz)
        layers = list(self.vit.encoder.layer)
        number = range(len(layers))[layer]
        x = run_layers(
            nn.ModuleList(layers[:number]),
            self.vit.embeddings(patches, xyz, self._all_tokens(patches)),
            checkpointing=False,
        )
        attention = cast(Layer, layers[number]).attention.self
        q, k = (split_heads(part(x)[:, 1:], attention.heads) for part in (attention.query, attention.key))
        parcels, tokens = patches.shape[1:3]
        rows = []
        for start in range(0, parcels * tokens, tokens):
            scores = (q[:, :, start : start + tokens] @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5
            rows.append(scores.softmax(-1).mean((1, 2)).view(-1, parcels, tokens).sum(2))
        return torch.stack(rows, dim=1)

    def _inputs(self, series: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        if series.dim() != 3 or series.shape[2] % self.patch or not 0 < series.shape[2] <= self.window:
            raise UsageError(
                f"brainlm: expected (batch, parcels, t) with t a multiple of {self.patch}, at most {self.window}, got "
                f"{tuple(series.shape)}; cut the window or change num_timepoints_per_voxel"
            )
        b, parcels, frames = series.shape
        if xyz.dim() not in (2, 3) or tuple(xyz.shape[-2:]) != (parcels, 3):
            raise UsageError(f"brainlm: expected xyz of {parcels} parcels as ({parcels}, 3), got {tuple(xyz.shape)}")
        xyz = xyz.to(series.dtype).expand(b, parcels, 3)
        return series.reshape(b, parcels, frames // self.patch, self.patch), xyz

    def _all_tokens(self, patches: Tensor) -> Tensor:
        tokens = patches.shape[1] * patches.shape[2]
        return torch.arange(tokens, device=patches.device).expand(len(patches), tokens)

    def _choose(
        self, patches: Tensor, masking: Masking, noise: Tensor | None, generator: torch.Generator | None
    ) -> TokenChoice:
        b, parcels, number = patches.shape[:3]
        if masking.mode == "auto_encode":
            if noise is None:
                noise = draw_noise(b, parcels * number, device=patches.device, generator=generator)
            return choose_random(b, parcels * number, masking.ratio, noise)
        hidden = self._trailing_patches(number, masking)
        trailing = torch.arange(number, device=patches.device) >= number - hidden
        return choose_trailing(trailing.repeat(parcels), parcels * (number - hidden), b, noise)

    def _trailing_patches(self, number: int, masking: Masking) -> int:
        """How many of a parcel's patches a predicting mode hides: whole ones only."""
        frames = number * self.patch
        hidden = int(number * masking.ratio) * self.patch if masking.frames is None else masking.masked_frames(frames)
        if hidden % self.patch or not 0 < hidden < frames:
            raise UsageError(
                f"brainlm: {masking.mode} of {hidden} of {frames} frames; a token is {self.patch} frames, so hide "
                "whole tokens, but not all of them"
            )
        return hidden // self.patch

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)


def load_brainlm(model: Brainlm, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Load published weights strictly; `source` names them in errors."""
    return load_named(model, weights, source=source, ignored=NEVER_APPLIED)
