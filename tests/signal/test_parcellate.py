"""Parcels: weights on a run's voxels are what nilearn's resampling gives, and series what float64 sums give."""

import nibabel
import numpy as np
import pytest
from nilearn.image import resample_to_img
from nilearn.maskers import NiftiLabelsMasker

from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import (
    ParcelSeries,
    atlas_of_labels,
    atlas_of_maps,
    centres_mm,
    robust_statistics,
    weights_on,
)

# Another voxel size, a flip, a turn, and places that no centre of a voxel shares.
ATLAS_AFFINE = np.array([[-2.0, 0, 0, 17.3], [0, 2.0, 0, -15.1], [0, 0, 2.0, -14.7], [0, 0, 0, 1]])
RUN_AFFINE = np.array([[3.0, 0.2, 0, -16.05], [-0.2, 3.0, 0, -14.02], [0, 0, 3.5, -13.03], [0, 0, 0, 1]])
ATLAS_SHAPE, RUN_SHAPE = (18, 16, 15), (11, 10, 9)


def grid(shape, affine) -> Grid:
    return Grid(shape=shape, affine=tuple(affine.reshape(-1).tolist()))


def blobs() -> np.ndarray:
    """Labels 3, 7 and 40, in boxes."""
    labels = np.zeros(ATLAS_SHAPE, dtype=np.int64)
    labels[2:9, 3:9, 2:13] = 3
    labels[9:16, 3:12, 2:8] = 7
    labels[10:15, 4:11, 9:13] = 40
    return labels


def mask() -> np.ndarray:
    inside = np.zeros(RUN_SHAPE, dtype=bool)
    inside[1:10, 1:8, 1:8] = True
    return inside


def dense(weights, voxels: int) -> np.ndarray:
    """(p, v) weights."""
    whole = np.zeros((weights.parcels, voxels))
    for parcel in range(weights.parcels):
        span = slice(weights.indptr[parcel], weights.indptr[parcel + 1])
        assert (np.diff(weights.voxels[span]) > 0).all()
        whole[parcel, weights.voxels[span]] = weights.weights[span]
    return whole


def image(data, affine) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(data, affine)


def resampled(data, interpolation: str) -> np.ndarray:
    target = image(np.zeros(RUN_SHAPE, "f4"), RUN_AFFINE)
    made = resample_to_img(
        image(data, ATLAS_AFFINE), target, interpolation=interpolation, force_resample=True, copy_header=True
    )
    return np.asarray(made.dataobj)


def test_labels_are_resampled_as_nilearn_does_it():
    found = weights_on(atlas_of_labels(blobs(), grid(ATLAS_SHAPE, ATLAS_AFFINE)), grid(RUN_SHAPE, RUN_AFFINE), mask())
    expected = resampled(blobs().astype("i2"), "nearest")[mask()]
    assert {3, 7, 40} <= set(expected.tolist())
    for row, label in zip(dense(found, int(mask().sum())), (3, 7, 40), strict=True):
        assert np.array_equal(row, expected == label)


def test_series_of_labels_are_those_of_niftilabelsmasker():
    rng = np.random.default_rng(0)
    data = rng.normal(1000, 50, (*RUN_SHAPE, 12)).astype("<f4")
    found = weights_on(atlas_of_labels(blobs(), grid(ATLAS_SHAPE, ATLAS_AFFINE)), grid(RUN_SHAPE, RUN_AFFINE), mask())
    series = ParcelSeries(found, frames=12)
    for frame in range(12):
        series.add(data[mask()][:, frame].copy())
    masker = NiftiLabelsMasker(
        image(blobs().astype("i2"), ATLAS_AFFINE), mask_img=image(mask().astype("u1"), RUN_AFFINE), standardize=None
    )
    expected = masker.fit_transform(image(data, RUN_AFFINE))
    np.testing.assert_allclose(series.finish(), expected, rtol=1e-6)


def test_maps_are_interpolated_as_nilearn_does_it():
    rng = np.random.default_rng(1)
    maps = np.zeros((*ATLAS_SHAPE, 2), dtype="f4")
    maps[3:15, 3:13, 3:12] = rng.random((12, 10, 9, 2))
    atlas = atlas_of_maps((maps[..., number] for number in range(2)), grid(ATLAS_SHAPE, ATLAS_AFFINE))
    assert atlas.labels.tolist() == [1, 2]
    found = dense(weights_on(atlas, grid(RUN_SHAPE, RUN_AFFINE), mask()), int(mask().sum()))
    for number in range(2):
        np.testing.assert_allclose(found[number], resampled(maps[..., number], "linear")[mask()], atol=2e-6)


@pytest.mark.parametrize("dtype", ["<i2", "|u1", "<u4", "<f4", "<f8"])
def test_means_are_weighted_sums_in_float64_over_finite_values(dtype):
    rng = np.random.default_rng(2)
    maps = np.zeros((*ATLAS_SHAPE, 3), dtype="f4")
    maps[3:15, 3:13, 3:12] = rng.random((12, 10, 9, 3))
    atlas = atlas_of_maps((maps[..., number] for number in range(3)), grid(ATLAS_SHAPE, ATLAS_AFFINE))
    weights = weights_on(atlas, grid(RUN_SHAPE, RUN_AFFINE), mask())
    values = rng.integers(0, 200, (4, int(mask().sum()))).astype(dtype)
    if values.dtype.kind == "f":
        values[1, ::3], values[2, ::5], values[3] = np.nan, np.inf, -np.inf
    series = ParcelSeries(weights, frames=4)
    for frame in values:
        series.add(frame)
    wide, matrix = values.astype(np.float64), dense(weights, values.shape[1])
    finite = np.isfinite(wide)
    with np.errstate(invalid="ignore"):
        expected = np.where(finite, wide, 0) @ matrix.T / (finite @ matrix.T)
    np.testing.assert_allclose(series.finish(), expected, rtol=1e-6)
    assert np.isnan(series.finish()[3]).all() == (values.dtype.kind == "f")


