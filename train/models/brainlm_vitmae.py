"""BrainLM's image model: parcels x frames as a padded picture for a masked autoencoder, (b, parcels, t) to the same.

Parameters have the names of the published checkpoints. The published code repeats the series to three equal channels and
averages the three it predicts; here the weights are summed and averaged instead, which is the same function of the same
parameters in a third of the arithmetic. Only patches that are shown are embedded.
"""

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from train.models.brainlm import Intermediate, join_heads, run_layers, split_heads
from train.models.brainlm_config import VitmaeConfig
from train.models.depth import depth_by_name
from train.models.load import Loaded, load_named
from train.models.series_masking import (
    Masking,
    Mode,
    Reconstruction,
    TokenChoice,
    choose_random,
    choose_trailing,
    complete_tokens,
    draw_noise,
    take_tokens,
)

# What the published code puts around the picture.
PADDING_VALUE = -1.0
# The published code divides its robust-scaled series by this before the image models see them.
PUBLISHED_SCALE = 5.6430855


class Projections(nn.Module):
    """Queries, keys and values."""

    def __init__(self, channels: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels, bias=bias)
        self.key = nn.Linear(channels, channels, bias=bias)
        self.value = nn.Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        q, k, v = (split_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        return join_heads(F.scaled_dot_product_attention(q, k, v))


class Output(nn.Module):
    """A linear map back to the width of the tokens."""

    def __init__(self, inputs: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, inputs) to (b, tokens, channels)."""
        out: Tensor = self.dropout(self.dense(x))
        return out


class Attention(nn.Module):
    """Softmax attention and its output, under their published names."""

    def __init__(self, channels: int, heads: int, config: VitmaeConfig) -> None:
        super().__init__()
        self.attention = Projections(channels, heads, bias=config.qkv_bias)
        self.output = Output(channels, channels, config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        out: Tensor = self.output(self.attention(x))
        return out


class Layer(nn.Module):
    """Attention, then an MLP; each reads normalised tokens and is added to them."""

    def __init__(self, channels: int, heads: int, width: int, config: VitmaeConfig) -> None:
        super().__init__()
        self.attention = Attention(channels, heads, config)
        self.intermediate = Intermediate(channels, width)
        self.output = Output(width, channels, config.hidden_dropout_prob)
        self.layernorm_before = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(channels, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        x = x + self.attention(self.layernorm_before(x))
        out: Tensor = x + self.output(self.intermediate(self.layernorm_after(x)))
        return out


class PatchProjection(nn.Module):
    """The published convolution's weights, applied as a linear map to patches of equal channels."""

    def __init__(self, config: VitmaeConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(b, n, patch * patch) to (b, n, channels)."""
        return F.linear(patches, self.projection.weight.sum(1).flatten(1), self.projection.bias)


class Embeddings(nn.Module):
    """Tokens of the patches that are shown, after the cls token; the table of positions does not learn."""

    position_embeddings: Tensor

    def __init__(self, config: VitmaeConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = PatchProjection(config)
        self.register_buffer("position_embeddings", position_table(config.hidden_size, config.grid))

    def forward(self, patches: Tensor, shown: Tensor) -> Tensor:
        """(b, tokens, patch * patch) and token numbers (b, kept) to (b, 1 + kept, channels)."""
        table = self.position_embeddings[0]
        tokens = self.patch_embeddings(take_tokens(patches, shown)) + table[1 + shown]
        cls = (self.cls_token + table[:1]).to(tokens.dtype)
        return torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1)


class Encoder(nn.Module):
    """The layers that read what is shown."""

    def __init__(self, config: VitmaeConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config.hidden_size, config.num_attention_heads, config.intermediate_size, config)
            for _ in range(config.num_hidden_layers)
        )


class Vit(nn.Module):
    """Embeddings, layers and a last normalisation."""

    def __init__(self, config: VitmaeConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Decoder(nn.Module):
    """Completes the tokens, adds their positions once more, and predicts every patch."""

    decoder_pos_embed: Tensor

    def __init__(self, config: VitmaeConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.channels = config.num_channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", position_table(width, config.grid))
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.decoder_layers = nn.ModuleList(
            Layer(width, config.decoder_num_attention_heads, config.decoder_intermediate_size, config)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    def forward(self, latent: Tensor, restore: Tensor, *, checkpointing: bool) -> Tensor:
        """(b, 1 + kept, channels) to (b, tokens, patch * patch): the mean of the predicted channels."""
        x = self.decoder_embed(latent)
        x = torch.cat([x[:, :1], complete_tokens(x[:, 1:], self.mask_token, restore)], dim=1)
        x = run_layers(self.decoder_layers, x + self.decoder_pos_embed, checkpointing=checkpointing)
        # The channel is the fastest axis of a predicted patch.
        weight = self.decoder_pred.weight.view(-1, self.channels, x.shape[-1]).mean(1)
        bias = self.decoder_pred.bias.view(-1, self.channels).mean(1)
        return F.linear(self.decoder_norm(x)[:, 1:], weight, bias)


class BrainlmVitmae(nn.Module):
    """Encoder and decoder; `checkpointing` trades a second forward pass of every layer for its activations."""

    takes = "series"

    def __init__(self, config: VitmaeConfig, *, checkpointing: bool = False) -> None:
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
    def patch(self) -> int:
        """Frames that are hidden together; predict_last_pixel hides any number."""
        return self.config.patch_size

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
        return Masking(mode=cast(Mode, self.config.train_mode), ratio=self.config.mask_ratio)

    def noise_size(self, parcels: int, frames: int) -> int:
        """How many random numbers the mask of a window of so many parcels and frames is made of."""
        return self.config.grid**2

    def forward(
        self,
        series: Tensor,
        xyz: Tensor | None = None,
        *,
        masking: Masking | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Hide some of (b, parcels, t) and complete it; `series` and `hidden` of the result have the input's order.

        Args:
            series: parcels and frames are at most `image_size` each, divided by `PUBLISHED_SCALE` for published weights.
            xyz: (parcels, 3) or (b, parcels, 3), mm; the picture's rows are sorted by y, as published. Without xyz the
                parcels are taken to be sorted already.
            masking: what to hide; by default, what the configuration says.
            noise: (b, patches of the picture), row by row; drawn from `generator` by default. The predicting modes use
                it for the order of the tokens only.
            generator: of the noise.
        """
        self._check(series)
        masking = masking or self.masking
        order = _row_order(series, xyz)
        rows = series if order is None else take_tokens(series, order)
        choice = self._choose(rows, masking, noise, generator)
        hidden = self._hidden(rows, masking, choice)
        blank = masking.masked_frames(rows.shape[2]) if masking.mode == "predict_last_pixel" else 0
        latent = self.encode(self._patches(rows, blank), choice.shown)
        predicted = self.decoder(latent, choice.restore, checkpointing=self.checkpointing)
        picture = self._crop(predicted, rows)
        if order is not None:
            back = order.argsort(dim=1)
            picture, hidden = take_tokens(picture, back), take_tokens(hidden, back)
        return Reconstruction(
            series=picture, hidden=hidden, latent=latent, hidden_tokens=choice.hidden, restore=choice.restore
        )

    def encode(self, patches: Tensor, shown: Tensor) -> Tensor:
        """(b, tokens, patch * patch) and token numbers (b, kept) to (b, 1 + kept, channels)."""
        x = self.vit.embeddings(patches, shown)
        latent: Tensor = self.vit.layernorm(run_layers(self.vit.encoder.layer, x, checkpointing=self.checkpointing))
        return latent

    def features(self, series: Tensor, xyz: Tensor | None = None) -> Tensor:
        """The latent tokens of a window of which nothing is hidden: (b, 1 + tokens, channels), cls first."""
        self._check(series)
        order = _row_order(series, xyz)
        rows = series if order is None else take_tokens(series, order)
        return self.encode(self._patches(rows), self._all_tokens(rows))

    def parcel_attention(self, series: Tensor, xyz: Tensor | None = None, *, layer: int = -1) -> Tensor:
        """How much each parcel attends to each other: (b, parcels, parcels), rows sum to 1.

        A patch covers `patch_size` parcels that are neighbours in the picture, and they share its attention: this is as
        coarse as that. Padding is left out, as are the cls token; else as for the token model.
        """
        self._check(series)
        order = _row_order(series, xyz)
        rows = series if order is None else take_tokens(series, order)
        layers = list(self.vit.encoder.layer)
        number = range(len(layers))[layer]
        x = self.vit.embeddings(self._patches(rows), self._all_tokens(rows))
        x = run_layers(nn.ModuleList(layers[:number]), x, checkpointing=False)
        last = cast(Layer, layers[number])
        projections = last.attention.attention
        normal = last.layernorm_before(x)[:, 1:]
        q, k = (split_heads(part(normal), projections.heads) for part in (projections.query, projections.key))
        scores = ((q @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5).softmax(-1).mean(1)
        by_parcel = self._parcels_from_patches(scores, rows)
        if order is None:
            return by_parcel
        back = order.argsort(dim=1)
        return take_tokens(take_tokens(by_parcel, back).transpose(1, 2), back).transpose(1, 2)

    def _parcels_from_patches(self, scores: Tensor, rows: Tensor) -> Tensor:
        """(b, tokens, tokens) to (b, parcels, parcels), patches of padding frames left out."""
        grid, patch = self.config.grid, self.config.patch_size
        (top, _), (left, _) = self._margins(rows)
        parcel_row = (torch.arange(rows.shape[1], device=rows.device) + top) // patch
        columns = slice(left // patch, -(-(left + rows.shape[2]) // patch))
        table = scores.view(-1, grid, grid, grid, grid)[:, :, columns][..., columns].mean(2).sum(3)
        table = table[:, parcel_row][:, :, parcel_row]
        return table / table.sum(-1, keepdim=True)

    def _check(self, series: Tensor) -> None:
        size = self.config.image_size
        if series.dim() != 3 or not 0 < series.shape[1] <= size or not 0 < series.shape[2] <= size:
            raise UsageError(
                f"brainlm_vitmae: expected (batch, parcels, t), at most {size} of each, got {tuple(series.shape)}; "
                "cut the window or change image_size"
            )

    def _margins(self, rows: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Padding before and after the parcels, and before and after the frames; the odd one goes after."""
        spare = [self.config.image_size - size for size in rows.shape[1:]]
        above, left = (number // 2 for number in spare)
        return (above, spare[0] - above), (left, spare[1] - left)

    def _patches(self, rows: Tensor, blank: int = 0) -> Tensor:
        """(b, parcels, t) to (b, tokens, patch * patch), padded; the last `blank` frames are 0 over the whole height."""
        grid, patch = self.config.grid, self.config.patch_size
        vertical, (left, right) = self._margins(rows)
        shown = F.pad(rows[:, :, : rows.shape[2] - blank], (left, 0, *vertical), value=PADDING_VALUE)
        picture = torch.cat(
            [shown, shown.new_zeros(*shown.shape[:2], blank), shown.new_full((*shown.shape[:2], right), PADDING_VALUE)],
            dim=2,
        )
        return picture.view(-1, grid, patch, grid, patch).transpose(2, 3).reshape(-1, grid * grid, patch * patch)

    def _crop(self, patches: Tensor, rows: Tensor) -> Tensor:
        """(b, tokens, patch * patch) to (b, parcels, t), without the padding."""
        grid, patch, size = self.config.grid, self.config.patch_size, self.config.image_size
        (top, _), (left, _) = self._margins(rows)
        picture = patches.view(-1, grid, grid, patch, patch).transpose(2, 3).reshape(-1, size, size)
        return picture[:, top : top + rows.shape[1], left : left + rows.shape[2]]

    def _all_tokens(self, rows: Tensor) -> Tensor:
        tokens = self.config.grid**2
        return torch.arange(tokens, device=rows.device).expand(len(rows), tokens)

    def _choose(
        self, rows: Tensor, masking: Masking, noise: Tensor | None, generator: torch.Generator | None
    ) -> TokenChoice:
        tokens = self.config.grid**2
        if masking.mode == "auto_encode":
            if noise is None:
                noise = draw_noise(len(rows), tokens, device=rows.device, generator=generator)
            return choose_random(len(rows), tokens, masking.ratio, noise)
        columns = self._hidden_columns(rows, masking)
        if masking.mode == "predict_last" and not columns:
            raise UsageError(
                f"brainlm_vitmae: predict_last of {masking.masked_frames(rows.shape[2])} frames hides no whole patch of "
                f"{self.patch}; hide more, or use predict_last_pixel"
            )
        place = torch.arange(self.config.grid, device=rows.device)
        hidden = ((place >= columns.start) & (place < columns.stop)).repeat(self.config.grid)
        return choose_trailing(hidden, tokens - self.config.grid * len(columns), len(rows), noise)

    def _hidden_columns(self, rows: Tensor, masking: Masking) -> range:
        """Columns of patches, over the whole height, that begin in the hidden frames; what is only padding stays shown."""
        (_, _), (left, _) = self._margins(rows)
        end = left + rows.shape[2]
        first = end - masking.masked_frames(rows.shape[2])
        return range(-(-first // self.patch), -(-end // self.patch))

    def _hidden(self, rows: Tensor, masking: Masking, choice: TokenChoice) -> Tensor:
        """(b, parcels, t): the area of hidden tokens; predict_last_pixel hides the frames before their boundary too."""
        pixels = choice.hidden.unsqueeze(-1).expand(-1, -1, self.config.patch_size**2)
        hidden = self._crop(pixels, rows)
        if masking.mode == "predict_last_pixel":
            frame = torch.arange(rows.shape[2], device=rows.device)
            hidden = hidden | (frame >= rows.shape[2] - masking.masked_frames(rows.shape[2]))
        return hidden

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def position_table(channels: int, grid: int) -> Tensor:
    """(1, 1 + grid * grid, channels): zeros for cls, then sines and cosines of column (first half) and row."""
    places = np.arange(grid, dtype=np.float64)
    columns, rows = np.tile(places, grid), np.repeat(places, grid)
    table = np.concatenate([_waves(columns, channels // 2), _waves(rows, channels // 2)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, channels)), table]).astype(np.float32)).unsqueeze(0)


def _waves(places: NDArray[np.float64], channels: int) -> NDArray[np.float64]:
    rates = 10000.0 ** (-np.arange(channels // 2) / (channels / 2))
    angles = np.outer(places, rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _row_order(series: Tensor, xyz: Tensor | None) -> Tensor | None:
    """(b, parcels): the parcels by rising y; equal ones keep their order."""
    if xyz is None:
        return None
    b, parcels = series.shape[:2]
    if xyz.dim() not in (2, 3) or tuple(xyz.shape[-2:]) != (parcels, 3):
        raise UsageError(f"brainlm_vitmae: expected xyz of {parcels} parcels as ({parcels}, 3), got {tuple(xyz.shape)}")
    return xyz[..., 1].argsort(dim=-1, stable=True).expand(b, parcels)


def load_vitmae(model: BrainlmVitmae, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Load published weights strictly; every one of them is used. `source` names them in errors."""
    return load_named(model, weights, source=source, ignored={})
