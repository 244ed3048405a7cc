"""Augmentation held against scipy.ndimage; its draws the same for any ranks, after any resume, and once per clip."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

import fmristream
from fmristream.errors import SpaceError, UsageError
from fmristream.stream.augment import SWIFT, Affine, Blur, Compose, Intensity, Noise, Reverse, blur, resample
from fmristream.stream.batch import Batch
from fmristream.stream.device import DeviceLoader
from fmristream.stream.draws import key_of, normals, uniforms
from tests.stream.worlds import in_step, loaders

SHAPE = (7, 6, 5)

KEY = 1426635882306163336
UNIFORMS = [0.8969065176085694, 0.17892481246546876, 0.2865902800373358]
NORMALS = [-0.335456, 0.273012, 0.324155, 1.83495]


def a_batch(count: int = 2, *, views: int = 1, seed: int = 0, **more) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return Batch(
        packed=None,
        positions=None,
        grid=SHAPE,
        placed=torch.randn((count, 2, 3, *SHAPE), generator=rng),
        fill=torch.randn((count, 2), generator=rng),
        valid=torch.ones(count, dtype=torch.bool),
        window=torch.arange(count) % (count // views),
        start=torch.zeros(count, dtype=torch.int64),
        subject=["s"] * count,
        run=["r"] * count,
        targets={},
        global_size=count,
        position=0,
        views=views,
        side={"x": torch.arange(3.0 * count).view(count, 3)},
        **{
            "epoch": torch.zeros(count, dtype=torch.int64),
            "sample": torch.arange(count) % (count // views),
            "orientation": "LAS",
            "voxel_sizes_mm": (2.0, 2.0, 2.0),
        }
        | more,
    )


def by_scipy(frames: torch.Tensor, fill: torch.Tensor, change) -> np.ndarray:
    """change(volume, cval) of every frame of (c, t, x, y, z) in float64."""
    return np.stack(
        [
            [change(volume.double().numpy(), float(value)) for volume in channel]
            for channel, value in zip(frames, fill, strict=True)
        ]
    )


@settings(max_examples=25)
@given(
    draws=st.lists(st.floats(0, 0.999), min_size=10, max_size=10),
    sizes=st.tuples(*[st.floats(1, 4)] * 3),
    limits=st.tuples(st.floats(0, 180), st.floats(0, 0.5), st.floats(0, 6)),
)
def test_an_affine_is_scipys(draws, sizes, limits):
    batch = a_batch(1)
    step = Affine(degrees=limits[0], scale=limits[1], shift_mm=limits[2])
    matrix = step.matrix(draws, sizes)
    center = (np.array(SHAPE) - 1) / 2
    linear, shift = matrix[:, :3].numpy(), matrix[:, 3].numpy()
    offset = center + shift - linear @ center
    frames, fill = batch.placed[0], batch.fill[0]
    expected = by_scipy(
        frames,
        fill,
        lambda volume, value: ndimage.affine_transform(
            volume, linear, offset, order=1, mode="grid-constant", cval=value
        ),
    )
    np.testing.assert_allclose(resample(frames, matrix, fill).numpy(), expected, atol=3e-5)


def test_rotations_are_rotations_in_millimetres():
    step = Affine(degrees=90)
    sizes = (2.0, 3.0, 4.0)
    matrix = step.matrix([0.5, 0.5, 1.0] + [0.5] * 6, sizes).numpy()  # 90 degrees about z
    moved = np.diag(sizes) @ matrix[:, :3] @ np.linalg.inv(np.diag(sizes))
    np.testing.assert_allclose(moved, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)
    shifted = Affine(shift_mm=6).matrix([0.5] * 6 + [1.0, 0.5, 0.0], sizes).numpy()
    np.testing.assert_allclose(shifted[:, 3], [3, 0, -1.5])


@settings(max_examples=25)
@given(sds=st.tuples(*[st.floats(0, 2)] * 3))
def test_a_blur_is_scipys(sds):
    batch = a_batch(1)
    frames, fill = batch.placed[0], batch.fill[0]
    expected = by_scipy(
        frames,
        fill,
        lambda volume, value: ndimage.gaussian_filter(volume, sds, mode="constant", cval=value, truncate=4),
    )
    np.testing.assert_allclose(blur(frames, sds, fill).numpy(), expected, atol=3e-6)


def test_one_draw_serves_all_frames_and_channels_and_every_clip_has_its_own():
    same = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    batch = replace(a_batch(3), fill=torch.zeros(3, 2))
    batch = replace(batch, placed=same.expand(3, 2, 3, *SHAPE).clone())
    for step in (Affine(degrees=10, scale=0.1, shift_mm=3, flip=0.5), Noise(p=1), Blur(p=1), Intensity(shift=1)):
        found = Compose((step,))(batch).placed
        assert torch.equal(found, found[:, :1, :1].expand(found.shape))
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])


def test_nothing_is_written_into_the_batch_it_was_made_of():
    batch = a_batch()
    before = [tensor.clone() for tensor in batch.tensors()]
    steps = (*SWIFT, Affine(flip=1.0), Noise(p=1), Blur(p=1), Intensity(shift=1), Reverse(p=1))
    varied = Compose(steps)(batch.to("cpu", augment=Compose(steps)))
    assert not torch.equal(varied.placed, batch.placed)
    assert all(torch.equal(one, other) for one, other in zip(batch.tensors(), before, strict=True))


def test_what_comes_into_view_is_the_fill():
    batch = replace(a_batch(1), placed=torch.full((1, 2, 3, *SHAPE), 5.0), fill=torch.tensor([[-3.0, 4.0]]))
    shifted = Affine().matrix([0.5] * 9, (1.0, 1.0, 1.0))
    shifted[0, 3] = 100
    found = resample(batch.placed[0], shifted, batch.fill[0])
    assert torch.equal(found, batch.fill[0][:, None, None, None, None].expand(found.shape))


def test_the_fill_follows_the_intensity():
    batch = a_batch(2)
    varied = Compose((Intensity(scale=0.5, shift=2.0),))(batch)
    outside = replace(batch, placed=batch.fill[:, :, None, None, None, None].expand(batch.placed.shape).clone())
    assert torch.equal(Compose((Intensity(scale=0.5, shift=2.0),))(outside).placed[..., 0, 0, 0, 0], varied.fill)


@pytest.mark.parametrize(("orientation", "axis"), [("LAS", 0), ("ARS", 1), ("SPR", 2)])
def test_a_flip_mirrors_left_and_right_exactly_and_is_off_by_default(orientation, axis):
    batch = a_batch(2, orientation=orientation)
    assert torch.equal(Compose((Affine(flip=1.0),))(batch).placed, batch.placed.flip(3 + axis))
    assert torch.equal(Compose((Affine(),))(batch).placed, batch.placed)
    with pytest.raises(UsageError, match="no orientation"):
        Compose((Affine(flip=0.5),))(replace(batch, orientation=""))


def test_time_runs_backwards_for_the_side_series_too():
    batch = a_batch(2)
    varied = Compose((Reverse(p=1.0),))(batch)
    assert torch.equal(varied.placed, batch.placed.flip(2))
    assert torch.equal(varied.side["x"], batch.side["x"].flip(1))
    with pytest.raises(UsageError, match="whole windows"):
        Compose((Reverse(),))(replace(batch, lengths=torch.tensor([3, 2])))


def test_frames_that_were_scrubbed_stay_marked_where_time_runs_backwards():
    kept = torch.tensor([[False, True, True], [True, True, False]])
    batch = a_batch(2, kept=kept)
    assert torch.equal(Compose((Reverse(p=1.0),))(batch).frames_kept, kept.flip(1))
    assert torch.equal(batch.frames_kept, kept)


def test_shares_are_kept():
    batch = replace(a_batch(400), placed=torch.zeros(400, 1, 1, 2, 2, 2), fill=torch.zeros(400, 1))
    found = Compose((Noise(p=0.3),))(batch).placed.flatten(1).abs().sum(1)
    assert 85 < int((found > 0).sum()) < 155  # 120 of 400, four SD to either side


def test_half_precision_is_resampled_in_single():
    batch = a_batch(1)
    augment = Compose((Affine(degrees=20, shift_mm=4),))
    whole, half = augment(batch).placed, augment(replace(batch, placed=batch.placed.half())).placed
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), whole, atol=4e-3, rtol=0)


def test_views_seeds_epochs_and_windows_draw_differently():
    one = torch.randn((1, 1, 1, *SHAPE), generator=torch.Generator().manual_seed(1))
    batch = replace(a_batch(4, views=2), placed=one.expand(4, 1, 1, *SHAPE).clone(), fill=torch.zeros(4, 1))
    others = [
        (batch, 0),
        (batch, 1),
        (replace(batch, epoch=batch.epoch + 1), 0),
        (replace(batch, window=batch.window + 9), 0),
        (replace(batch, sample=batch.sample + 9), 0),
    ]
    found = [row for changed, seed in others for row in Compose((Noise(p=1),), seed=seed)(changed).placed]
    assert len({row.numpy().tobytes() for row in found}) == 20


def test_views_draw_the_same_apart_as_together():
    batch, augment = a_batch(4, views=2), Compose((Noise(p=1), Affine(degrees=9)))
    apart = [augment(batch.view(number)).placed for number in range(2)]
    assert torch.equal(torch.cat(apart), augment(batch).placed)


def clips_of(url: str) -> fmristream.StreamingDataset:
    return fmristream.StreamingDataset(url, window=7, split="train", seed=3, grid=(8, 9, 7))


def rows(batches: list[Batch]) -> dict[int, bytes]:
    """What each position in the stream gave."""
    return {
        int(place): batch.placed[row].numpy().tobytes()
        for batch in batches
        for row, place in enumerate(batch.sample.tolist())
    }


def test_no_number_of_ranks_changes_a_clip(cohort_url, exit_stack):
    clips, augment = clips_of(cohort_url), Compose(SWIFT, seed=5)
    found = []
    for world, threads in ((1, 1), (3, 2), (4, 1)):
        ranks = loaders(exit_stack, clips, world=world, batch_size=5, threads=threads)
        batches = [batch.to("cpu", augment=augment) for step in in_step(ranks) for batch in step]
        found.append(rows(batches))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) >= clips.num_windows


def test_a_resumed_stream_draws_what_it_would_have_drawn(cohort_url):
    clips, augment = clips_of(cohort_url), Compose((Noise(p=1), Affine(degrees=10)), seed=5)
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu", augment=augment) as ours:
        whole = rows([batch for _ in range(2) for batch in ours])
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu", augment=augment) as ours:
        begun = rows(list(islice(ours, 4)))
        state = ours.state_dict()
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu", augment=augment) as ours:
        ours.load_state_dict(state)
        rest = rows([batch for _ in range(2) for batch in ours])
    assert begun | rest == whole


def test_epochs_differ(cohort_url):
    clips, augment = clips_of(cohort_url), Compose((Noise(p=1),), seed=5)
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        seen = {}
        for batch in (batch for _ in range(2) for batch in loader):
            varied, plain = batch.to("cpu", augment=augment), batch.to("cpu")
            for row, window in enumerate(batch.window.tolist()):
                seen.setdefault(window, []).append((varied.placed[row] - plain.placed[row]).numpy())
    twice = [pair for pair in seen.values() if len(pair) == 2]
    assert len(twice) >= clips.num_windows // 2
    assert not any(np.allclose(*pair) for pair in twice)


def test_draws_are_uniform_and_normal():
    key = key_of("test")
    assert stats.kstest(uniforms(key, 20_000), "uniform").pvalue > 1e-3
    found = normals(key, 200_001, torch.device("cpu")).double().numpy()
    assert len(found) == 200_001
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01
    other = normals(key_of("other"), 200_001, torch.device("cpu")).double().numpy()
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.01


def test_draws_are_the_same_in_every_release():
    """Numbers that a run was trained with: a change of these is a change of every augmented stream."""
    assert key_of(7, 0, 12, 0, 40) == KEY
    np.testing.assert_allclose(uniforms(KEY, 3), UNIFORMS, rtol=1e-15)
    np.testing.assert_allclose(normals(KEY, 4, torch.device("cpu")).numpy(), NORMALS, rtol=1e-5)


def normals_by_hand(key: int, count: int) -> list[float]:
    """Box and Muller on Python's own integers."""
    half = (count + 1) // 2
    pairs = []
    for place in range(half):
        x = (key + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        radius = np.sqrt(-2 * np.log(((x >> 40) + 1) / 2**24))
        angle = 2 * np.pi * ((x >> 16) & 0xFFFFFF) / 2**24
        pairs.append((radius * np.cos(angle), radius * np.sin(angle)))
    return [one for one, _ in pairs] + [other for _, other in pairs][: count - half]


@given(st.integers(0, 2**64 - 1))
def test_normals_are_those_of_plain_integers(key):
    np.testing.assert_allclose(normals(key, 7, torch.device("cpu")).numpy(), normals_by_hand(key, 7), atol=2e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(scale=1.0), lambda: Affine(degrees=-1), lambda: Affine(flip=2), lambda: Noise(sd=-1),
        lambda: Noise(p=1.1), lambda: Blur(sd_voxels=(1, 0)), lambda: Intensity(scale=-1), lambda: Reverse(p=-1),
    ],
)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(make):
    with pytest.raises(UsageError, match="expected"):
        make()


def test_what_cannot_be_augmented_is_refused():
    batch = a_batch()
    with pytest.raises(SpaceError, match="grayordinates"):
        Compose(SWIFT)(replace(batch, placed=None))
    with pytest.raises(UsageError, match="StreamingLoader"):
        Compose(SWIFT)(replace(batch, sample=None))
    with pytest.raises(UsageError, match="voxel_sizes_mm"):
        Compose(SWIFT)(replace(batch, voxel_sizes_mm=None))
