"""SwiFT, the 4-D Swin transformer for fMRI, without attention masks: (b, c, x, y, z, t) to (b, channels, x, y, z, t).

Parameters have the names of the published checkpoints without `model.`, but for `norm.*`: the published code makes that
layer and never applies it. Here it does not exist, because a parameter without a gradient stops DDP, and
`train.models.load` skips it by name. Tokens stay channels-last from the patch embedding to the end.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fmristream.errors import UsageError
from train.models.attention import PieceAttention, TokenOrder, batch_order
from train.models.heads import HeadedModel, build_head
from train.models.load import WeightsError
from train.models.swift_config import SwiftConfig, swift_config
from train.models.windows import PADDING, plan_pieces

# On CPU the MLP of a large stage runs in chunks that stay in the cache, and once more for the gradient: at 82,000 tokens
# of 36 channels that takes .7 of the time and keeps half of a block's activations unstored; at 10,000 of 72 it takes 1.2.
MLP_CHUNK = 4096
LARGE_STAGE = 4 * MLP_CHUNK
_POSITIONS = re.compile(r"(?:^|\.)pos_embeds\.(\d+)\.(pos_embed|time_embed)$")
# The parts of a backbone by depth: patches; tables; blocks and mergings.
_DEPTH = re.compile(r"patch_embed\.|(?P<kind>pos_embeds|layers)\.(?P<stage>\d+)\.(?:blocks\.(?P<block>\d+)\.)?")


def run_part(part: Callable[..., Tensor], *inputs: Tensor | TokenOrder, checkpointing: bool) -> Tensor:
    """A part's output; with checkpointing only its inputs are kept for the gradient, for which it is computed once more."""
    if not (checkpointing and torch.is_grad_enabled()):
        return part(*inputs)
    # Nothing inside is random, so no generator state needs keeping.
    return cast(Tensor, checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False))


class PatchEmbedding(nn.Module):
    """One linear map of every spatial patch of every frame."""

    def __init__(self, config: SwiftConfig) -> None:
        super().__init__()
        self.patch = config.patch_size[:3]
        px, py, pz = self.patch
        self.fc = nn.Linear(px * py * pz * config.in_chans, config.embed_dim)

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) of any strides to (b, x, y, z, t, channels) on the grid of patches."""
        b, c, *sizes, t = bold.shape
        split = [number for size, patch in zip(sizes, self.patch, strict=True) for number in (size // patch, patch)]
        # A patch is flattened in the order x, y, z, channel; the channel is fastest.
        patches = bold.reshape(b, c, *split, t).permute(0, 2, 4, 6, 8, 3, 5, 7, 1)
        tokens: Tensor = self.fc(patches.reshape(*patches.shape[:5], self.fc.in_features))
        return tokens


class PositionTables(nn.Module):
    """Learned tables over space and time, added at the start of a stage."""

    def __init__(self, channels: int, grid: tuple[int, int, int], frames: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, channels, *grid, 1))
        self.time_embed = nn.Parameter(torch.zeros(1, channels, 1, 1, 1, frames))
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(b, x, y, z, t, channels), before and after."""
        time = table_of(self.time_embed, x.shape[4])
        return x + self.pos_embed.permute(0, 2, 3, 4, 5, 1) + time.permute(0, 2, 3, 4, 5, 1)


def table_of(table: Tensor, frames: int) -> Tensor:
    """A time table (..., rows) for a clip: its beginning, or all of it stretched where the clip is longer."""
    return table[..., :frames] if frames <= table.shape[-1] else stretch_table(table, frames)


def stretch_table(table: Tensor, frames: int) -> Tensor:
    """(..., rows) to (..., frames), linear between neighbours, the first and the last row where they were.

    A product with hat functions, because CUDA's own interpolation has a gradient that differs from run to run.
    """
    rows = table.shape[-1]
    places = torch.linspace(0, rows - 1, frames, dtype=torch.float64, device=table.device)
    row = torch.arange(rows, dtype=torch.float64, device=table.device).unsqueeze(1)
    hats = (1 - (places - row).abs()).clamp_min(0).to(table.dtype)
    return (table.unsqueeze(-1) * hats).sum(-2)


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(F.gelu(self.linear1(x)))
        return out


