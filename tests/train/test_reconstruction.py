"""TFF's losses against values worked out by hand and against the published rule, written plainly."""

import pytest
import torch

from fmristream.errors import UsageError
from train.perceptual import random_features
from train.reconstruction import axial_slices, choose_slices, intense_l1, intense_voxels, l1, perceptual_l2, tff_losses


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_intense(voxel_z):
    """The published rule, one sample and frame at a time."""
    mask = torch.zeros(voxel_z.shape, dtype=torch.bool)
    for sample in range(voxel_z.shape[0]):
        for frame in range(voxel_z.shape[5]):
            picture = voxel_z[sample, 0, :, :, :, frame].clone()
            picture[picture <= picture[0, 0, 0]] = 0
            picture = picture.abs()
            threshold = torch.quantile(picture[picture > 0], 0.9)
            mask[sample, 0, :, :, :, frame] = picture > threshold
    return mask


def test_l1_is_the_mean_absolute_difference():
    assert l1(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 1.0])).item() == 2


def test_the_upper_tenth_of_a_frame_is_intense():
    # Corner 0; of 1, 2, ... 11 the 0.9 quantile is 10, so 11 alone is above it. Negative ones are below the corner.
    frame = torch.tensor([0.0, -50, -20, *range(1, 12), 0, 0]).view(1, 1, 4, 2, 2, 1)
    assert intense_voxels(frame).flatten().nonzero().flatten().tolist() == [13]


@pytest.mark.parametrize("corner", [0.0, -0.7, 0.4, -9.0])
@pytest.mark.parametrize("background", [0.0, 0.4, 0.99])
def test_intense_voxels_are_those_of_the_published_loop(corner, background):
    voxel_z = noise(2, 1, 9, 10, 11, 3)
    voxel_z[torch.rand(voxel_z.shape, generator=torch.Generator().manual_seed(1)) < background] = 0
    voxel_z[:, :, 0, 0, 0] = corner
    mask = intense_voxels(voxel_z)
    assert torch.equal(mask, plain_intense(voxel_z))
    assert mask.any()
    assert mask.float().mean() < 0.101


@pytest.mark.full
def test_large_frames_have_no_limit_of_values():
    voxel_z = noise(1, 1, 300, 300, 200, 1)  # torch.quantile takes 16 million
    voxel_z[:, :, 0, 0, 0] = 0
    positive = voxel_z[voxel_z > 0]
    threshold = torch.kthvalue(positive, int(0.9 * (len(positive) - 1)) + 1).values
    assert abs(int(intense_voxels(voxel_z).sum()) - int((positive > threshold).sum())) <= 1


def test_a_frame_of_background_has_no_intense_voxel_and_no_loss():
    rebuilt = torch.ones(1, 1, 2, 2, 2, 2, requires_grad=True)
    mask = intense_voxels(torch.zeros(1, 1, 2, 2, 2, 2))
    loss = intense_l1(rebuilt, torch.zeros(1, 1, 2, 2, 2, 2), mask)
    loss.backward()
    assert not mask.any()
    assert loss.item() == 0
    assert not rebuilt.grad.any()


def test_the_intense_loss_is_the_mean_over_intense_voxels_alone():
    rebuilt, target = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0.0, 2.0, 4.0])
    assert intense_l1(rebuilt, target, torch.tensor([False, True, True])).item() == 4


def test_slices_are_counted_over_samples_frames_and_z():
    bold = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 1, 3, 4, 5, 6).float()
    number = (1 * 6 + 2) * 5 + 3  # sample 1, frame 2, z 3
    (picture,) = axial_slices(bold, torch.tensor([number]))
    assert picture.shape == (3, 3, 4)
    assert all(torch.equal(color, bold[1, 0, :, :, 3, 2]) for color in picture)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 15), (1.0, 60), (1e-6, 1)])
def test_a_share_of_the_slices_is_chosen_without_repetition(share, expected):
    chosen = choose_slices(torch.zeros(2, 2, 3, 4, 5, 6), share=share, generator=torch.Generator().manual_seed(0))
    assert len(chosen.unique()) == len(chosen) == expected
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 60


def test_the_perceptual_loss_adds_the_mean_squares_of_each_feature_map():
    def net(slices):
        return slices.mean(1), 2 * slices[:, :, :1]

    rebuilt, target = torch.full((1, 1, 3, 4, 2, 2), 3.0), torch.full((1, 1, 3, 4, 2, 2), 1.0)
    assert perceptual_l2(rebuilt, target, net=net, slices=torch.tensor([0, 3])).item() == 4 + 16


def test_all_terms_reach_the_rebuilt_frames_and_only_them():
    bold, rebuilt = noise(1, 2, 8, 8, 4, 2), noise(1, 1, 8, 8, 4, 2, seed=1).requires_grad_()
    net = random_features()
    terms = tff_losses(rebuilt, bold, net=net, slices=torch.arange(8))
    assert list(terms) == ["l1", "intense", "perceptual"]
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, rebuilt, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.parameters())
    exact = tff_losses(bold[:, :1], bold, net=net, slices=torch.arange(8))
    assert [term.item() for term in exact.values()] == [0, 0, 0]


def test_bold_without_two_channels_or_a_net_without_slices_is_refused():
    with pytest.raises(UsageError, match="give the data two channels"):
        tff_losses(torch.zeros(1, 1, 3, 3, 3, 2), torch.zeros(1, 1, 3, 3, 3, 2))
    with pytest.raises(UsageError, match="pass slices="):
        tff_losses(torch.zeros(1, 1, 3, 3, 3, 2), torch.zeros(1, 2, 3, 3, 3, 2), net=random_features())
