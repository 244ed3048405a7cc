"""Metrics against scikit-learn, ties and degenerate cases included."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as oracle

from train import metrics

# Few distinct values, so that ties abound, and some wild ones.
scores = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-1e6, 1e6))


@st.composite
def labelled(draw, *, both=True):
    n = draw(st.integers(2, 40))
    truth = draw(arrays(np.float64, n, elements=st.sampled_from([0.0, 1.0])))
    if both:
        truth[0], truth[1] = 0.0, 1.0
    return truth, draw(arrays(np.float64, n, elements=scores))


@given(labelled())
def test_auroc_is_scikit_learns_with_ties(case):
    truth, score = case
    assert metrics.auroc(truth, score) == pytest.approx(oracle.roc_auc_score(truth, score), abs=1e-12)


@given(labelled())
def test_auroc_counts_pairs_and_ties_as_half(case):
    truth, score = case
    difference = score[truth == 1][:, None] - score[truth == 0][None]
    assert metrics.auroc(truth, score) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean(), abs=1e-12)


@given(labelled())
def test_auroc_does_not_change_under_a_monotone_map_and_flips_with_the_sign(case):
    truth, score = case
    ranked = np.unique(score, return_inverse=True)[1].astype(np.float64)
    assert metrics.auroc(truth, score) == metrics.auroc(truth, ranked)
    assert metrics.auroc(truth, score) == pytest.approx(1 - metrics.auroc(truth, -score), abs=1e-12)


@given(labelled(), st.floats(-2, 2))
def test_accuracies_are_scikit_learns(case, cut):
    truth, score = case
    told = (score > cut).astype(np.float64)
    assert metrics.accuracy(truth, told) == pytest.approx(oracle.accuracy_score(truth, told), abs=1e-12)
    assert metrics.balanced_accuracy(truth, told) == pytest.approx(
        oracle.balanced_accuracy_score(truth, told), abs=1e-12
    )


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_with_one_class_there_is_no_auroc_no_balanced_accuracy_and_no_threshold(label):
    truth, score = np.full(4, label), np.arange(4.0)
    assert math.isnan(metrics.auroc(truth, score))
    assert math.isnan(metrics.balanced_accuracy(truth, truth))
    assert metrics.youden_threshold(truth, score) == 0.0


@given(arrays(np.float64, st.integers(2, 30), elements=st.floats(-1e3, 1e3)), st.integers(0, 2**32 - 1))
def test_errors_are_scikit_learns_and_r_is_numpys(truth, seed):
    predicted = truth + np.random.default_rng(seed).normal(size=len(truth))
    assert metrics.mean_absolute_error(truth, predicted) == pytest.approx(oracle.mean_absolute_error(truth, predicted))
    assert metrics.mean_squared_error(truth, predicted) == pytest.approx(oracle.mean_squared_error(truth, predicted))
    if np.ptp(truth) > 1e-3:
        assert metrics.pearson_r(truth, predicted) == pytest.approx(np.corrcoef(truth, predicted)[0, 1], abs=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1e9 + 0.1])
def test_r_with_a_constant_side_is_nan(constant):
    varying = np.arange(7.0)
    assert math.isnan(metrics.pearson_r(varying, np.full(7, constant)))
    assert math.isnan(metrics.pearson_r(np.full(7, constant), varying))
    assert math.isnan(metrics.pearson_r(np.ones(1), np.ones(1)))


def test_r_survives_very_small_and_very_large_values():
    x = np.arange(5.0)
    assert metrics.pearson_r(x, x * 1e-200) == pytest.approx(1)
    assert metrics.pearson_r(x, -x * 1e200) == pytest.approx(-1)


def test_a_subject_is_the_mean_of_its_runs_however_long_they_are():
    values = np.array([1.0, 1.0, 1.0, 1.0, 5.0, 2.0])
    runs = np.array([4, 4, 4, 4, 7, 0])
    subjects = np.array([30, 30, 30, 30, 30, 10])
    labels, means = metrics.subject_means(values, runs=runs, subjects=subjects)
    assert labels.tolist() == [10, 30]
    assert means.tolist() == [2.0, 3.0]


@given(st.lists(st.tuples(st.integers(0, 5), scores), min_size=1, max_size=40), st.randoms())
def test_subject_means_do_not_depend_on_the_order_of_windows_beyond_rounding(windows, random):
    subject_of_run = np.array([0, 0, 1, 1, 2, 0])

    def means(rows):
        runs = np.array([run for run, _ in rows])
        return metrics.subject_means(np.array([value for _, value in rows]), runs=runs, subjects=subject_of_run[runs])

    labels, values = means(windows)
    for label, value in zip(labels, values, strict=True):
        by_run = {}
        for run, score in windows:
            if subject_of_run[run] == label:
                by_run.setdefault(run, []).append(score)
        assert value == pytest.approx(np.mean([np.mean(found) for found in by_run.values()]), rel=1e-9, abs=1e-6)
    shuffled = list(windows)
    random.shuffle(shuffled)
    np.testing.assert_allclose(means(shuffled)[1], values, rtol=1e-9, atol=1e-6)


@given(labelled())
def test_the_threshold_is_a_midpoint_that_no_other_cut_beats(case):
    truth, score = case
    cut = metrics.youden_threshold(truth, score)

    def gain(at):
        return metrics.balanced_accuracy(truth, (score > at).astype(np.float64))

    levels = np.unique(score)
    if len(levels) == 1:
        assert cut == 0.0
        return
    best = max(gain(level) for level in levels[:-1])
    assert gain(cut) == pytest.approx(best, abs=1e-9)
    assert levels[0] <= cut < levels[-1]


def test_equal_thresholds_fall_to_the_one_nearest_to_zero():
    truth = np.array([0.0, 1.0, 0.0, 1.0])
    assert metrics.youden_threshold(truth, np.array([-9.0, -7.0, 1.0, 2.0])) == 1.5
    neighbours = np.array([1.0, np.nextafter(1.0, 2.0)])
    assert metrics.youden_threshold(np.array([0.0, 1.0]), neighbours) == 1.0


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        truth = np.repeat([0.0, 1.0], 30)
        low, high = metrics.bootstrap_interval(metrics.auroc, truth, rng.normal(truth), draws=200, stratify=True)
        covered += low <= 0.7602 <= high  # Phi(1 / sqrt(2))
    assert 86 <= covered <= 100


def test_the_interval_is_the_same_every_time_and_keeps_both_classes():
    truth, score = np.array([1.0, 0, 0, 0, 0, 0]), np.array([2.0, 1, 0, 3, 1, 0])
    once = metrics.bootstrap_interval(metrics.auroc, truth, score, draws=2000, stratify=True)
    assert once == metrics.bootstrap_interval(metrics.auroc, truth, score, draws=2000, stratify=True)
    assert all(math.isfinite(bound) for bound in once)


def test_an_interval_of_nothing_known_is_nan():
    low, high = metrics.bootstrap_interval(metrics.pearson_r, np.ones(3), np.ones(3), draws=10)
    assert math.isnan(low)
    assert math.isnan(high)


def test_all_numbers_of_a_kind_come_with_draws_for_those_that_matter():
    truth, score = np.array([0.0, 0, 1, 1]), np.array([-2.0, 1, 0.5, 3])
    numbers = metrics.classification_metrics(truth, score, threshold=2.0)
    assert numbers == {
        "auroc": 0.75,
        "balanced_accuracy": 0.75,
        "accuracy": 0.75,
        "f1": pytest.approx(2 / 3),  # one of the two positives is told, and nobody else
        "balanced_accuracy_at_0": 0.75,
        "accuracy_at_0": 0.75,
        "f1_at_0": pytest.approx(4 / 5),  # both are, and one negative
    }
    assert set(metrics.classification_statistics(truth, score, threshold=2.0)) <= set(numbers)
    values = metrics.regression_metrics(score, score + 1, train_mean=0.0)
    # Squares about 0: 4 + 1 + 1/4 + 9; the errors are 1 each.
    assert values == {"mae": 1.0, "mse": 1.0, "r": pytest.approx(1), "r_squared": pytest.approx(1), "r2": 1 - 4 / 14.25}
    assert set(metrics.regression_statistics(score, score + 1, train_mean=0.0)) <= set(values)


@given(st.integers(2, 5), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_numbers_of_several_classes_are_scikit_learns(classes, n, seed):
    rng = np.random.default_rng(seed)
    truth, logits = rng.integers(0, classes, n).astype(float), rng.normal(size=(n, classes))
    told = logits.argmax(1)
    found = metrics.multiclass_metrics(truth, logits)
    recalls = oracle.recall_score(truth, told, labels=np.unique(truth), average="macro", zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recalls)
    assert found["f1"] == pytest.approx(oracle.f1_score(truth, told, average="macro"))
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(truth, told))
    counts = metrics.confusion(truth, told, classes=classes)
    assert counts == oracle.confusion_matrix(truth, told, labels=range(classes)).tolist()
    if classes > 2 and len(np.unique(truth)) == classes:
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        expected = oracle.roc_auc_score(truth, chances, multi_class="ovr", average="macro")
        assert found["auroc"] == pytest.approx(expected, abs=1e-12)


def test_classes_are_ranked_by_odds_that_do_not_saturate_as_softmax_does():
    logits = np.array([[0.0, 0, 0], [50, 0, 0], [60, 0, 0]])
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert chances[1, 0] == chances[2, 0] == 1
    assert np.diff(metrics.against_others(logits)[:, 0]).min() > 9
    np.testing.assert_allclose(1 / (1 + np.exp(-metrics.against_others(logits[:1]))), chances[:1])


@given(labelled(), st.floats(-2, 2))
def test_f1_is_scikit_learns_and_unknown_where_nobody_is_or_is_told_positive(case, cut):
    truth, score = case
    told = (score > cut).astype(np.float64)
    assert metrics.f1(truth, told) == pytest.approx(oracle.f1_score(truth, told), abs=1e-12)
    assert math.isnan(metrics.f1(np.zeros(3), np.zeros(3)))


@given(arrays(np.float64, st.integers(2, 30), elements=st.floats(-1e3, 1e3)), st.integers(0, 2**32 - 1))
def test_r2_is_scikit_learns_about_their_own_mean_and_what_it_says_about_another(truth, seed):
    predicted = truth + np.random.default_rng(seed).normal(size=len(truth))
    if np.ptp(truth) > 1e-3:
        own = metrics.r2_about(truth.mean(), truth, predicted)
        assert own == pytest.approx(oracle.r2_score(truth, predicted), rel=1e-9)
        elsewhere = metrics.r2_about(truth.mean() + 5, truth, predicted)
        gained = 1 - ((predicted - truth) ** 2).sum() / ((truth - truth.mean() - 5) ** 2).sum()
        assert elsewhere == pytest.approx(gained, rel=1e-9)
        assert elsewhere > own  # a worse guess to be compared with
    assert math.isnan(metrics.r2_about(3.0, np.full(4, 3.0), np.arange(4.0)))


def test_of_nobody_nothing_is_known_and_nothing_fails():
    none = np.zeros(0)
    numbers = [
        metrics.classification_metrics(none, none, threshold=0.0),
        metrics.multiclass_metrics(none, np.zeros((0, 3))),
        metrics.regression_metrics(none, none, train_mean=0.0),
    ]
    assert all(math.isnan(value) for found in numbers for value in found.values())


def test_the_threshold_of_sigmoids_falls_to_the_one_nearest_to_a_half():
    truth = np.array([0.0, 1.0, 0.0, 1.0])
    score = np.array([0.1, 0.3, 0.4, 0.8])
    assert metrics.youden_threshold(truth, score) == pytest.approx(0.2)
    assert metrics.youden_threshold(truth, score, centre=0.5) == pytest.approx(0.6)
    assert metrics.youden_threshold(np.ones(4), score, centre=0.5) == 0.5
