"""Attributions are exact where they can be computed by hand, complete elsewhere, and the same whatever fits into memory."""

import numpy as np
import pytest
import torch
from torch import nn

from fmristream.errors import UsageError
from tests.train.small import MODEL
from train.attribution_methods import (
    block_regions,
    evaluating,
    integrated_gradients,
    make_baseline,
    occlusion,
    painted,
)
from train.models import build_model

SHAPE = (2, 1, 6, 6, 6, 4)


class Linear(nn.Module):
    """Outputs that are sums of weighted values."""

    def __init__(self, outputs=2, shape=SHAPE[1:]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, *shape, generator=torch.Generator().manual_seed(3)))

    def forward(self, bold):
        return torch.einsum("bcxyzt,ocxyzt->bo", bold, self.weight)


class Product(nn.Module):
    """The product of the means of two voxels over time: attributed half and half from zero."""

    def forward(self, bold):
        means = bold.mean((1, 5))
        return (means[:, 1, 1, 1] * means[:, 4, 4, 4])[:, None]


def drawn(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 5])
def test_a_linear_network_has_its_weights_times_the_way(steps):
    network, bold, baseline = Linear(), drawn(), drawn(seed=1)
    found = integrated_gradients(network, bold, baseline=baseline, output=1, steps=steps)
    torch.testing.assert_close(found.values, (bold - baseline) * network.weight[1].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.outputs, network(bold)[:, 1].detach().double(), rtol=1e-6, atol=1e-6)
    assert found.gap.abs().max() < 1e-4


def test_a_product_is_shared_equally_and_two_points_are_enough():
    bold = drawn()
    found = integrated_gradients(Product(), bold, baseline=torch.zeros_like(bold), steps=2)
    means = bold.mean((1, 5))
    half = 0.5 * means[:, 1, 1, 1] * means[:, 4, 4, 4]
    by_voxel = found.values.sum((1, 5))
    torch.testing.assert_close(by_voxel[:, 1, 1, 1], half)
    torch.testing.assert_close(by_voxel[:, 4, 4, 4], half)
    by_voxel[:, 1, 1, 1] = by_voxel[:, 4, 4, 4] = 0
    assert not by_voxel.any()


def swift():
    torch.manual_seed(0)
    return build_model(
        "swift",
        {"img_size": [12, 12, 12, 8], **MODEL},
    ).eval()


def test_more_points_close_the_gap_of_a_transformer_and_chunks_do_not_matter():
    network, bold = swift(), drawn((2, 1, 12, 12, 12, 8))
    baseline = torch.zeros_like(bold)
    gaps = []
    for steps in (1, 4, 24):
        found = integrated_gradients(network, bold, baseline=baseline, steps=steps, chunk=5)
        gaps.append(float((found.gap.abs() / found.change.abs()).max()))
    assert gaps[2] < 0.01
    assert gaps[2] < gaps[0]
    alone = integrated_gradients(network, bold, baseline=baseline, steps=24, chunk=1)
    torch.testing.assert_close(alone.values, found.values, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_occlusion_of_a_linear_network_is_the_sum_of_what_was_hidden():
    network, bold, baseline = Linear(), drawn(), drawn(seed=1)
    regions = block_regions(np.ones(SHAPE[2:5], dtype=bool), 3)
    regions[0, 0, 0] = -1
    parts = ((bold - baseline) * network.weight[0].detach()).sum((1, 5)).double().numpy()
    expected = np.stack([[part[regions == number].sum() for number in range(8)] for part in parts])
    for chunk in (1, 3, 100):
        falls = occlusion(network, bold, regions, baseline=baseline, chunk=chunk)
        np.testing.assert_allclose(falls.numpy(), expected, rtol=1e-4, atol=1e-4)
    image = painted(falls[0].numpy(), regions)
    assert image[0, 0, 0] == 0
    assert image[5, 0, 0] == np.float32(falls[0, 4])


def test_occlusion_finds_the_one_region_that_a_network_reads():
    class Corner(nn.Module):
        def forward(self, bold):
            return bold[:, :, 4:, :2, 2:4].square().mean((1, 2, 3, 4, 5))[:, None]

    regions = block_regions(np.ones((6, 6, 6), dtype=bool), 2)
    falls = occlusion(Corner(), drawn(), regions, baseline=torch.zeros(SHAPE))
    assert falls.argmax(1).tolist() == [regions[5, 1, 3]] * 2
    assert int((falls != 0).sum()) == 2


def test_cubes_without_brain_are_no_regions():
    inside = np.zeros((5, 4, 4), dtype=bool)
    inside[0, 0, 0] = inside[4, 3, 3] = inside[3, 0, 1] = True
    regions = block_regions(inside, 2)
    assert sorted(np.unique(regions)) == [-1, 0, 1, 2]
    assert (regions[0, 0, 0], regions[3, 0, 1], regions[4, 3, 3]) == (0, 1, 2)
    assert int((regions >= 0).sum()) == 3


def test_baselines_are_nothing_the_still_image_or_the_background():
    bold = drawn()
    assert not make_baseline(bold, "zero").any()
    still = make_baseline(bold, "window-mean")
    torch.testing.assert_close(still[..., 0], bold.mean(-1))
    assert still.shape == bold.shape
    filled = make_baseline(bold, "background", fill=torch.tensor([[-2.0], [3.0]]))
    assert filled[0].unique().tolist() == [-2.0]
    assert filled[1].unique().tolist() == [3.0]


def test_evaluating_gives_back_the_mode_that_the_network_had():
    network = nn.Sequential(nn.Dropout(0.5), nn.LSTM(3, 3))
    cudnn = torch.backends.cudnn.enabled
    with evaluating(network) as inside:
        assert not inside[0].training
        assert not torch.backends.cudnn.enabled
    assert network.training
    assert network[0].training
    assert torch.backends.cudnn.enabled == cudnn


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda b: integrated_gradients(Linear(), b, baseline=b[:1]), "baseline of their shape"),
        (lambda b: integrated_gradients(Linear(), b, baseline=b, steps=0), "steps must be 1"),
        (lambda b: integrated_gradients(Linear(), b, baseline=b, output=2), "output 2"),
        (lambda b: occlusion(Linear(), b, np.zeros((6, 6, 5), np.int64), baseline=b), "must number voxels"),
        (lambda b: occlusion(Linear(), b, np.full((6, 6, 6), -1), baseline=b), "one at least"),
        (lambda b: occlusion(Linear(), b, np.zeros((6, 6, 6), np.int64), baseline=b, chunk=0), "chunk must be 1"),
        (lambda b: make_baseline(b, "ones"), "must be one of zero"),
        (lambda b: make_baseline(b, "background"), "needs the value"),
        (lambda b: block_regions(np.zeros((3, 3, 3), bool), 1), "1 or more of both"),
    ],
)
def test_what_makes_no_sense_is_refused(call, sentence):
    with pytest.raises(UsageError, match=sentence):
        call(drawn())
