"""The layers of the 4-D masked autoencoder: attention and MLPs of a vision transformer, tables of positions, and a pool."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from train.models.brainlm import join_heads, split_heads
from train.models.mae4d_config import Mae4dConfig


class Attention(nn.Module):
    """Softmax attention of tokens to each other, or to a memory."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(b, n, channels) and (b, m, channels) to the former's shape."""
        k, v = (split_heads(part, self.heads) for part in self.key_value(memory).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(split_heads(self.query(x), self.heads), k, v)
        out: Tensor = self.proj(join_heads(attended))
        return out


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, ratio * channels)
        self.linear2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        out: Tensor = self.linear2(F.gelu(self.linear1(x)))
        return out


class Layer(nn.Module):
    """Attention of tokens to each other, then an MLP; each reads normalised tokens and is added to them."""

    def __init__(self, channels: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, channels), before and after."""
        normal = self.norm1(x)
        x = x + self.attn(normal, normal)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossLayer(nn.Module):
    """Attention of the tokens that ask to those that are shown, and not to each other; then an MLP."""

    def __init__(self, channels: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.norm_memory = nn.LayerNorm(channels)
        self.attn = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, ratio)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(b, asking, channels) and (b, shown, channels) to the former's shape."""
        x = x + self.attn(self.norm1(x), self.norm_memory(memory))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Positions(nn.Module):
    """A table of places plus a table of times; short clips have the first times.

    Both begin as sines and cosines, and stay so or are learned. Beginning with small noise instead, as usual for learned
    tables, took twice as many steps to the same error in a small trial: what a token holds drowns where it is.
    """

    space: Tensor
    time: Tensor

    def __init__(self, channels: int, config: Mae4dConfig) -> None:
        super().__init__()
        # A row for every place of the grid, brain or not: the same table serves every mask.
        tables = {"space": _space_waves(config.grid, channels), "time": _waves(np.arange(config.times), channels)}
        for name, table in tables.items():
            if config.positions == "learned":
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table, persistent=False)

    def forward(self, places: Tensor, times: int) -> Tensor:
        """(n,) places to (times * n, channels)."""
        return (self.time[:times, None] + self.space.index_select(0, places)).flatten(0, 1)


class AttentionPool(nn.Module):
    """One learned query asks all tokens; in float32, also under autocast."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(0.02 * torch.randn(1, 1, channels))
        self.attn = Attention(channels, heads)
        initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, channels) to (b, 1, channels)."""
        with torch.autocast(tokens.device.type, enabled=False):
            asked: Tensor = self.attn(self.query_token.expand(len(tokens), -1, -1), tokens.to(self.query_token.dtype))
        return asked


def initialise(module: nn.Module) -> None:
    """Linear maps as in the published masked autoencoders: uniform by fan-in and fan-out, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def _space_waves(grid: tuple[int, int, int], channels: int) -> Tensor:
    """(places, channels): a third of the channels for each axis, in pairs; what is left over is 0."""
    third = channels // 6 * 2
    axes = np.meshgrid(*(np.arange(size) for size in grid), indexing="ij")
    table = torch.cat([_waves(axis.ravel(), third) for axis in axes], dim=1)
    return F.pad(table, (0, channels - 3 * third))


def _waves(places: NDArray[np.int64], channels: int) -> Tensor:
    """(n, channels): sines, then cosines, of rates from 1 down to 1/10000 per place."""
    rates = 10000.0 ** (-np.arange(channels // 2) / (channels / 2))
    angles = np.outer(places, rates)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))
