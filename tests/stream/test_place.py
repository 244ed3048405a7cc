"""Packed voxels onto a grid: by the CPU's kernel, by torch as on GPUs, by hand; padded and cut by one rule."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fmristream
from fmristream.errors import UsageError
from fmristream.signal.grid import pad_before, target_positions
from fmristream.stream.device import place, scatter_by_torch, scatter_of
from tests.stream.nifti_runs import converted
from tests.stream.test_normalization import brain_like

SIZES = st.tuples(*[st.integers(1, 9)] * 3)


def placed_by_hand(packed: np.ndarray, mask: np.ndarray, grid: tuple[int, int, int], fill: np.ndarray) -> np.ndarray:
    """The native volume, filled, then padded and cut one axis after the other."""
    samples, channels, frames, _ = packed.shape
    volumes = np.broadcast_to(fill[..., None, None, None, None], (samples, channels, frames, *mask.shape)).copy()
    volumes[..., mask] = packed
    placed = [[_padded(volumes[b, c], grid, fill[b, c]) for c in range(channels)] for b in range(samples)]
    return np.array(placed)


def _padded(volume: np.ndarray, grid: tuple[int, int, int], fill: float) -> np.ndarray:
    for axis, wanted in enumerate(grid, start=1):
        size = volume.shape[axis]
        before = pad_before(size, wanted)
        pad = [(0, 0)] * 4
        pad[axis] = (max(before, 0), max(wanted - size - before, 0))
        volume = np.pad(volume, pad, constant_values=fill)
        volume = volume.take(range(max(-before, 0), max(-before, 0) + wanted), axis=axis)
    return volume


@given(
    shape=SIZES,
    grid=SIZES,
    samples=st.integers(1, 3),
    channels=st.integers(1, 2),
    frames=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_the_kernel_the_torch_path_and_padding_by_hand_agree(shape, grid, samples, channels, frames, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.6
    packed = rng.standard_normal((samples, channels, frames, int(mask.sum()))).astype(np.float32)
    fill = rng.standard_normal((samples, channels)).astype(np.float32)
    positions = torch.from_numpy(target_positions(mask, grid))
    tensors = torch.from_numpy(packed), positions, torch.from_numpy(fill)
    ours = place(tensors[0], tensors[1], grid, tensors[2])
    as_on_a_gpu = tensors[2][:, :, None, None].expand(*packed.shape[:3], int(np.prod(grid))).contiguous()
    scatter_by_torch(tensors[0], scatter_of(tensors[1], "cpu"), as_on_a_gpu)
    as_on_a_gpu = as_on_a_gpu.view(ours.shape)
    assert torch.equal(ours, as_on_a_gpu)
    assert np.array_equal(ours.numpy(), placed_by_hand(packed, mask, grid, fill))


@pytest.mark.parametrize(
    ("size", "target", "before"),
    [(75, 96, 11), (93, 96, 2), (81, 96, 8), (91, 96, 3), (109, 96, -7), (96, 96, 0), (4, 5, 1), (5, 4, -1)],
)
def test_grids_are_centred_as_published_loaders_center_them(size, target, before):
    assert pad_before(size, target) == before


def test_a_batch_is_placed_as_the_map_style_items_are(tmp_path):
    url = converted(tmp_path, {"1": brain_like("i2"), "2": brain_like("i2", seed=1)})
    clips = fmristream.StreamingDataset(url, window=4, normalize="global-zscore", grid=(7, 3, 4), seed=1)
    with fmristream.StreamingLoader(clips, batch_size=3) as loader:
        for batch in loader:
            bold = batch.bold
            moved = batch.to("cpu")
            assert bold.shape == (3, 1, 7, 3, 4, 4)
            assert bold.dtype == torch.float32
            assert torch.equal(moved.bold, bold)
            for row, number in enumerate(batch.window.tolist()):
                assert np.array_equal(bold[row].numpy(), clips[number]["bold"])


def test_a_moved_batch_keeps_its_labels_and_the_one_it_came_from(tmp_path):
    url = converted(tmp_path, {"1": brain_like("i2")})
    clips = fmristream.StreamingDataset(url, window=4)
    with fmristream.StreamingLoader(clips, batch_size=2) as loader:
        batch = next(iter(loader))
    moved = batch.to("cpu")
    for name in ("window", "start", "valid", "fill"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert (moved.subject, moved.run, moved.position, len(moved)) == (batch.subject, batch.run, batch.position, 2)


def test_without_a_grid_the_native_one_is_used(tmp_path):
    stored = brain_like("i2")
    clips = fmristream.StreamingDataset(converted(tmp_path, {"1": stored}), window=4, normalize="none")
    assert clips.grid == stored.shape[:3]
    assert np.array_equal(clips[1]["bold"][0], stored[..., 4:8])


@pytest.mark.parametrize("grid", [(0, 4, 4), (4, -1, 4), (4, 4), (4, 4, 4, 4)])
def test_a_grid_that_is_none_is_refused(tmp_path, grid):
    url = converted(tmp_path, {"1": brain_like("i2")})
    with pytest.raises(UsageError, match="expected three sizes"):
        fmristream.StreamingDataset(url, window=4, grid=grid)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_what_the_cpu_gets_however_late_it_looks(tmp_path):
    url = converted(tmp_path, {"1": brain_like("i2", shape=(40, 40, 40, 64))})
    clips = fmristream.StreamingDataset(url, window=4, seed=1)
    with fmristream.StreamingLoader(clips, batch_size=4, threads=2) as loader:
        here = [batch.bold.clone() for batch in loader]
    busy = torch.ones(8000, 8000, device="cuda")
    with fmristream.StreamingLoader(clips, batch_size=4, threads=2) as loader:
        there = []
        for batch in loader:
            for _ in range(20):  # the copies to the device wait behind this, the loader goes on
                busy = (busy @ busy).clamp(max=1)
            there.append(batch.to("cuda").bold)
            del batch
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))
