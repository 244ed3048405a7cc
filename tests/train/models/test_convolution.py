"""The gradients of a convolution in bfloat16 are those of float32, also on the smallest maps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from train.models.convolution import Conv3d


@pytest.mark.parametrize("grid", [(2, 2, 2), (2, 3, 4), (1, 2, 2), (3, 3, 3)])
@pytest.mark.parametrize(("ins", "outs", "stride"), [(32, 32, 1), (32, 2, 1), (16, 32, 2)])
def test_bfloat16_gradients_are_near_those_of_float32(grid, ins, outs, stride):
    torch.manual_seed(0)
    layer = Conv3d(ins, outs, 3, stride=stride, padding=1)
    for _ in range(8):  # torch's own is wrong where freed memory is used again
        torch.full((100_000,), torch.nan)
        x = torch.randn(3, ins, *grid).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        upstream = torch.randn_like(out)
        layer.zero_grad()
        out.backward(upstream)
        exact_x = x.detach().float().requires_grad_()
        exact = F.conv3d(exact_x, layer.weight, layer.bias, stride=stride, padding=1)
        gradients = torch.autograd.grad(exact, [exact_x, layer.weight], upstream.float())
        for found, expected in zip([x.grad.float(), layer.weight.grad], gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_in_float32_it_is_torchs_own():
    torch.manual_seed(0)
    ours = Conv3d(16, 16, 3, padding=1, bias=False)
    torchs = nn.Conv3d(16, 16, 3, padding=1, bias=False)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 2, 3, 3)
    assert torch.equal(ours(x), torchs(x))
    assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
