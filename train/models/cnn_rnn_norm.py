"""Normalisation inside the CNN over frames: by groups of channels, or by the batch's frames, of one rank or of all.

A batch's statistics can be put together from chunks of frames, so that all frames count although only a chunk's activations
are in memory: mean and squares of each chunk, then of all (Chan, Golub and LeVeque's formula), then each chunk again.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.models.synced_norm import follow, sum_over_ranks

_OVER_FRAMES = (0, 2, 3, 4)


def make_norm(kind: str, channels: int, *, groups: int) -> nn.Module:
    """One of "group", "batch" or "sync_batch" for maps (frames, channels, x, y, z)."""
    if kind == "group":
        return nn.GroupNorm(groups, channels)
    return FrameBatchNorm(channels, is_synchronised=kind == "sync_batch")


def moments(x: Tensor) -> Tensor:
    """(frames, channels, x, y, z) to (2, channels) float32: the mean, and the sum of squares about it."""
    x = x.float()
    mean = x.mean(_OVER_FRAMES)
    return torch.stack([mean, (x - _per_channel(mean)).square().sum(_OVER_FRAMES)])


class FrameBatchNorm(nn.BatchNorm3d):
    """Batch normalisation whose statistics may be those of all ranks' frames, on any device, and may come from chunks.

    torch's own synchronised one refuses CPUs. Names of weights and statistics are those of `torch.nn.BatchNorm3d`, and so
    is the function where there is one rank, or in evaluation.
    """

    def __init__(self, channels: int, *, is_synchronised: bool = False) -> None:
        super().__init__(channels)
        self.is_synchronised = is_synchronised

    def forward(self, x: Tensor) -> Tensor:
        """(frames, channels, x, y, z), before and after; where it is synchronised, every rank must call it as often."""
        if not self.training or not self._asks_others():
            return super().forward(x)
        mean, variance = self.pool(moments(x).unsqueeze(0), x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float32))
        return self.normalise(x, mean, variance)

    def pool(self, chunks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (channels,) of all frames, of all ranks where it is synchronised; moves the running ones.

        Args:
            chunks: (chunks, 2, channels), the `moments` of each chunk.
            counts: (chunks,) values of each channel in each chunk.
        """
        means, squares, weights = chunks[:, 0], chunks[:, 1], counts.unsqueeze(1)
        total = self._sum(torch.cat([(weights * means).sum(0), counts.sum(0, keepdim=True)]))
        count, mean = total[-1].detach(), total[:-1] / total[-1].detach()
        # About the mean of all: E[x^2] - mean^2 would lose digits.
        square = self._sum((squares + weights * (means - mean).square()).sum(0))
        follow(self, mean.detach(), square.detach() / (count - 1).clamp_min(1))
        return mean, square / count

    def normalise(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """(frames, channels, x, y, z), before and after, with the given statistics; float32 inside."""
        scale = (variance + self.eps).rsqrt() * self.weight
        return ((x.float() - _per_channel(mean)) * _per_channel(scale) + _per_channel(self.bias)).to(x.dtype)

    def _asks_others(self) -> bool:
        has_group = self.is_synchronised and dist.is_available() and dist.is_initialized()
        return has_group and dist.get_world_size() > 1

    def _sum(self, x: Tensor) -> Tensor:
        return sum_over_ranks(x) if self._asks_others() else x


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
