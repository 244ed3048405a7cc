"""The planted effects are where the proof says they are: each reader sees what it should and nothing else."""

import dataclasses

import nibabel
import numpy as np
import pytest

import fmristream
from tools.proof_cells import EFFECTS, Settings
from tools.proof_cohorts import (
    LAGS,
    READERS,
    dataset_of,
    lagged_connectivity,
    read_scores,
    ridge_scores,
    shuffled_windows,
    write_blocks,
)
from tools.proof_results import auroc_draws
from train.baselines_connectivity import LEAST_BRAIN
from train.metrics import auroc

SMALL = Settings(subjects=44, shape=(12, 12, 12), frames=64)
# What connectivity and the SD image see is tested in test_synth_controls.py, too.
EACH = [pytest.param(one, marks=[] if one in ("order", "states") else [pytest.mark.full]) for one in EFFECTS]
SEEN_BY = {"coupling": {"fc"}, "amplitude": {"sd", "fc"}, "order": {"lagged-fc"}, "states": {"lagged-fc"}}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("proof")


def is_no_better_than_chance(truth, score):
    # 99 of 100 draws: sixteen readers are asked, and few subjects.
    return np.quantile(auroc_draws(truth, score), 0.01) < 0.5


@pytest.mark.parametrize("effect", EACH)
def test_each_effect_is_seen_by_the_readers_it_is_planted_for_and_by_no_other(out, effect):
    for reader in READERS:
        scores, num_train = read_scores(out, SMALL, effect, 0, reader)
        assert (num_train, len(scores.subject)) == (26, 18)
        if reader in SEEN_BY[effect]:
            assert auroc(scores.truth, scores.score) > 0.9, reader
        else:
            assert is_no_better_than_chance(scores.truth, scores.score), reader


@pytest.mark.parametrize("effect", EACH)
def test_shuffled_frames_blind_the_oracle_of_timing_and_change_nothing_for_the_others(out, effect):
    for reader in READERS:
        scores, _ = read_scores(out, SMALL, effect, 0, reader)
        if reader == "lagged-fc":
            assert is_no_better_than_chance(scores.truth, scores.shuffled)
        else:
            np.testing.assert_allclose(scores.shuffled, scores.score, atol=1e-3)


def cubes_of(mask, block):
    """(v,) number of each voxel's cube, from 0, or -1 where the cube has too little brain; by a plain loop."""
    voxels = np.argwhere(mask)
    cubes = [tuple(place // block) for place in voxels]
    kept = [cube for cube in sorted(set(cubes)) if cubes.count(cube) >= LEAST_BRAIN * block**3]
    return np.array([kept.index(cube) if cube in kept else -1 for cube in cubes]), len(kept)


def test_stored_parcels_are_the_blocks_that_connectivity_is_computed_of(out):
    opened = fmristream.open(dataset_of(out, SMALL, "order", 0))
    run = next(iter(opened.runs))
    numbers, count = cubes_of(opened.space(run).mask, SMALL.block)
    frames = opened.read(run)[:, opened.space(run).mask].astype(np.float64)
    means = np.stack([frames[:, numbers == parcel].mean(axis=1) for parcel in range(count)], axis=1)
    np.testing.assert_allclose(opened.parcels(run).values, means, rtol=1e-6)


def test_a_cohort_is_converted_once(out):
    url = dataset_of(out, SMALL, "order", 0)
    before = fmristream.open(url).generation_digest
    assert dataset_of(out, SMALL, "order", 0) == url
    assert fmristream.open(url).generation_digest == before
    assert dataset_of(out, dataclasses.replace(SMALL, subjects=8), "order", 0) != url


def test_blocks_are_written_where_the_mask_is(tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.random((8, 9, 7)) < 0.7
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    write_blocks(tmp_path / "blocks.nii", mask, affine, 4)
    image = nibabel.load(tmp_path / "blocks.nii")
    labels = np.asarray(image.dataobj)
    np.testing.assert_array_equal(image.affine, affine)
    assert not labels[~mask].any()
    numbers, _ = cubes_of(mask, 4)
    np.testing.assert_array_equal(labels[mask], numbers + 1)


def test_lagged_connectivity_is_that_of_a_plain_loop_and_turns_round_with_time():
    rng = np.random.default_rng(1)
    series = rng.normal(size=(40, 5)).cumsum(axis=0)
    z = (series - series.mean(0)) / series.std(0)
    expected = []
    for i in range(5):
        for j in range(i + 1, 5):
            later = [np.sum(z[:-lag, i] * z[lag:, j]) / 40 for lag in LAGS]
            earlier = [np.sum(z[:-lag, j] * z[lag:, i]) / 40 for lag in LAGS]
            expected.append(np.mean(later) - np.mean(earlier))
    np.testing.assert_allclose(lagged_connectivity(series), expected, atol=1e-12)
    np.testing.assert_allclose(lagged_connectivity(series[::-1]), -np.array(expected), atol=1e-12)


def test_a_series_that_follows_another_has_positive_lagged_connectivity():
    first = np.sin(np.arange(60) / 4)
    assert lagged_connectivity(np.stack([first, np.roll(first, 3)], axis=1))[0] > 0.5


def test_shuffled_windows_keep_each_frame_in_its_window():
    order = shuffled_windows(21, 8, np.random.default_rng(2))
    np.testing.assert_array_equal(np.sort(order), np.arange(21))
    np.testing.assert_array_equal(order[:16] // 8, np.arange(16) // 8)
    np.testing.assert_array_equal(order[16:], np.arange(16, 21))
    assert (order[:16] != np.arange(16)).any()


def test_ridge_scores_of_the_same_subjects_are_the_same_in_every_test_set():
    rng = np.random.default_rng(3)
    truth = np.arange(30) % 2.0
    train = rng.normal(size=(30, 4)) + truth[:, None]
    train[:, 3] = 7  # never varies
    test = rng.normal(size=(6, 4))
    one, both = ridge_scores(train, truth, (test, np.concatenate([test, test])))
    np.testing.assert_allclose(both, np.concatenate([one, one]))
    (told,) = ridge_scores(train, truth, (train,))
    assert auroc(truth, told) > 0.8
