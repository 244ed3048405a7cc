"""What a picture shows, in numbers."""

import numpy as np
import pytest

from fmristream.ingest.options import ConvertOptions
from fmristream.report.look import CARPET_VOXELS, foreground, look_at, mean_image, signal_moments
from fmristream.report.slices import choose_slices, cropped
from fmristream.shards.dataset import open_dataset
from tests.report.datasets import brain_like, converted, write_runs


def looked_at(tmp_path, values, *, mask="none", **lies):
    source = write_runs(tmp_path / "source", {"run.nii": values}, **lies)
    converted(source, tmp_path / "d", ConvertOptions(mask=mask, split="none"))
    dataset = open_dataset(str(tmp_path / "d"))
    return look_at(dataset, dataset.runs[0])


def test_volumes_and_traces_are_what_numpy_computes(tmp_path):
    values = brain_like((6, 7, 8, 20))
    look = looked_at(tmp_path, values, scl_slope=0.5, scl_inter=2.0)
    scaled = values * 0.5 + 2.0
    bright = scaled[2:]  # the first two planes hold air and a voxel row that never changes
    np.testing.assert_allclose(look.mean[2:], bright.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(look.sd[2:], bright.std(-1), rtol=1e-5)
    np.testing.assert_allclose(look.tsnr[2:], bright.mean(-1) / bright.std(-1), rtol=1e-5)
    assert np.isnan(look.mean[0, :4]).all()
    shown = np.isfinite(look.tsnr)
    z = (scaled[shown] - scaled[shown].mean(-1, keepdims=True)) / scaled[shown].std(-1, keepdims=True)
    assert look.voxels == len(z) == len(look.carpet)
    np.testing.assert_allclose(look.global_signal, z.mean(0), atol=1e-4)
    np.testing.assert_allclose(look.change[1:], np.sqrt((np.diff(z) ** 2).mean(0)), rtol=1e-4)
    assert np.isnan(look.change[0])
    np.testing.assert_allclose(np.sort(look.carpet, axis=None), np.sort(z, axis=None), atol=1e-3)


def test_carpet_rows_fall_in_correlation_with_what_they_share(tmp_path):
    shared = np.sin(np.arange(30))
    weights = np.linspace(-1, 1, 5 * 4 * 6).reshape(5, 4, 6, 1)
    noise = np.random.default_rng(0).normal(0, 0.2, size=(5, 4, 6, 30))
    look = looked_at(tmp_path, np.asfortranarray((1000 + 50 * (weights + 0.3) * shared + noise).astype("<f4")))
    common = look.carpet.mean(axis=0)
    slopes = look.carpet @ (common - common.mean())
    assert (np.diff(slopes) <= 1e-3).all()


def test_a_carpet_has_a_bounded_number_of_voxels(tmp_path):
    values = brain_like((20, 20, 20, 5))
    look = looked_at(tmp_path, values)
    assert len(look.carpet) == CARPET_VOXELS
    assert look.voxels > CARPET_VOXELS


def test_everything_in_a_mask_is_shown_however_dark(tmp_path):
    values = brain_like()
    values[3] //= 100
    write_runs(tmp_path, {"mask.nii": (np.arange(120).reshape(5, 4, 6) >= 48).astype("u1")})
    look = looked_at(tmp_path, values, mask=str(tmp_path / "mask.nii"))
    assert np.isfinite(look.mean[3]).all()
    assert np.isnan(look.mean[:2]).all()


def test_demeaned_runs_are_not_taken_for_air():
    rng = np.random.default_rng(0)
    assert foreground(rng.normal(0, 0.1, 500), np.ones(500), whole=True).all()


@pytest.mark.parametrize("fill", [0, 7])
def test_a_run_that_never_changes_has_an_empty_carpet(tmp_path, fill):
    look = looked_at(tmp_path, np.full((5, 4, 6, 7), fill, "<i2"))
    assert look.carpet.shape == (0, 7)
    assert look.voxels == 0
    assert np.isnan(look.global_signal).all()
    assert np.isfinite(look.mean).all()
    assert np.isnan(look.tsnr).all()


def test_values_that_are_not_finite_leave_the_traces_finite(tmp_path):
    values = brain_like().astype("<f4")
    values[3, 1, 1, 2] = np.nan
    values[3, 1, 2, 3] = np.inf
    look = looked_at(tmp_path, values)
    assert np.isfinite(look.global_signal).all()
    assert np.isfinite(look.change[1:]).all()
    assert np.isfinite(look.carpet).all()


def test_a_head_is_shown_from_three_sides_and_a_slab_slice_by_slice():
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    assert [cut.axis for cut in choose_slices(np.ones((20, 24, 18), np.float32), affine)] == [0, 1, 2]
    flat = choose_slices(np.ones((20, 24, 3), np.float32), affine)
    assert [(cut.axis, cut.index) for cut in flat] == [(2, 0), (2, 1), (2, 2)]
    assert [cut.axis for cut in choose_slices(np.ones((20, 1, 24), np.float32), affine)] == [1]


def test_cropping_keeps_everything_that_is_shown():
    volume = np.full((20, 24, 18), np.nan, np.float32)
    volume[5:9, 10:13, 2] = 3
    [cut] = cropped([volume], np.diag([-2.0, 2, 2, 1]))
    assert cut.shape == (6, 5, 3)
    assert np.nansum(cut) == 3 * 4 * 3


def test_slices_know_their_sides():
    cuts = choose_slices(np.ones((20, 24, 18), np.float32), np.diag([3.0, 3, 3, 1]))
    assert [cut.sides for cut in cuts] == [("P", "A"), ("L", "R"), ("L", "R")]
    assert [(cut.width_mm, cut.height_mm) for cut in cuts] == [(72, 54), (60, 54), (60, 72)]


def test_means_and_sds_in_the_signals_unit_need_no_frame(tmp_path):
    values = brain_like((6, 7, 8, 20))
    write_runs(tmp_path, {"mask.nii": (np.arange(6 * 7 * 8).reshape(6, 7, 8) >= 100).astype("u1")})
    source = write_runs(tmp_path / "source", {"run.nii": values}, scl_slope=-0.5, scl_inter=2.0)
    converted(source, tmp_path / "d", ConvertOptions(mask=str(tmp_path / "mask.nii"), split="none"))
    dataset = open_dataset(str(tmp_path / "d"))
    scaled, mask = values * -0.5 + 2.0, dataset.space(0).mask
    mean, sd = signal_moments(dataset.reader(0))
    np.testing.assert_allclose(mean, scaled[mask].mean(-1), rtol=1e-6)
    np.testing.assert_allclose(sd, scaled[mask].std(-1), rtol=1e-5)
    image = mean_image(dataset, dataset.runs[0])
    np.testing.assert_array_equal(image[mask], mean.astype(np.float32))
    assert np.isnan(image[~mask]).all()
