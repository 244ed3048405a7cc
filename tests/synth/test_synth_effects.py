"""What sex and age do to the time courses is what the cohort says."""

import numpy as np
import pytest

from fmristream.synth import Cohort
from fmristream.synth.anatomy import grid_coordinates, network_maps
from fmristream.synth.courses import Effect, Timing, run_courses

TIMING = Timing(frames=3_000, tr_s=2.0)


def networks(kind, strength, *, sex=0.0, age=0.0, subject=0):
    effect = Effect(kind=kind, strength=strength, sex=sex, age=age)
    parts = {"seed": 0, "subject": subject, "run": 0, "num_backgrounds": 2, "restlessness": 1.0}
    return run_courses(TIMING, effect, **parts).networks.astype(np.float64)


def correlation(first, second):
    return np.corrcoef(first, second)[0, 1]


@pytest.mark.parametrize(("strength", "male", "female"), [(1.6, 1.0, -0.6), (1.2, 0.8, -0.4), (0.0, 0.2, 0.2)])
def test_coupling_is_two_tenths_plus_or_minus_half_the_strength(strength, male, female):
    for sex, planted in ((1.0, male), (-1.0, female)):
        first, second = networks("coupling", strength, sex=sex)[:2]
        assert correlation(first, second) == pytest.approx(planted, abs=0.08)


def test_age_changes_the_coupling_of_another_pair_by_degrees():
    measured = [correlation(*networks("coupling", 1.6, age=age)[2:4]) for age in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    np.testing.assert_allclose(measured, [-0.6, -0.2, 0.2, 0.6, 1.0], atol=0.08)


def test_coupling_order_and_states_change_neither_mean_nor_spread():
    for kind in ("coupling", "order", "states", "none"):
        for sex in (-1.0, 1.0):
            courses = networks(kind, 1.6, sex=sex, age=sex)
            np.testing.assert_allclose(courses.mean(1), 0, atol=1e-4)
            np.testing.assert_allclose(courses.std(1), 1, atol=1e-4)


def test_amplitude_is_the_relative_spread_of_the_first_network():
    for sex, planted in ((1.0, 2.5), (0.0, 1.75), (-1.0, 1.0)):
        spread = networks("amplitude", 1.5, sex=sex, age=-sex).std(1)
        np.testing.assert_allclose(spread[:2], [planted, 1], atol=1e-3)
        np.testing.assert_allclose(spread[2:4], [3.5 - planted, 1], atol=1e-3)


@pytest.mark.parametrize(("sex", "lag"), [(1.0, 3), (-1.0, -3)])
def test_the_first_network_leads_or_lags_by_the_strength(sex, lag):
    first, second = networks("order", 3.0, sex=sex)[:2]
    lags = range(-6, 7)
    found = [correlation(first[10:-10], second[10 + k : len(second) - 10 + k]) for k in lags]
    assert lags[int(np.argmax(found))] == lag
    assert max(found) > 0.99


def test_order_does_not_show_at_lag_zero():
    leads, lags = ([correlation(*networks("order", 3.0, sex=sex, subject=s)[:2]) for s in range(4)] for sex in (-1, 1))
    np.testing.assert_allclose(leads, lags, atol=0.02)


@pytest.mark.parametrize(("strength", "sex", "sign"), [(2.0, 1.0, 1), (2.0, -1.0, -1), (1.0, 1.0, 1), (0.0, 1.0, 0)])
def test_states_follow_each_other_one_way_round_or_the_other(strength, sex, sign):
    first, second = networks("states", strength, sex=sex)[:2]
    # The second network is active 6 to 10 s, 3 to 5 frames, after the first, or before it.
    after, before = correlation(first[:-4], second[4:]), correlation(first[4:], second[:-4])
    # 1.3 is what 3,000 frames of states that never turn round give.
    assert after - before == pytest.approx(sign * strength / 2 * 1.3, abs=0.12)


def test_states_show_neither_at_lag_zero_nor_in_how_long_each_network_is_active():
    pairs = {sex: [networks("states", 2.0, sex=sex, subject=s)[:2] for s in range(6)] for sex in (-1.0, 1.0)}
    coupling = {sex: [correlation(*pair) for pair in found] for sex, found in pairs.items()}
    np.testing.assert_allclose(coupling[-1.0], coupling[1.0], atol=0.05)
    active = {sex: [(pair > 0.5).mean(1) for pair in found] for sex, found in pairs.items()}
    np.testing.assert_allclose(active[-1.0], active[1.0], atol=0.04)


def test_one_extreme_of_the_states_is_the_other_reversed_in_time():
    forward, backward = (
        np.stack([networks("states", 2.0, sex=sex, subject=s)[:2] for s in range(6)]) for sex in (1.0, -1.0)
    )

    def lagged(pairs, lag):
        return np.mean([correlation(first[: len(first) - lag], second[lag:]) for first, second in pairs])

    for lag in range(1, 13):
        assert lagged(forward, lag) == pytest.approx(lagged(backward[:, :, ::-1], lag), abs=0.05)


def test_no_voxel_is_in_two_networks_and_each_has_its_share():
    maps = network_maps(grid_coordinates((24, 24, 24)))
    assert ((maps > 0).sum(0) <= 1).all()
    brain = Cohort().brain_mask().T
    shares = (maps[:, brain] > 0.5).mean(1)
    assert (shares[:2] > 0.15).all()
    assert (shares > 0.05).all()


@pytest.mark.parametrize("effect", ["coupling", "amplitude"])
def test_the_effect_arrives_in_the_voxels(effect):
    cohort = Cohort(subjects=6, frames=120, effect=effect)
    mask = cohort.brain_mask()
    maps = network_maps(grid_coordinates(cohort.shape)).transpose(0, 3, 2, 1)[:, mask] > 0.8
    for subject, person in enumerate(cohort.participants()):
        series = np.stack([frame[mask] for frame in cohort.run_frames(subject, 0)]).astype(float)
        first, second = ((series[:, where] / series[:, where].mean(0)).mean(1) for where in maps[:2])
        is_male = person["sex"] == "M"
        if effect == "coupling":
            # Breathing, drift and motion are common to both networks.
            assert correlation(first, second) > 0.7 if is_male else correlation(first, second) < 0.4
        else:
            assert (first.std() > 1.5 * second.std()) == is_male


def test_still_images_of_coupled_and_uncoupled_subjects_are_alike():
    strong, weak = (Cohort(subjects=2, frames=120, effect="coupling", strength=s) for s in (1.6, 0.0))
    mask = strong.brain_mask()
    for subject in range(2):
        with_effect, without = (
            np.stack([frame[mask] for frame in cohort.run_frames(subject, 0)]).astype(float)
            for cohort in (strong, weak)
        )
        np.testing.assert_allclose(with_effect.mean(0), without.mean(0), rtol=1e-3)
        ratio = with_effect.std(0) / without.std(0)
        assert abs(np.log(ratio).mean()) < 0.01
