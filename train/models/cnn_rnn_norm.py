"""Normalisation inside the CNN over frames: by groups of channels, or by the batch's frames, of one rank or of all."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_OVER_FRAMES = (0, 2, 3, 4)


def make_norm(kind: str, channels: int, *, groups: int) -> nn.Module:
    """One of "group", "batch" or "sync_batch" for maps (frames, channels, x, y, z)."""
    if kind == "group":
        return nn.GroupNorm(groups, channels)
    return SyncBatchNorm(channels) if kind == "sync_batch" else nn.BatchNorm3d(channels)


class SyncBatchNorm(nn.BatchNorm3d):
    """Batch normalisation with the statistics of all ranks' frames, weighted by their numbers, on any device.

    torch's own refuses CPUs. Names of weights and statistics are those of `torch.nn.BatchNorm3d`, and so is the function
    where there is one rank, or in evaluation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(frames, channels, x, y, z), before and after; every rank must call it as often."""
        if not self.training or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._over_ranks(x.float()).to(x.dtype)

    def _over_ranks(self, x: Tensor) -> Tensor:
        # Twice around: squares of what is left after the mean, because E[x^2] - mean^2 loses digits.
        own = torch.cat([x.sum(_OVER_FRAMES), x.new_tensor([x.numel() / x.shape[1]])])
        total = _sum_over_ranks(own)
        count, mean = total[-1].detach(), total[:-1] / total[-1].detach()
        centred = x - _per_channel(mean)
        squares = _sum_over_ranks(centred.square().sum(_OVER_FRAMES))
        self._follow(mean.detach(), squares.detach() / (count - 1).clamp_min(1))
        scale = (squares / count + self.eps).rsqrt() * self.weight
        return centred * _per_channel(scale) + _per_channel(self.bias)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, the variance without bias, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _sum_over_ranks(x: Tensor) -> Tensor:
    return cast(Tensor, _SumOverRanks.apply(x))  # type: ignore[no-untyped-call]


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors; all ranks' losses depend on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
