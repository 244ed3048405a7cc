"""Connectivity is that of the frames the network sees, each once, whatever the windows, batches and runs."""

from contextlib import ExitStack

import nibabel
import numpy as np
import pytest

import fmristream
from fmristream import StreamingDataset, StreamingLoader
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.signal.grid import target_positions
from train.baselines import recipe_baselines
from train.baselines_connectivity import (
    RunSums,
    block_for,
    connectivity_features,
    cube_parcels,
    default_block,
    feature_bytes,
)
from train.config import recipe_from
from train.data import Part


def features(url, *, batch_size=3, block=0, channel=0, **options):
    with ExitStack() as stack:
        clips = StreamingDataset(url, **{"window": 8, "stride": 7, "normalize": "none"} | options)
        loader = StreamingLoader(clips, batch_size=batch_size)
        stack.callback(loader.close)
        return connectivity_features(Part(clips=clips, loader=loader), block=block, channel=channel)


def plain(dataset, run, frames, block=4):
    """By loops over cubes and numpy's correlation."""
    bold, mask = dataset.read(run).astype(np.float64)[frames], dataset.space(run).mask
    courses = []
    for corner in np.ndindex(*(-(-size // block) for size in mask.shape)):
        cube = tuple(slice(block * at, block * (at + 1)) for at in corner)
        if mask[cube].sum() >= 0.1 * block**3:
            courses.append(bold[(slice(None), *cube)][:, mask[cube]].mean(axis=1))
    return np.arctanh(np.corrcoef(courses)[np.triu_indices(len(courses), 1)])


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({}, range(36)),
        ({"stride": 3}, range(35)),
        ({"stride": 14}, [*range(8), *range(14, 22), *range(28, 36)]),
        ({"stride": 20, "step": 3}, range(0, 24, 3)),
        ({"window": None, "stride": None}, range(36)),
    ],
    ids=["touching", "overlapping", "with gaps", "dilated", "whole runs"],
)
def test_frames_of_the_windows_count_once_each(cohort, options, frames):
    dataset = fmristream.open(cohort)
    found = features(cohort, split="test", block=4, **options)
    assert len(found.subject) == 6
    for label, row in zip(found.subject, found.values, strict=True):
        (run,) = (run for run in dataset.runs if run.subject == label)
        np.testing.assert_allclose(row, plain(dataset, run, list(frames)), rtol=1e-6, atol=1e-9)


def test_batches_and_scales_of_a_run_do_not_matter(cohort):
    whole = features(cohort, split="test", block=3, batch_size=50)
    np.testing.assert_allclose(features(cohort, split="test", block=3, batch_size=1).values, whole.values, rtol=1e-9)
    scaled = features(cohort, split="test", block=3, normalize="global-zscore")
    np.testing.assert_allclose(scaled.values, whole.values, rtol=1e-4, atol=1e-5)


def test_voxels_that_the_grid_cuts_off_are_not_seen(cohort):
    dataset = fmristream.open(cohort)
    mask = dataset.space(0).mask
    place = target_positions(mask, (8, 8, 8))
    sums = RunSums(8)
    packed = dataset.read(0, packed=True)
    sums.add(
        np.stack(
            [
                packed[:, (place // 256 == a) & (place // 32 % 2 == b) & (place // 4 % 2 == c) & (place >= 0)].mean(
                    1, dtype=np.float64
                )
                for a in (0, 1)
                for b in (0, 1)
                for c in (0, 1)
            ],
            1,
        )
    )
    found = features(cohort, grid=(8, 8, 8), block=4, window=36, stride=36)
    row = found.subject.index(dataset.runs[0].subject)
    np.testing.assert_allclose(found.values[row], sums.fisher_z(), rtol=1e-6)


def test_runs_of_a_subject_are_averaged(tmp_path):
    url = str(tmp_path / "two")
    source = "synth://?subjects=3&runs=2&shape=12x12x12&frames=24"
    fmristream.convert(source, url, options=ConvertOptions(split="none"))
    dataset = fmristream.open(url)
    found = features(url, block=4)
    for label, row in zip(found.subject, found.values, strict=True):
        both = [plain(dataset, run, list(range(22))) for run in dataset.runs if run.subject == label]
        assert len(both) == 2
        np.testing.assert_allclose(row, np.mean(both, axis=0), rtol=1e-6, atol=1e-9)
    assert found.group == found.subject


@pytest.fixture(scope="module")
def parcelled(cohort, tmp_path_factory):
    """A cohort whose runs have stored series of 6 parcels, one of them outside the brain."""
    folder = tmp_path_factory.mktemp("parcelled")
    labels = np.zeros((12, 12, 12), dtype=np.int16)
    for number in range(5):
        labels[2 * number + 1 : 2 * number + 3, 2:10, 2:10] = number + 1
    labels[0, 0, 0] = 9
    affine = fmristream.open(cohort).runs[0].affine_matrix
    nibabel.save(nibabel.Nifti1Image(labels, affine), folder / "atlas.nii")
    options = ConvertOptions(split="exact", split_ratios=(0.5, 0.2, 0.3), atlases=(str(folder / "atlas.nii"),))
    source = "synth://?subjects=20&shape=12x12x12&frames=36&effect=coupling&strength=1.6"
    fmristream.convert(source, str(folder / "out"), options=options)
    return str(folder / "out")


def test_stored_parcels_are_correlated_as_they_are(parcelled):
    dataset = fmristream.open(parcelled)
    found = features(parcelled, split="test", normalize="parcels")
    assert len(found.subject) == 6
    for label, row in zip(found.subject, found.values, strict=True):
        (run,) = (run for run in dataset.runs if run.subject == label)
        series = dataset.parcels(run).values.astype(np.float64)
        assert np.isnan(series[:, 5]).all()
        pairs = np.triu_indices(6, 1)
        inside = pairs[1] < 5
        z = np.arctanh(np.corrcoef(series[:, :5].T)[np.triu_indices(5, 1)])
        np.testing.assert_allclose(row[inside], z, rtol=1e-5)
        assert np.isnan(row[~inside]).all()


def test_a_recipe_of_volumes_is_compared_with_stored_parcels(parcelled):
    recipe = recipe_from({"data": {"url": parcelled, "window": 8, "stride": 7, "grid": [16, 16, 16]}})
    for atlas in ("", fmristream.open(parcelled).parcels(0).atlas[:10]):
        connectivity, _ = recipe_baselines(recipe, atlas=atlas)
        assert len(connectivity.reader.centre) == 15
        assert [len(connectivity.parts[part].label) for part in ("train", "val", "test")] == [10, 4, 6]


def test_sums_in_pieces_are_those_of_the_whole_even_on_a_large_mean():
    rng = np.random.default_rng(0)
    frames = (1e5 + rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))).astype(np.float32).astype(np.float64)
    sums = RunSums(6)
    for part in np.split(frames, [1, 2, 20, 20, 47]):
        sums.add(part)
    np.testing.assert_allclose(sums.fisher_z(), np.arctanh(np.corrcoef(frames.T)[np.triu_indices(6, 1)]), rtol=1e-9)