class Block(nn.Module):
    """Attention inside the pieces of a plan, then an MLP; each reads normalised tokens and is added to them."""

    def __init__(self, channels: int, heads: int, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm1 = nn.LayerNorm(channels)
        self.attn = PieceAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor, order: TokenOrder) -> Tensor:
        """(tokens, channels), before and after."""
        x = run_part(self._add_attention, x, order, checkpointing=self.checkpointing)
        # A compiler fuses the MLP itself, and would unroll the chunks.
        if x.device.type != "cpu" or len(x) < LARGE_STAGE or torch.compiler.is_compiling():
            return run_part(self._add_mlp, x, checkpointing=self.checkpointing)
        chunks = x.split_with_sizes([min(MLP_CHUNK, len(x) - start) for start in range(0, len(x), MLP_CHUNK)])
        return torch.cat([run_part(self._add_mlp, chunk, checkpointing=True) for chunk in chunks])

    def _add_attention(self, x: Tensor, order: TokenOrder) -> Tensor:
        out: Tensor = x + self.attn(self.norm1(x), order)
        return out

    def _add_mlp(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerging(nn.Module):
    """Join 2 x 2 x 2 neighbours (x slowest, z fastest) into one token of `multiplier` times the channels; time stays."""

    def __init__(self, channels: int, multiplier: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(8 * channels, multiplier * channels, bias=False)
        self.norm = nn.LayerNorm(8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, x, y, z, t, channels) to half of x, y and z."""
        b, sx, sy, sz, t, c = x.shape
        corners = x.view(b, sx // 2, 2, sy // 2, 2, sz // 2, 2, t, c).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
        merged: Tensor = self.reduction(self.norm(corners.reshape(b, sx // 2, sy // 2, sz // 2, t, 8 * c)))
        return merged


class Stage(nn.Module):
    """Blocks at one resolution, every second one on shifted windows, and the merging after all stages but the last.

    The orders of tokens are buffers that no checkpoint holds; `plan` makes them for a number of frames.
    """

    plain_index: Tensor
    shifted_index: Tensor

    def __init__(self, config: SwiftConfig, number: int) -> None:
        super().__init__()
        channels = config.stage_channels(number)
        self.grid = config.stage_grid(number)
        self.window, self.shift = config.stage_window(number)
        self.blocks = nn.ModuleList(
            Block(channels, config.num_heads[number], checkpointing=config.checkpointing)
            for _ in range(config.depths[number])
        )
        is_last = number == len(config.depths) - 1
        self.downsample = None if is_last else PatchMerging(channels, config.c_multiplier)
        self.checkpointing = config.checkpointing

    def plan(self, frames: int, device: torch.device) -> None:
        """Sort the tokens of clips of `frames` frames, for the blocks without and with shift."""
        plans = [plan_pieces((*self.grid, frames), self.window, shift) for shift in ((0, 0, 0, 0), self.shift)]
        self.groups = [plan.groups for plan in plans]
        self.has_padding = [bool((plan.index == PADDING).any()) for plan in plans]
        for name, plan in zip(("plain_index", "shifted_index"), plans, strict=True):
            self.register_buffer(name, torch.from_numpy(plan.index).to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, x, y, z, t, channels) to the same, or to the grid and channels of the next stage."""
        shape = x.shape
        orders = [self._order(shift, batch=shape[0], tokens=shape[1:5].numel()) for shift in (0, 1)]
        x = x.reshape(-1, shape[5])
        for number, block in enumerate(self.blocks):
            x = block(x, orders[number % 2])
        x = x.view(shape)
        return x if self.downsample is None else run_part(self.downsample, x, checkpointing=self.checkpointing)

    def _order(self, shift: int, *, batch: int, tokens: int) -> TokenOrder:
        index = (self.plain_index, self.shifted_index)[shift]
        return batch_order(index, self.groups[shift], batch=batch, tokens=tokens, has_padding=self.has_padding[shift])


class Swift(nn.Module):
    """The backbone; it ends with `num_features` channels."""

    def __init__(self, config: SwiftConfig) -> None:
        super().__init__()
        self.config = config
        stages = range(len(config.depths))
        self.num_features = config.stage_channels(stages[-1])
        self.patch_embed = PatchEmbedding(config)
        self.pos_embeds = nn.ModuleList(
            PositionTables(config.stage_channels(stage), config.stage_grid(stage), config.img_size[3])
            for stage in stages
        )
        self.layers = nn.ModuleList(Stage(config, stage) for stage in stages)
        self.plan_clips(config.img_size[3])

    def forward(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) to (b, channels, x, y, z, t) on the last stage's grid."""
        self._check(bold)
        if bold.shape[5] != self.planned_frames:
            if torch.compiler.is_compiling():
                raise UsageError(
                    f"swift: planned for clips of {self.planned_frames} frames, got {bold.shape[5]}; "
                    "call plan_clips before you compile or export"
                )
            self.plan_clips(bold.shape[5])
        x = run_part(self.patch_embed, bold, checkpointing=self.config.checkpointing)
        for tables, stage in zip(self.pos_embeds, self.layers, strict=True):
            x = stage(tables(x))
        features: Tensor = x.permute(0, 5, 1, 2, 3, 4)
        return features

    @property
    def num_layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.config.depths)

    def layer_depth(self, name: str) -> int:
        """See `train.models.depth`; a stage's tables count with its first block, its merging with its last."""
        found = _DEPTH.match(name)
        if found is None:
            return self.num_layers + 1
        if found["stage"] is None:
            return 0
        before = sum(self.config.depths[: int(found["stage"])])
        if found["kind"] == "pos_embeds":
            return before + 1
        return before + (self.config.depths[int(found["stage"])] if found["block"] is None else int(found["block"]) + 1)

    def plan_clips(self, frames: int) -> None:
        """Prepare for clips of this many frames; `forward` does so when the number changes.

        Before `torch.compile` call it yourself, if the clips have another length than `img_size` says.
        """
        self.planned_frames = frames
        for stage in self.layers:
            cast(Stage, stage).plan(frames, self.patch_embed.fc.weight.device)

    def _check(self, bold: Tensor) -> None:
        grid, frames = self.config.img_size[:3], self.config.img_size[3]
        expected = (self.config.in_chans, *grid)
        is_placed = bold.dim() == 6 and tuple(bold.shape[1:5]) == expected and bold.shape[5] > 0
        if not is_placed:
            raise UsageError(
                f"swift: expected (batch, {', '.join(map(str, expected))}, 1 to {frames}) as (b, c, x, y, z, t), "
                f"got {tuple(bold.shape)}; give the model the img_size and in_chans of the data"
            )
        if bold.shape[5] > frames and self.config.longer_clips == "refuse":
            raise UsageError(
                f"swift: a clip of {bold.shape[5]} frames is longer than the time tables, which hold {frames}; cut it, "
                'or stretch the tables: for every clip by longer_clips = "interpolate", or once and for all by resize_tables'
            )


def build_swift(options: Mapping[str, Any]) -> HeadedModel:
    """The network of a recipe's model section: `outputs`, `head` (v1, v2 or emb), and the backbone's options."""
    sizes = dict(options)
    outputs, head = sizes.pop("outputs", 1), sizes.pop("head", "v1")
    backbone = Swift(swift_config(sizes))
    return HeadedModel(backbone, build_head(head, channels=backbone.num_features, outputs=outputs))


def resize_tables(
    weights: Mapping[str, Tensor], config: SwiftConfig, *, how: Literal["slice", "interpolate"], source: str
) -> dict[str, Tensor]:
    """The same weights with time tables as long as the clips of `config`, which may be longer or shorter than trained.

    Args:
        weights: of a backbone or of a whole model, ours or published.
        config: of the model that is to load them.
        how: "slice" keeps the first frames; "interpolate" stretches or shrinks linearly, from the first frame to the last.
        source: name of the weights in errors.

    Raises:
        WeightsError: the weights have no tables, or were trained on another spatial grid, whose tables mean other places.
        UsageError: a table is shorter than what is to be cut from it.
    """
    if how not in ("slice", "interpolate"):
        raise UsageError(f"swift: time tables are resized by slice or interpolate, got {how!r}")
    found = {name: match for name in weights if (match := _POSITIONS.search(name))}
    if not found:
        raise WeightsError(f"{source}: no position tables (pos_embeds.*); give the weights of a SwiFT")
    resized = dict(weights)
    for name, match in found.items():
        stage = int(match[1])
        if match[2] == "time_embed":
            resized[name] = _resize(weights[name], config.img_size[3], how, source=source)
        elif stage < len(config.depths):
            _check_space(weights[name], config, stage, source=source)
    return resized


def _resize(table: Tensor, frames: int, how: str, *, source: str) -> Tensor:
    rows = table.shape[-1]
    if how == "slice" and frames > rows:
        raise UsageError(f'{source}: time tables of {rows} frames cannot be cut to {frames}; choose how="interpolate"')
    resized = table[..., :frames] if how == "slice" else stretch_table(table.float(), frames).to(table.dtype)
    return resized.clone()


def _check_space(table: Tensor, config: SwiftConfig, stage: int, *, source: str) -> None:
    trained, wanted = tuple(table.shape[2:5]), config.stage_grid(stage)
    if trained != wanted:
        raise WeightsError(
            f"{source}: trained on a grid of {' x '.join(map(str, trained))} tokens in stage {stage}, the model has "
            f"{' x '.join(map(str, wanted))}; tables over space are not resized: pad or crop the data to the trained grid"
        )
