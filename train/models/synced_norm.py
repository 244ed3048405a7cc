"""Batch normalisation with the statistics of all ranks' rows, so that no number of ranks changes a loss.

torch's own synchronised normalisation refuses CPUs. Here it is for vectors; `cnn_rnn_norm` has it for maps.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (rows, channels), under its names; ranks may differ in their numbers of rows.

    With one rank, and in evaluation, it is that function itself. While training, every rank must call it as often.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels), before and after, float32."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        total = sum_over_ranks(torch.cat([x.sum(0), x.new_tensor([len(x)])]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean
        # Squares of what is left after the mean: E[x^2] - mean^2 loses digits.
        squares = sum_over_ranks(centred.square().sum(0))
        follow(self, mean.detach(), squares.detach() / (count - 1).clamp_min(1))
        return centred * (squares / count + self.eps).rsqrt() * self.weight + self.bias


@torch.no_grad()
def follow(norm: nn.modules.batchnorm._NormBase, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics of a normalisation as torch does; `variance` is the one without bias."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)
    norm.num_batches_tracked.add_(1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' tensors of one shape, with its gradient."""
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
