"""A masked autoencoder on 4-D volumes: most patches of a clip are hidden, and rebuilt from what the others say.

It follows the volume model of CortexMAE (arXiv 2510.13768) and MAE-st (arXiv 2205.09113): tokens are patches of voxels
and frames that hold brain, positions are a table of places plus a table of times, the encoder reads what is shown and a
cls token, a light decoder predicts what is hidden, and the loss counts voxels of the brain only. Give it bold z-scored by
voxel: on other scales, differences between voxels drown those in time.

`Mae4dPretrain` learns it, `Mae4d` puts the encoder under a head; both call it `encoder`, so that
`mae4d_load.load_encoder` moves it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmristream.errors import UsageError
from train.masked_objectives import masked_mse
from train.models.brainlm import run_layers
from train.models.depth import depth_by_name
from train.models.heads import build_head
from train.models.mae4d_config import Mae4dConfig, Mae4dHeadConfig, Mae4dPretrainConfig, head_config, pretrain_config
from train.models.mae4d_layers import AttentionPool, CrossLayer, Layer, Positions, initialise
from train.models.mae4d_patches import BrainPatches, normalised
from train.models.series_masking import take_tokens
from train.models.volume_masking import TokenSplit, split_tokens

_BEFORE_LAYERS = ("encoder.embed.", "encoder.cls_token", "encoder.positions.", "encoder.patches.")


class Rebuilt(NamedTuple):
    """What a network made of what it was not shown, (b, hidden, values), beside what was there.

    `counted` is true for values of brain voxels: the loss is `masked_mse(predicted, target, counted)`, or
    `rebuilding_losses` by sample. Token numbers are rising; `latent` (b, 1 + shown, channels) has cls first. `frames`
    (b, hidden, frames of a patch) are the numbers of the frames that a token's values run over, slowest.
    """

    predicted: Tensor
    target: Tensor
    counted: Tensor
    shown: Tensor
    hidden: Tensor
    latent: Tensor
    frames: Tensor

    def of_frames(self, chosen: Tensor) -> Tensor:
        """(b, t) bool to (b, hidden, values): which values are of the chosen frames."""
        rows = chosen.gather(1, self.frames.flatten(1)).view(self.frames.shape)
        return rows.repeat_interleave(self.predicted.shape[2] // rows.shape[2], dim=2)


def rebuilding_losses(rebuilt: Rebuilt) -> Tensor:
    """Mean squared error over the hidden brain values of each sample, (b,), float32.

    Their mean does not depend on how a batch is spread over ranks, where the mean over all values of the batch would.
    """
    rows = zip(rebuilt.predicted, rebuilt.target, rebuilt.counted, strict=True)
    return torch.stack([masked_mse(*row) for row in rows])


class Encoder(nn.Module):
    """Tokens of the patches that are shown, after a cls token, through the layers of a vision transformer."""

    def __init__(self, config: Mae4dConfig) -> None:
        super().__init__()
        self.config = config
        x, y, z, _ = config.img_size
        self.patches = BrainPatches((x, y, z), config.patch_size, config.in_chans)
        self.embed = nn.Linear(config.values, config.embed_dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, config.embed_dim))
        self.positions = Positions(config.embed_dim, config)
        self.layers = nn.ModuleList(
            Layer(config.embed_dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        initialise(self)

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, 1 + tokens, channels), cls first; nothing is hidden."""
        return self.encode(self.cut(bold))

    def cut(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, tokens, values).

        Raises:
            UsageError: it is not of the sizes that the network was built for.
        """
        config = self.config
        *grid, frames = config.img_size
        patch = config.patch_size[3]
        t = bold.shape[5] if bold.dim() == 6 else 0
        if bold.dim() != 6 or tuple(bold.shape[1:5]) != (config.in_chans, *grid) or not 0 < t <= frames or t % patch:
            raise UsageError(
                f"mae4d: expected (batch, {config.in_chans}, {', '.join(map(str, grid))}, at most {frames} in steps of "
                f"{patch}) as (b, c, x, y, z, t), got {tuple(bold.shape)}; build the model with the img_size of the data; "
                "mae4d_load.resize_times fits trained weights to longer clips"
            )
        return self.patches.cut(bold)

    def encode(self, patches: Tensor, shown: Tensor | None = None) -> Tensor:
        """(b, tokens, values) to (b, 1 + shown, channels); `shown` (b, kept) are token numbers, by default all."""
        table = self.positions(self.patches.places, patches.shape[1] // self.patches.count)
        if shown is not None:
            patches, table = take_tokens(patches, shown), table[shown]
        tokens = self.embed(patches) + table
        x = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        out: Tensor = self.norm(run_layers(self.layers, x, checkpointing=self.config.checkpointing))
        return out


class Decoder(nn.Module):
    """Predicts the values of the patches that were hidden."""

    def __init__(self, config: Mae4dPretrainConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_dim
        self.embed = nn.Linear(config.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = Positions(width, config)
        kind = Layer if config.decoder == "self" else CrossLayer
        self.layers = nn.ModuleList(
            kind(width, config.decoder_heads, config.mlp_ratio) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.pred = nn.Linear(width, config.values)
        initialise(self)

    def forward(self, latent: Tensor, split: TokenSplit, places: Tensor) -> Tensor:
        """(b, 1 + shown, channels) and which tokens these are to (b, hidden, values)."""
        times = (split.shown.shape[1] + split.hidden.shape[1]) // len(places)
        table = self.positions(places, times)
        x = self.embed(latent)
        shown = torch.cat([x[:, :1], x[:, 1:] + table[split.shown]], dim=1)
        asking = (self.mask_token + table[split.hidden]).to(shown.dtype)
        if self.config.decoder == "self":
            x = run_layers(self.layers, torch.cat([shown, asking], dim=1), checkpointing=self.config.checkpointing)
            asking = x[:, shown.shape[1] :]
        else:
            asking = self._ask(asking, shown)
        out: Tensor = self.pred(self.norm(asking))
        return out

    def _ask(self, x: Tensor, memory: Tensor) -> Tensor:
        recompute = self.config.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = cast(Tensor, checkpoint(layer, x, memory, use_reentrant=False) if recompute else layer(x, memory))
        return x


class Mae4dPretrain(nn.Module):
    """Encoder and decoder; `set_brain` first, or every patch of the volume is a token."""

    def __init__(self, config: Mae4dPretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._check_share()

    @property
    def num_features(self) -> int:
        """Width of the latent tokens."""
        return self.config.embed_dim

    @property
    def num_layers(self) -> int:
        """Of the encoder."""
        return self.config.depth

    def layer_depth(self, name: str) -> int:
        """See `train.models.depth`; the decoder lies above all layers."""
        return depth_by_name(name, before=_BEFORE_LAYERS, layers="encoder.layers.", number=self.num_layers)

    def set_brain(self, brain: Tensor | NDArray[np.bool_]) -> None:
        """Say which voxels (x, y, z) are brain; see `mae4d_patches.brain_from_positions`."""
        self.encoder.patches.set_brain(brain)
        self._check_share()

    def _check_share(self) -> None:
        """Before the first step: that some is hidden and some shown."""
        self.config.masking.hidden_tokens(places=self.encoder.patches.count, times=self.config.times)

    def noise_size(self, frames: int) -> int:
        """How many random numbers a clip's mask is made of."""
        times = frames // self.config.patch_size[3]
        return self.config.masking.noise_size(places=self.encoder.patches.count, times=times, grid=self.config.grid)

    def forward(
        self, bold: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Rebuilt:
        """Hide most of (b, c, x, y, z, t), and predict it.

        Args:
            bold: clips.
            noise: (b, `noise_size(t)`) uniform in [0, 1), of which each sample's row decides its mask.
            generator: of the noise, where none is given.
        """
        if noise is None:
            place = bold.device if generator is None else generator.device
            noise = torch.rand(len(bold), self.noise_size(bold.shape[-1]), generator=generator, device=place)
        if len(noise) != len(bold):
            raise UsageError(f"mae4d: {len(noise)} rows of noise for {len(bold)} clips; give each clip its own")
        encoder, patches = self.encoder, self.encoder.cut(bold)
        split = self.split(noise.to(bold.device), frames=bold.shape[-1])
        latent = encoder.encode(patches, split.shown)
        target, counted = take_tokens(patches, split.hidden), encoder.patches.inside_of(split.hidden)
        if self.config.normalise_target:
            target = normalised(target, counted, self.config.in_chans)
        return Rebuilt(
            predicted=self.decoder(latent, split, encoder.patches.places),
            target=target,
            counted=counted,
            shown=split.shown,
            hidden=split.hidden,
            latent=latent,
            frames=encoder.patches.frames_of(split.hidden),
        )

    def split(self, noise: Tensor, *, frames: int) -> TokenSplit:
        """Which tokens of clips of so many frames the noise shows and hides."""
        return split_tokens(
            self.config.masking,
            noise,
            places=self.encoder.patches.places,
            times=frames // self.config.patch_size[3],
            grid=self.config.grid,
        )

    def features(self, bold: Tensor) -> Tensor:
        """The encoder's tokens of clips of which nothing is hidden: (b, 1 + tokens, channels), cls first."""
        out: Tensor = self.encoder(bold)
        return out

    def volumes(self, values: Tensor, hidden: Tensor, *, frames: int) -> Tensor:
        """Values (b, hidden, values) such as `predicted` on the grid of the data: (b, c, x, y, z, t), 0 elsewhere."""
        tokens = self.encoder.patches.count * (frames // self.config.patch_size[3])
        empty = values.new_zeros(len(values), tokens, values.shape[2])
        return self.encoder.patches.join(empty.scatter(1, hidden.unsqueeze(-1).expand_as(values), values))


class Mae4d(nn.Module):
    """The encoder under a head: (b, c, x, y, z, t) to (b, outputs), float32.

    `pooling`: the mean of all tokens but cls, the cls token, or attention of one learned query to all but cls.
    """

    def __init__(self, config: Mae4dHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pool = AttentionPool(config.embed_dim, config.num_heads) if config.pooling == "attention" else None
        self.output_head = build_head(config.head, channels=config.embed_dim, outputs=config.outputs)
        if config.learning == "head":
            self.encoder.requires_grad_(requires_grad=False)

    @property
    def num_features(self) -> int:
        """Width of the tokens."""
        return self.config.embed_dim

    @property
    def num_layers(self) -> int:
        """Of the encoder."""
        return self.config.depth

    def layer_depth(self, name: str) -> int:
        """See `train.models.depth`; the head lies above all layers."""
        return depth_by_name(name, before=_BEFORE_LAYERS, layers="encoder.layers.", number=self.num_layers)

    def set_brain(self, brain: Tensor | NDArray[np.bool_]) -> None:
        """As for `Mae4dPretrain`."""
        self.encoder.patches.set_brain(brain)

    def features(self, bold: Tensor) -> Tensor:
        """(b, 1 + tokens, channels), cls first."""
        out: Tensor = self.encoder(bold)
        return out

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, outputs)."""
        tokens = self.features(bold)
        pooled = tokens[:, :1] if self.config.pooling == "cls" else tokens[:, 1:]
        pooled = pooled if self.pool is None else self.pool(pooled)
        out: Tensor = self.output_head(pooled.transpose(1, 2))
        return out


def build_mae4d(options: Mapping[str, Any]) -> Mae4d:
    """The supervised network from a recipe's model section."""
    return Mae4d(head_config(options))


def build_mae4d_pretrain(options: Mapping[str, Any]) -> Mae4dPretrain:
    """The network of pre-training from a recipe's model section."""
    return Mae4dPretrain(pretrain_config(options))
