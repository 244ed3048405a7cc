"""Synthetic cohorts: the same everywhere, and like BOLD."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from fmristream.errors import UsageError
from fmristream.synth import Cohort, parse_url

COHORT = Cohort(subjects=3, runs=2, effect="coupling", frames=100)


def bold(cohort, subject=0, run=0):
    """(t, voxel) of the brain."""
    mask = cohort.brain_mask()
    return np.stack([frame[mask] for frame in cohort.run_frames(subject, run)]).astype(np.float64)


def digest(cohort):
    state = hashlib.sha256(repr(cohort.participants()).encode())
    for subject in range(cohort.subjects):
        for run in range(cohort.runs):
            for frame in cohort.run_frames(subject, run):
                state.update(frame.tobytes(order="F"))
    return state.hexdigest()


def digest_in_another_process(url, **environment):
    code = (
        "import sys; from importlib import util\n"
        "spec = util.spec_from_file_location('cohort_test', sys.argv[1])\n"
        "module = util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.digest(module.parse_url(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, __file__, url],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "url",
    [
        "synth://?subjects=2&effect=coupling&frames=20",
        "synth://?subjects=2&effect=order&strength=3&frames=20&masked=false&dtype=float32&shape=15x17x13",
        "synth://?subjects=2&kind=dummy&shape=9x8x7",
    ],
)
def test_a_cohort_is_the_same_in_another_process_and_without_vector_instructions(url):
    here = digest(parse_url(url))
    assert digest_in_another_process(url, PYTHONHASHSEED="7") == here
    # What this processor has beyond the baseline, so that the other process computes as an older one would.
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    newer = " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))
    assert digest_in_another_process(url, NPY_DISABLE_CPU_FEATURES=newer) == here


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("synth://?subjects=2&frames=12&shape=12x13x11&effect=none&seed=4", "3bc4d66bdfb6bc30"),
        ("synth://?subjects=2&frames=12&shape=12x13x11&effect=coupling", "142d06384dc2e072"),
        ("synth://?subjects=2&frames=12&shape=12x13x11&effect=amplitude&strength=2.0&runs=2", "66f4279640388459"),
        ("synth://?subjects=2&frames=12&shape=12x13x11&effect=order&strength=3.0&dtype=float32", "6477bb6abc5abb7b"),
    ],
)
def test_cohorts_of_earlier_releases_keep_their_bytes(url, expected):
    # Digests of before the effect `states` was added.
    assert digest(parse_url(url))[:16] == expected


def test_a_run_depends_on_its_subject_and_number_and_not_on_the_cohort_s_size():
    larger = dataclasses.replace(COHORT, subjects=50, runs=4)
    assert larger.participants()[:3] == COHORT.participants()
    assert larger.subject_labels()[:3] == COHORT.subject_labels()
    np.testing.assert_array_equal(bold(larger, 2, 1), bold(COHORT, 2, 1))


def test_subjects_runs_and_seeds_differ():
    first = bold(COHORT)
    for other in (bold(COHORT, 1), bold(COHORT, 0, 1), bold(dataclasses.replace(COHORT, seed=1))):
        fluctuation = np.corrcoef((first - first.mean(0)).ravel(), (other - other.mean(0)).ravel())[0, 1]
        assert abs(fluctuation) < 0.1


def test_a_subject_s_runs_share_its_anatomy():
    other_run = np.corrcoef(bold(COHORT, 0, 0).mean(0), bold(COHORT, 0, 1).mean(0))[0, 1]
    other_subject = np.corrcoef(bold(COHORT, 0, 0).mean(0), bold(COHORT, 1, 0).mean(0))[0, 1]
    assert other_run > 0.999 > other_subject > 0.8


@pytest.mark.parametrize("shape", [(24, 24, 24), (30, 36, 28)])
def test_fluctuations_are_one_to_three_percent(shape):
    series = bold(dataclasses.replace(COHORT, shape=shape))
    percent = 100 * series.std(0) / series.mean(0)
    assert 1 < np.median(percent) < 2.5
    assert 0.7 < np.percentile(percent, 2) < np.percentile(percent, 95) < 4


def test_frames_resemble_the_frame_before():
    series = bold(COHORT)
    z = (series - series.mean(0)) / series.std(0)
    lag_one = (z[1:] * z[:-1]).mean(0)
    assert 0.2 < np.median(lag_one) < 0.7
    assert np.percentile(lag_one, 5) > 0


def test_neighbours_resemble_each_other_more_than_distant_voxels():
    mask = COHORT.brain_mask()
    z = np.zeros((COHORT.frames, *COHORT.shape))
    series = bold(COHORT)
    z[:, mask] = (series - series.mean(0)) / series.std(0)
    near, far = ((z[:, k:] * z[:, :-k]).mean(0)[mask[k:] & mask[:-k]].mean() for k in (1, 8))
    assert near > 0.4
    assert near > far + 0.2


def test_grey_white_and_fluid_differ_and_the_brain_is_never_dark():
    mean = bold(COHORT).mean(0)
    assert mean.min() > 200
    assert 0.1 < mean.std() / mean.mean() < 0.3


def test_heads_move_now_and_then():
    restless = Cohort(subjects=12, frames=200)
    steps = np.stack([np.abs(np.diff(restless.motion_mm(s, 0))).sum(0) for s in range(12)])
    assert 0.02 < np.median(steps) < 0.3
    assert 0.002 < (steps > 0.5).mean() < 0.1


def test_the_signal_drifts():
    slow = [np.fft.rfft(bold(Cohort(subjects=8), s).mean(1), norm="forward") for s in range(8)]
    power = np.mean(np.abs(slow) ** 2, axis=0)
    assert power[1] > 3 * power[10:].mean()


def test_nothing_is_outside_the_brain_of_a_masked_cohort():
    mask = COHORT.brain_mask()
    assert 0.2 < mask.mean() < 0.45
    assert all(not frame[~mask].any() and frame[mask].all() for frame in COHORT.run_frames(0, 0))


def test_an_unmasked_cohort_has_scalp_and_air_around_the_same_brain():
    whole = Cohort(shape=(48, 48, 48), masked=False, frames=4)
    frame = next(whole.run_frames(0, 0))
    mask = whole.brain_mask()
    outside = frame[~mask]
    assert (outside >= 0).all()
    assert np.median(outside) < 60
    assert np.percentile(outside, 90) > 200
    assert np.median(frame[mask]) > 900


def test_frames_are_fortran_ordered_arrays_of_their_own():
    for dtype in ("int16", "uint16", "int32", "float32", "float64"):
        cohort = Cohort(shape=(5, 6, 7), frames=3, dtype=dtype)
        frames = list(cohort.run_frames(0, 0))
        assert [frame.shape for frame in frames] == [(5, 6, 7)] * 3
        assert all(frame.flags.f_contiguous and frame.dtype == dtype for frame in frames)
        assert not np.shares_memory(frames[0], frames[1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (4, 4, 1), (3, 40, 3)])
@pytest.mark.parametrize("frames", [1, 2])
def test_degenerate_grids_and_runs_of_one_frame_work(shape, frames):
    cohort = Cohort(shape=shape, frames=frames, effect="order", strength=4)
    assert cohort.brain_mask().any()
    made = list(cohort.run_frames(0, 0))
    assert len(made) == frames
    assert all(np.isfinite(frame).all() for frame in made)


def test_memory_does_not_grow_with_the_length_of_a_run():
    def peak(frames):
        tracemalloc.start()
        for _ in Cohort(frames=frames).run_frames(0, 0):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # A frame takes 27,648 bytes; the time courses take a few hundred bytes a frame.
    assert peak(400) < peak(20) + 380 * 2_000


def test_small_cohorts_have_both_sexes_and_ages_in_range():
    people = Cohort(subjects=200).participants()
    assert all({a["sex"], b["sex"]} == {"F", "M"} for a, b in zip(people[::2], people[1::2], strict=True))
    assert sum(person["sex"] == "F" for person in people[::2]) not in range(30)
    ages = [person["age"] for person in people]
    assert 20 <= min(ages) < 25
    assert 75 < max(ages) <= 80


def test_a_dummy_is_noise_of_any_shape():
    cohort = Cohort(kind="dummy", shape=(9, 10, 11), frames=30, dtype="float32")
    noise = np.stack(list(cohort.run_frames(1, 0)))
    assert noise.shape == (30, 9, 10, 11)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert cohort.brain_mask().all()
    whole = np.stack(list(dataclasses.replace(cohort, dtype="int16").run_frames(1, 0)))
    np.testing.assert_allclose((whole - 10_000.0) / 1_000, noise, atol=6e-4)


def test_the_affine_centres_the_grid_in_the_template():
    cohort = Cohort(shape=(91, 109, 91), voxel_size_mm=2.0)
    centre = cohort.affine() @ [45, 54, 45, 1]
    np.testing.assert_allclose(centre, [0, -18, 18, 1])
    np.testing.assert_allclose(np.diag(cohort.affine()), [2, 2, 2, 1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"subjects": 0}, "subjects = 0"),
        ({"shape": (24, 0, 24)}, r"shape\[1\] = 0"),
        ({"shape": (24, 24)}, "three sizes"),
        ({"tr_s": 0.0}, "tr_s"),
        ({"voxel_size_mm": float("nan")}, "voxel_size_mm"),
        ({"seed": -1}, "seed"),
        ({"effect": "coupled"}, "one of none, coupling"),
        ({"effect": "coupling", "strength": 1.7}, "0 to 1.6"),
        ({"strength": float("nan")}, "strength"),
        ({"dtype": "complex64"}, "dtype"),
        ({"kind": "real"}, "bold, dummy"),
        ({"kind": "dummy", "effect": "order"}, "no effect order"),
    ],
)
def test_a_cohort_that_makes_no_sense_is_refused(wrong, words):
    with pytest.raises(UsageError, match=words):
        Cohort(**wrong)


def test_a_run_outside_the_cohort_is_refused():
    with pytest.raises(UsageError, match="counted from 0"):
        Cohort(subjects=2).run_frames(2, 0)