def test_a_series_that_never_changes_has_no_correlation():
    frames = np.random.default_rng(0).normal(size=(30, 3))
    frames[:, 1] = 0.1
    sums = RunSums(3)
    sums.add(frames[:7])
    sums.add(frames[7:])
    assert np.isnan(sums.fisher_z()).tolist() == [True, False, True]


def test_cubes_with_little_brain_are_no_parcels():
    mask = np.zeros((8, 4, 4), dtype=bool)
    mask[:4], mask[4, 0, :2] = True, True
    parcels = cube_parcels(np.flatnonzero(mask), mask.shape, 4)
    assert len(parcels) == 1
    values = np.random.default_rng(0).normal(size=(5, mask.sum()))
    np.testing.assert_allclose(parcels.means(values)[:, 0], values[:, :64].mean(axis=1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, "seed=None"),
        ({"channel": 1}, "channel 1"),
        ({"window": 2, "stride": 50}, "3 or more"),
    ],
)
def test_what_has_no_connectivity_is_refused(cohort, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        features(cohort, block=4, **options)


def test_cubes_grow_until_the_correlations_of_all_subjects_fit(cohort):
    clips = StreamingDataset(cohort, window=8, normalize="none")
    series = {block: len(cube_parcels(clips.positions, clips.grid, block)) for block in (2, 3, 4)}
    assert block_for(clips, subjects=20) == default_block(clips.grid) == 2
    room = feature_bytes(series[3], 20)
    assert room < feature_bytes(series[2], 20)
    assert block_for(clips, subjects=20, most_bytes=room) == 3
    assert block_for(clips, subjects=20, most_bytes=room - 1) == 4


def test_a_list_of_series_that_does_not_fit_is_refused(parcelled):
    clips = StreamingDataset(parcelled, window=8, normalize="parcels")
    assert block_for(clips, subjects=12) == 0
    with pytest.raises(UsageError, match=f"{clips.voxels} series and 12 subjects"):
        block_for(clips, subjects=12, most_bytes=feature_bytes(clips.voxels, 12) - 1)


def test_connectivity_of_a_batch_of_large_windows_takes_them_one_by_one(cohort, monkeypatch):
    from train import baselines

    tables = {
        "data": {"url": cohort, "window": 8, "stride": 7},
        "train": {"batch_size": 4},
        "eval": {"baselines": False},
    }
    monkeypatch.setattr(baselines, "_BATCH_BYTES", 1)
    with ExitStack() as stack:
        parts = baselines._open_parts(recipe_from(tables), stack)
        assert {len(batch) for part in parts.values() for batch in part.loader} == {1}
        small = connectivity_features(parts["test"], block=4)
    np.testing.assert_allclose(
        small.values, features(cohort, split="test", block=4, normalize="voxel-zscore").values, rtol=1e-6
    )