def test_coverage_is_the_share_of_a_parcel_that_lies_in_the_mask():
    affine = np.diag([2.0, 2, 2, 1])
    labels = np.zeros((6, 4, 4), dtype=np.int64)
    labels[:, 0], labels[:, 1], labels[:, 3] = 1, 2, 9
    inside = np.zeros((6, 4, 4), dtype=bool)
    inside[:, 0], inside[:3, 1] = True, True
    found = weights_on(atlas_of_labels(labels, grid(labels.shape, affine)), grid(inside.shape, affine), inside)
    assert found.coverage.tolist() == [1.0, 0.5, 0.0]
    assert found.empty == 1
    series = ParcelSeries(found, frames=1)
    series.add(np.ones(int(inside.sum()), dtype="<i2"))
    assert np.array_equal(series.finish(), [[1, 1, np.nan]], equal_nan=True)


def test_a_finer_atlas_counts_its_own_voxels_for_coverage():
    fine, coarse = np.diag([1.0, 1, 1, 1]), np.diag([2.0, 2, 2, 1])
    coarse[:3, 3] = 0.5  # a coarse voxel holds eight fine ones
    labels = np.ones((8, 8, 8), dtype=np.int64)
    inside = np.zeros((4, 4, 4), dtype=bool)
    inside[:1] = True
    found = weights_on(atlas_of_labels(labels, grid(labels.shape, fine)), grid(inside.shape, coarse), inside)
    assert found.coverage.tolist() == [0.25]


def test_an_atlas_elsewhere_has_no_weights():
    away = ATLAS_AFFINE.copy()
    away[0, 3] += 500
    found = weights_on(atlas_of_labels(blobs(), grid(ATLAS_SHAPE, away)), grid(RUN_SHAPE, RUN_AFFINE), mask())
    assert len(found.voxels) == 0
    assert found.coverage.tolist() == [0, 0, 0]


def test_a_centre_between_two_voxels_goes_to_the_same_one_whatever_the_rounding():
    affine, half = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    half[0, 3] = 1.0  # every centre lies between two of the atlas
    labels = np.arange(1, 65).reshape(4, 4, 4)
    inside = np.ones((4, 4, 4), dtype=bool)
    exact = weights_on(atlas_of_labels(labels, grid((4, 4, 4), affine)), grid((4, 4, 4), half), inside)
    for shift in (1e-9, -1e-9):
        half[0, 3] = 1.0 + shift
        near = weights_on(atlas_of_labels(labels, grid((4, 4, 4), affine)), grid((4, 4, 4), half), inside)
        assert np.array_equal(exact.voxels, near.voxels)
        assert np.array_equal(exact.indptr, near.indptr)


def test_robust_statistics_are_numpys_percentiles_over_what_is_finite():
    series = np.random.default_rng(3).normal(size=(31, 4)).astype("f4")
    series[:5, 1], series[:, 2], series[7, 3] = np.nan, np.nan, np.inf
    found = robust_statistics(series)
    for parcel, rows in ((0, slice(None)), (1, slice(5, None))):
        low, middle, high = np.percentile(series[rows, parcel].astype(float), (25, 50, 75))
        np.testing.assert_allclose(found[:, parcel], (middle, high - low), rtol=1e-6)
    assert np.isnan(found[:, 2]).all()
    np.testing.assert_allclose(found[0, 3], np.median(np.delete(series[:, 3], 7)), rtol=1e-6)


def test_centres_are_mean_places_of_stored_voxels_in_mm():
    inside = mask()
    atlas = atlas_of_labels(blobs(), grid(ATLAS_SHAPE, ATLAS_AFFINE))
    inside[:, :, 4:] = False  # cuts parcels
    weights = weights_on(atlas, grid(RUN_SHAPE, RUN_AFFINE), inside)
    found = centres_mm(weights, inside, RUN_AFFINE)
    places = nibabel.affines.apply_affine(RUN_AFFINE, np.argwhere(inside))
    for parcel in range(weights.parcels):
        voxels = weights.voxels[weights.indptr[parcel] : weights.indptr[parcel + 1]]
        expected = places[voxels].mean(0) if len(voxels) else [np.nan] * 3
        np.testing.assert_allclose(found[parcel], expected, atol=1e-9)
    assert np.isfinite(found).any()


def test_centres_of_maps_are_weighted_and_parcels_without_a_voxel_have_none():
    maps = [np.zeros(RUN_SHAPE), np.zeros(RUN_SHAPE)]
    maps[0][3, 3, 3], maps[0][6, 3, 3] = 3.0, 1.0
    maps[1][0, 0, 0] = 1.0
    weights = weights_on(atlas_of_maps(iter(maps), grid(RUN_SHAPE, RUN_AFFINE)), grid(RUN_SHAPE, RUN_AFFINE), mask())
    found = centres_mm(weights, mask(), RUN_AFFINE)
    np.testing.assert_allclose(found[0], nibabel.affines.apply_affine(RUN_AFFINE, [3.75, 3, 3]), atol=1e-4)
    assert np.isnan(found[1]).all()
