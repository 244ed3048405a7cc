"""Resampling beside scipy and nilearn in double precision: the same numbers, no aliases, and the same bits whoever computes."""

import math

import numpy as np
import pytest
from scipy import ndimage, signal, special

from fmristream.signal.grid import Grid
from fmristream.signal.resample import (
    BETA,
    HALF_WIDTH,
    SLOWING_CUTOFF,
    TimeResampler,
    frames_after,
    points_of,
    resized,
    space_weights,
    time_weights,
)

PAIRS = [(0.72, 2.0), (2.0, 0.72), (0.8, 1.0), (2.0, 2.1), (0.5, 3.0)]


def in_time(series: np.ndarray, tr_s: float, new_tr_s: float) -> np.ndarray:
    """(t, v) resampled, frame by frame."""
    resampler = TimeResampler(frames=len(series), tr_s=tr_s, new_tr_s=new_tr_s, voxels=series.shape[1])
    return np.array([out.copy() for frame in series for out in resampler.add(frame)])


def whole_series(series: np.ndarray, tr_s: float, new_tr_s: float) -> np.ndarray:
    """The same by the definition, with numpy's sinc, scipy's Bessel function and a padded series."""
    scale = max(1.0, new_tr_s / tr_s)
    cutoff = SLOWING_CUTOFF if new_tr_s > tr_s else 1.0
    pad = math.ceil(HALF_WIDTH * scale) + 1
    padded = np.pad(series, ((pad, pad), (0, 0)), mode="reflect")
    at = np.arange(len(padded)) - pad
    out = []
    for target in np.arange(frames_after(len(series), tr_s, new_tr_s)) * new_tr_s / tr_s:
        x = (at - target) / scale
        window = special.i0(BETA * np.sqrt(np.clip(1 - (x / HALF_WIDTH) ** 2, 0, None))) * (
            np.abs(x) <= HALF_WIDTH + 1e-6
        )
        weights = np.sinc(cutoff * x) * window
        out.append(weights @ padded / weights.sum())
    return np.array(out)


