"""Patches hold the brain's voxels, each once, and go back where they came from."""

import copy
import io

import numpy as np
import pytest
import torch

from fmristream.errors import UsageError
from train.models.mae4d_patches import (
    BrainPatches,
    brain_from_bold,
    brain_from_positions,
    normalised,
    patch_layout,
)

SIZE, PATCH = (9, 8, 7), (4, 4, 3, 2)


def ball(size=SIZE):
    """A ball that leaves some patches empty and most of them in part."""
    axes = np.meshgrid(*(np.linspace(-1, 1, length) for length in size), indexing="ij")
    return sum(axis**2 for axis in axes) < 0.6


def patches_of(brain, *, patch=PATCH, channels=1):
    patches = BrainPatches(brain.shape, patch, channels)
    patches.set_brain(brain)
    return patches


def bold(batch=2, channels=1, size=SIZE, frames=6):
    return torch.randn(batch, channels, *size, frames, generator=torch.Generator().manual_seed(0))


def test_a_small_layout_is_that_made_by_hand():
    brain = np.zeros((3, 2, 2), dtype=bool)
    brain[0, 1, 0] = brain[1, 0, 0] = brain[2, 0, 0] = True
    layout = patch_layout(brain, (2, 2, 1))
    # A grid of 2 x 1 x 2 patches, those of z = 0 with brain; voxel numbers are 4 x + 2 y + z.
    assert layout.places.tolist() == [0, 2]
    assert layout.voxels.tolist() == [[0, 2, 4, 0], [8, 0, 0, 0]]
    assert layout.inside.tolist() == [[False, True, True, False], [True, False, False, False]]


