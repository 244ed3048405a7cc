"""The 3-D convolution of our networks: torch's, but for the one case in which torch's gives wrong gradients on CPUs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` with gradients that can be trusted in bfloat16 on small grids.

    With torch 2.13 (oneDNN, AVX-512 BF16) the bfloat16 gradient of a kernel of 3 on maps of 2 voxels along x and 16 or more
    channels has parts that were never written: whatever memory held before, NaN or 1e36 in a third of the trials
    (tests/train/models/test_convolution.py). Maps of 1, 3 and more voxels, and float32, are right. Small maps cost
    nothing, so all of them are convolved in float32 there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, x, y, z) to the same with the channels out."""
        is_rough = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or x.shape[2] > 2 or not is_rough:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            out = F.conv3d(x.float(), self.weight.float(), bias, self.stride, self.padding, self.dilation, self.groups)
        return out.to(torch.bfloat16)