@pytest.mark.parametrize(("tr_s", "new_tr_s"), PAIRS)
@pytest.mark.parametrize("frames", [1, 2, 20, 130])
def test_frames_one_by_one_give_what_the_whole_series_gives(tr_s, new_tr_s, frames):
    series = np.random.default_rng(frames).standard_normal((frames, 5)) + 100
    found = in_time(series, tr_s, new_tr_s)
    assert len(found) == frames_after(frames, tr_s, new_tr_s)
    if frames == 1:
        assert np.array_equal(found, series)
    else:
        np.testing.assert_allclose(found, whole_series(series, tr_s, new_tr_s), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tr_s", "new_tr_s"), PAIRS)
def test_a_band_limited_series_keeps_its_values_and_what_would_fold_is_gone(tr_s, new_tr_s):
    frames = 400
    nyquist = 0.5 / max(tr_s, new_tr_s)
    t = np.arange(frames) * tr_s
    away = HALF_WIDTH * max(1, math.ceil(tr_s / new_tr_s)) + 1  # from the edges
    k = np.arange(frames_after(frames, tr_s, new_tr_s))[away:-away] * new_tr_s
    for share in (0.05, 0.3, 0.55):
        found = in_time(np.cos(2 * np.pi * share * nyquist * t + 0.3)[:, None], tr_s, new_tr_s)[away:-away, 0]
        assert np.abs(found - np.cos(2 * np.pi * share * nyquist * k + 0.3)).max() < 2e-3
    for share in (1.0, 1.2, 2.0, 2.5):
        if share * nyquist < 0.5 / tr_s:
            folded = in_time(np.cos(2 * np.pi * share * nyquist * t + 0.3)[:, None], tr_s, new_tr_s)[away:-away]
            assert np.abs(folded).max() < 10 ** (-54 / 20)


def test_a_slow_series_is_what_scipy_makes_of_it():
    t = np.arange(300) * 0.8
    series = 100 + np.cos(2 * np.pi * 0.05 * t) + 0.5 * np.sin(2 * np.pi * 0.013 * t)
    found = in_time(series[:, None], 0.8, 2.0)[:, 0]
    scipys = signal.resample_poly(series, 2, 5, window=("kaiser", 9.0), padtype="line")[: len(found)]
    assert np.abs(found - scipys)[15:-15].max() < 5e-3


@pytest.mark.parametrize(("tr_s", "new_tr_s"), PAIRS)
def test_what_never_changes_stays_what_it_is(tr_s, new_tr_s):
    found = in_time(np.full((50, 2), 1234.5), tr_s, new_tr_s)
    np.testing.assert_allclose(found, 1234.5, rtol=1e-14)


def test_memory_in_time_is_a_few_frames():
    resampler = TimeResampler(frames=2000, tr_s=0.72, new_tr_s=2.0, voxels=3)
    most = 0
    for frame in np.zeros((2000, 3)):
        for _ in resampler.add(frame):
            most = max(most, len(resampler._open) + len(resampler._spare) + 1)
    assert most <= 2 * HALF_WIDTH + 2


def test_nan_stays_near_its_frame():
    series = np.zeros((100, 2))
    series[50, 0] = np.nan
    found = in_time(series, 1.0, 2.0)
    assert np.isnan(found[:, 0]).sum() <= 2 * HALF_WIDTH + 1
    assert np.isnan(found[25, 0])
    assert np.isfinite(found[:, 1]).all()


def test_weights_are_the_same_bits_everywhere():
    """Written down once: a digest must not change with a library or a processor."""
    import hashlib

    text = repr(list(time_weights(40, 0.72, 2.0)) + list(time_weights(9, 2.0, 1.1)))
    source = Grid(shape=(9, 8, 7), affine=(-2.0, 0.1, 0.0, 8.0, 0.05, 2.0, 0.2, -8.0, 0.0, -0.1, 2.2, -7.0, 0, 0, 0, 1))
    weights = space_weights(source, resized(source, 3.0))
    data = weights.starts.tobytes() + weights.places.tobytes() + weights.weights.tobytes()
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7efd9b364b231f1b"
    assert hashlib.sha256(data).hexdigest()[:16] == "65b832215bf64ecf"


SOURCE = Grid(
    shape=(24, 26, 20), affine=(-2.0, 0.1, 0.0, 24.0, 0.05, 2.0, 0.2, -26.0, 0.0, -0.1, 2.2, -20.0, 0, 0, 0, 1)
)
STRAIGHT = Grid(shape=(24, 26, 20), affine=(-2.0, 0, 0, 24.0, 0, 2.0, 0, -26.0, 0, 0, 2.0, -20.0, 0, 0, 0, 1))
TEMPLATE = Grid(shape=(22, 25, 21), affine=(2.1, 0, 0, -24.0, 0, 2.1, 0, -26.0, 0, 0, 2.1, -20.0, 0, 0, 0, 1))


def volume_on(grid: Grid) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.asfortranarray(500 + 100 * rng.standard_normal(grid.shape), dtype=np.float32)


def in_space(volume: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    out = np.empty(math.prod(target.shape))
    space_weights(source, target).apply(volume, 1.0, 0.0, out)
    return out.reshape(target.shape, order="F")


def by_scipy(volume: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """The mean of linear interpolation at the points of each target voxel; 0 beyond the source's field of view."""
    matrix = np.linalg.inv(source.matrix()) @ target.matrix()
    points = points_of(source, target)
    total = np.zeros(target.shape)
    for place in np.ndindex(*points):
        shift = (np.array(place) + 0.5) / points - 0.5
        offset = matrix[:3, :3] @ shift + matrix[:3, 3]
        values = ndimage.affine_transform(
            volume.astype(float), matrix[:3, :3], offset, output_shape=target.shape, order=1, mode="nearest"
        )
        at = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), -1) @ matrix[:3, :3].T + offset
        total += values * ((at >= -0.5 - 1e-7) & (at <= np.array(volume.shape) - 0.5 + 1e-7)).all(-1)
    return total / math.prod(points)


@pytest.mark.parametrize("source", [SOURCE, STRAIGHT], ids=["oblique", "straight"])
@pytest.mark.parametrize("edge_mm", [None, 1.3, 3.0, 5.0])
def test_space_is_what_scipy_gives(source, edge_mm):
    target = TEMPLATE if edge_mm is None else resized(source, edge_mm)
    volume = volume_on(source)
    found = in_space(volume, source, target)
    np.testing.assert_allclose(found, by_scipy(volume, source, target), rtol=2e-7, atol=1e-4)
    assert (found == 0).any() == (edge_mm is None)


def test_a_finer_grid_is_nilearns_linear_resampling():
    import nibabel
    from nilearn.image import resample_img

    volume, target = volume_on(SOURCE), resized(SOURCE, 1.4)
    image = nibabel.Nifti1Image(volume.astype(np.float64), SOURCE.matrix())
    theirs = resample_img(
        image, target.matrix(), target.shape, interpolation="linear", copy_header=True, force_resample=True
    ).get_fdata()
    ours = in_space(volume, SOURCE, target)
    inside = (slice(2, -2),) * 3  # at the rim they have 0 where we go on to the edge of the field of view
    np.testing.assert_allclose(ours[inside], theirs[inside], rtol=1e-6, atol=1e-3)


def test_the_same_grid_and_turned_axes_give_the_very_values():
    volume = volume_on(STRAIGHT)
    assert np.array_equal(in_space(volume, STRAIGHT, STRAIGHT), volume)
    x, y, z = STRAIGHT.shape
    flipped = Grid(shape=(z, y, x), affine=(0, 0, 2.0, -22.0, 0, 2.0, 0, -26.0, 2.0, 0, 0, -20.0, 0, 0, 0, 1))
    assert np.array_equal(in_space(volume, STRAIGHT, flipped), volume[::-1].transpose(2, 1, 0))


def test_a_coarser_grid_has_no_aliases():
    stripes = np.zeros(STRAIGHT.shape, dtype=np.float32, order="F")
    stripes[::2] = 100
    found = in_space(stripes, STRAIGHT, resized(STRAIGHT, 4.0))
    np.testing.assert_allclose(found, 50, rtol=1e-6)


def test_a_resized_grid_keeps_the_field_of_view():
    for edge_mm in (1.0, 1.7, 4.0):
        target = resized(SOURCE, edge_mm)
        ends = [grid.matrix() @ [*((np.array(grid.shape) - 1) / 2), 1] for grid in (SOURCE, target)]
        np.testing.assert_allclose(*ends, atol=1e-9)
        sizes = np.sqrt((target.matrix()[:3, :3] ** 2).sum(axis=0))
        np.testing.assert_allclose(sizes, edge_mm)
        whole = np.array(SOURCE.shape) * np.sqrt((SOURCE.matrix()[:3, :3] ** 2).sum(axis=0))
        assert (np.abs(np.array(target.shape) * edge_mm - whole) <= edge_mm / 2 + 1e-3).all()


def test_nan_goes_only_where_it_has_weight():
    volume = np.ones(STRAIGHT.shape, dtype=np.float32, order="F")
    volume[5, 6, 7] = np.nan
    assert np.isnan(in_space(volume, STRAIGHT, STRAIGHT)).sum() == 1


def test_grids_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="wide, at most 32"):
        space_weights(STRAIGHT, resized(STRAIGHT, 80.0))
    flat = Grid(shape=(2, 2, 2), affine=(1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1))
    with pytest.raises(ValueError, match="no inverse"):
        points_of(flat, STRAIGHT)