def plain_patches(x, brain, patch):
    """Patch by patch, from a volume padded by hand and 0 outside the brain."""
    px, py, pz, pt = patch
    sizes = [-(-size // length) * length for size, length in zip(brain.shape, patch[:3], strict=True)]
    volume = np.zeros((*x.shape[:2], *sizes, x.shape[5]))
    mask = np.zeros(sizes, dtype=bool)
    mask[: brain.shape[0], : brain.shape[1], : brain.shape[2]] = brain
    volume[:, :, mask] = x.numpy()[:, :, brain]
    tokens, counted = [], []
    for t in range(0, x.shape[5], pt):
        for i in range(0, sizes[0], px):
            for j in range(0, sizes[1], py):
                for k in range(0, sizes[2], pz):
                    inside = mask[i : i + px, j : j + py, k : k + pz]
                    if inside.any():
                        cube = volume[:, :, i : i + px, j : j + py, k : k + pz, t : t + pt]
                        tokens.append(cube.transpose(0, 5, 2, 3, 4, 1).reshape(len(x), -1))
                        shape = (pt, px, py, pz, x.shape[1])
                        counted.append(np.broadcast_to(inside[None, ..., None], shape).reshape(-1))
    return torch.from_numpy(np.stack(tokens, 1)).float(), torch.from_numpy(np.stack(counted))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("patch", [PATCH, (3, 2, 7, 1), (16, 16, 16, 6)])
def test_patches_are_those_cut_one_by_one(patch, channels):
    brain, x = ball(), bold(channels=channels)
    patches = patches_of(brain, patch=patch, channels=channels)
    tokens, counted = plain_patches(x, brain, patch)
    assert torch.equal(patches.cut(x), tokens)
    every = torch.arange(len(counted)).expand(2, -1)
    assert torch.equal(patches.inside_of(every), counted.expand(2, -1, -1))
    last = patches.inside_of(every.flip(1)[:, :3])
    assert torch.equal(last, counted.flip(0)[:3].expand(2, -1, -1))


@pytest.mark.parametrize("channels", [1, 2])
def test_patches_put_back_are_the_brain_they_were_cut_from(channels):
    brain, x = ball(), bold(channels=channels)
    patches = patches_of(brain, channels=channels)
    assert torch.equal(patches.join(patches.cut(x)), torch.where(torch.from_numpy(brain)[..., None], x, 0))
    whole = BrainPatches(SIZE, PATCH, channels)
    assert torch.equal(whole.join(whole.cut(x)), x)


def test_only_patches_with_brain_are_tokens():
    brain = ball()
    patches = patches_of(brain)
    assert patches.count == len(patch_layout(brain, PATCH[:3]).places) < 3 * 2 * 3
    assert int(patches.inside.sum()) == int(brain.sum())
    assert sorted(patches.voxels[patches.inside].tolist()) == np.flatnonzero(brain).tolist()


def test_the_order_of_memory_does_not_matter():
    x = bold()
    slow_time = x.movedim(5, 2).contiguous().movedim(2, 5)
    assert torch.equal(patches_of(ball()).cut(slow_time), patches_of(ball()).cut(x))


def test_what_is_outside_the_brain_is_not_read():
    brain, x = ball(), bold()
    spoilt = torch.where(torch.from_numpy(brain)[..., None], x, float("nan"))
    assert torch.equal(patches_of(brain).cut(spoilt), patches_of(brain).cut(x))


def test_gradients_reach_the_brain_alone():
    brain, x = ball(), bold().requires_grad_()
    patches_of(brain).cut(x).sum().backward()
    assert torch.equal(x.grad[0, 0, ..., 0], torch.from_numpy(brain).float())


def test_masks_come_from_positions_of_one_space_or_several():
    positions = torch.tensor([[0, 3, -1], [5, 3, 3]])
    found = brain_from_positions(positions, (2, 3, 1))
    assert np.flatnonzero(found).tolist() == [0, 3, 5]
    assert np.flatnonzero(brain_from_positions(positions[0].numpy(), (2, 3, 1))).tolist() == [0, 3]


def test_a_mask_is_found_where_clips_differ_from_their_background():
    brain, x = ball(), bold(channels=2)
    fill = torch.tensor([[-1.5, 0.0], [7.0, 0.0]])[:, :, None, None, None, None]
    filled = torch.where(torch.from_numpy(brain)[..., None], x, fill)
    assert np.array_equal(brain_from_bold(filled), brain)


def test_a_loaded_mask_is_planned_and_survives_copies():
    brain, x = ball(), bold()
    patches, other = patches_of(brain), BrainPatches(SIZE, PATCH, 1)
    assert other.cut(x).shape != patches.cut(x).shape
    assert set(patches.state_dict()) == {"brain"}
    other.load_state_dict(patches.state_dict())
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    for copied in (other, copy.deepcopy(other), torch.load(file, weights_only=False)):
        assert torch.equal(copied.cut(x), patches.cut(x))
    other.set_brain(torch.ones(SIZE, dtype=torch.bool))
    assert torch.equal(other.join(other.cut(x)), x)


@pytest.mark.parametrize(
    ("brain", "message"),
    [
        (np.ones((9, 8, 6), dtype=bool), r"boolean mask of shape \[9, 8, 7\], got bool of shape \[9, 8, 6\]"),
        (np.ones(SIZE), r"got float64 of shape"),
        (np.zeros(SIZE, dtype=bool), "the brain's mask has no voxel"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing(brain, message):
    patches = patches_of(ball())
    before = patches.cut(bold())
    with pytest.raises(UsageError, match=message):
        patches.set_brain(brain)
    assert torch.equal(patches.cut(bold()), before)
    assert np.array_equal(patches.brain.numpy(), ball())


def test_normalised_patches_have_mean_0_and_sd_1_over_their_brain_by_channel():
    patches = patches_of(ball(), channels=2)
    values = 5 + 3 * patches.cut(bold(channels=2))
    every = torch.arange(values.shape[1]).expand(2, -1)
    inside = patches.inside_of(every)
    found = normalised(values, inside, 2)
    for token in range(values.shape[1]):
        for channel in (0, 1):
            counted = inside[0, token, channel::2].numpy()
            raw = values[0, token, channel::2].double().numpy()[counted]
            expected = np.zeros(len(counted))
            expected[counted] = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-6)
            np.testing.assert_allclose(found[0, token, channel::2].numpy(), expected, atol=1e-5)
    constant = normalised(torch.full((1, 1, 4), 2.5), torch.tensor([[[True, True, False, True]]]), 1)
    assert constant.tolist() == [[[0.0] * 4]]
