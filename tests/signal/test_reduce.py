"""Fewer values a frame: cubes, boxes and parcels against loops, and their grids against where voxels lie."""

import numpy as np
import pytest

from fmristream.errors import SpaceError, UsageError
from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import atlas_of_labels, weights_on
from fmristream.signal.prepared import StoredParcels
from fmristream.signal.recipes import parse_recipe, prepare
from tests.signal.array_runs import ArrayRun, made

SHAPE = (5, 4, 7)
AFFINE = np.array([[-2.0, 0.1, 0, 10], [0, 2, 0, -12], [0.2, 0, 2.5, -7], [0, 0, 0, 1]])


def masked_run(**more) -> ArrayRun:
    rng = np.random.default_rng(4)
    mask = rng.random(SHAPE) < 0.6
    mask[:2, :2, :2] = False  # a cube without a voxel
    stored = rng.integers(100, 4000, (30, int(mask.sum()))).astype("<i2")
    return ArrayRun(stored, mask=mask, affine=AFFINE, **more)


def volumes(run: ArrayRun) -> np.ndarray:
    placed = np.full((len(run.stored), *SHAPE), np.nan)
    placed[:, run.mask] = run.bold
    return placed


def test_pooling_is_the_mean_of_stored_voxels_in_each_cube():
    run = masked_run()
    layout = parse_recipe("pool:2").layout(run)
    expected, cubes = [], []
    for place in np.ndindex(3, 2, 4):
        box = tuple(slice(2 * at, 2 * at + 2) for at in place)
        if run.mask[box].any():
            expected.append(np.nanmean(volumes(run)[(slice(None), *box)], axis=(1, 2, 3)))
            cubes.append(place)
    np.testing.assert_allclose(made(run, "pool:2")[0], np.stack(expected, 1), rtol=1e-6)
    np.testing.assert_array_equal(np.argwhere(layout.mask), cubes)
    centre = AFFINE @ [2.5, 0.5, 4.5, 1]  # of the voxels 2..3, 0..1, 4..5
    np.testing.assert_allclose(layout.affine @ [1, 0, 2, 1], centre)


def test_a_crop_keeps_values_and_places():
    run = masked_run()
    layout = parse_recipe("crop:1:-1,:,2:").layout(run)
    np.testing.assert_array_equal(layout.mask, run.mask[1:-1, :, 2:])
    placed = volumes(run)[:, 1:-1, :, 2:]
    np.testing.assert_array_equal(made(run, "crop:1:-1,:,2:")[0], placed[:, layout.mask].astype(np.float32))
    np.testing.assert_allclose(layout.affine @ [0, 0, 0, 1], AFFINE @ [1, 0, 2, 1])


def test_statistics_after_a_reduction_are_of_what_is_left():
    run = masked_run()
    left = volumes(run)[:, 1:-1][:, :, :, :][:, run.mask[1:-1]]
    expected = (left - left.mean()) / left.std(ddof=1)
    np.testing.assert_allclose(made(run, "crop:1:-1,:,: | global-zscore")[0], expected, atol=1e-5)
    pooled = made(run, "pool:2")[0].astype(np.float64)
    np.testing.assert_allclose(
        made(run, "pool:2 | voxel-zscore")[0], (pooled - pooled.mean(0)) / pooled.std(0), atol=1e-4
    )
    z = made(run, "voxel-zscore")[0].astype(np.float64)
    weights = np.zeros((len(z), int(parse_recipe("pool:2").layout(run).voxels)))
    cubes = {place: number for number, place in enumerate(sorted({tuple(p // 2) for p in np.argwhere(run.mask)}))}
    counts = np.zeros(len(cubes))
    for voxel, place in enumerate(np.argwhere(run.mask)):
        weights[:, cubes[tuple(place // 2)]] += z[:, voxel]
        counts[cubes[tuple(place // 2)]] += 1
    np.testing.assert_allclose(made(run, "voxel-zscore | pool:2")[0], weights / counts, atol=1e-5)


@pytest.fixture
def atlas():
    labels = np.zeros(SHAPE, dtype=np.int64)
    labels[:3], labels[3:, :2], labels[:2, :2, :2] = 2, 5, 9  # nothing of 9 is stored
    return atlas_of_labels(labels, Grid(shape=SHAPE, affine=tuple(AFFINE.reshape(-1))))


def test_parcels_of_a_given_atlas_are_means_and_an_empty_one_is_zero(atlas):
    run = masked_run()
    labels = np.zeros(SHAPE, dtype=np.int64)
    labels[:3], labels[3:, :2], labels[:2, :2, :2] = 2, 5, 9
    expected = np.zeros((30, 3))
    for column, label in enumerate((2, 5)):
        expected[:, column] = volumes(run)[:, run.mask & (labels == label)].mean(1)
    ours = made(run, "parcels:mine", atlases={"mine": atlas})
    np.testing.assert_allclose(ours[0], expected, rtol=1e-6)
    scaled = made(run, "parcels:mine | voxel-zscore", atlases={"mine": atlas})[0]
    np.testing.assert_allclose(
        scaled[:, :2], ((expected - expected.mean(0)) / np.where(expected.std(0), expected.std(0), 1))[:, :2], atol=1e-4
    )
    assert (scaled[:, 2] == 0).all()


def test_stored_series_spare_the_voxels_and_say_the_same(atlas):
    run = masked_run()
    weights = weights_on(atlas, Grid(shape=SHAPE, affine=tuple(AFFINE.reshape(-1))), run.mask)
    series = made(run, "parcels:mine", atlases={"mine": atlas})[0].astype(np.float64)
    series[:, 2] = np.nan
    stored = masked_run(of_atlas=StoredParcels(weights=weights, series=series))
    for text in (
        "parcels",
        "parcels | detrend | voxel-zscore",
        "parcels | frame-zscore",
        "parcels | voxel-center | clip:9",
    ):
        prepared = prepare(parse_recipe(text), stored)
        assert not prepared.needs_frames
        assert prepared.width == 3
        out = np.empty((1, 6, 3), dtype=np.float32)
        prepared(np.empty((6, 0), dtype="<i2"), range(4, 16, 2), out)
        on_the_fly = made(run, text.replace("parcels", "parcels:mine"), range(4, 16, 2), atlases={"mine": atlas})
        np.testing.assert_allclose(out, on_the_fly, atol=2e-4)
    assert stored.reads == []
    after = made(stored, "voxel-zscore | parcels")
    np.testing.assert_allclose(after, made(run, "voxel-zscore | parcels:mine", atlases={"mine": atlas}), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parcels | pool:2", "without a grid"),
        ("pool:2 | parcels", "put it first"),
        ("parcels | crop:1:,:,:", "without a grid"),
    ],
)
def test_reductions_that_do_not_follow_each_other_are_refused(atlas, text, said):
    run = masked_run()
    weights = weights_on(atlas, Grid(shape=SHAPE, affine=tuple(AFFINE.reshape(-1))), run.mask)
    run.of_atlas = StoredParcels(weights=weights, series=np.zeros((30, 3)))
    with pytest.raises((SpaceError, UsageError), match=said):
        made(run, text)


def test_a_box_without_a_voxel_is_refused():
    with pytest.raises(UsageError, match="no stored voxel"):
        made(masked_run(), "crop:0:2,0:2,0:2")
