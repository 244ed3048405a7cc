"""Draws of a bootstrap: what they hold, and that a metric over all of them at once is the metric of each."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import metrics, resampling, weighted
from train.resampling import bootstrap, middle

CLASSES = ("accuracy", "balanced_accuracy", "f1", "mean_recall", "mean_f1")


def collected(truth, *, draws=40, stratify=True, clusters=None):
    """(draws, units) the weights themselves, and what is told of them."""
    seen = []

    def see(weights):
        seen.append(weights.copy())
        return np.zeros(len(weights))

    found = bootstrap({"seen": see}, truth=truth, draws=draws, stratify=stratify, clusters=clusters)
    return np.concatenate(seen), found


def each(metric, truth, scores, weights):
    """The oracle: the metric of every draw, written out."""
    rows = [np.repeat(np.arange(len(truth)), row.astype(int)) for row in weights]
    return np.array([metric(truth[row], scores[row]) for row in rows])


@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5]))
def test_numbers_of_all_draws_at_once_are_those_of_each(n, seed, levels):
    rng = np.random.default_rng(seed)
    truth, scores = rng.integers(0, 2, n).astype(float), rng.integers(-levels, levels, n) / 2
    weights, _ = collected(truth, stratify=False)
    np.testing.assert_allclose(
        weighted.auroc(truth, scores)(weights), each(metrics.auroc, truth, scores, weights), atol=1e-12
    )
    told = (scores > 0).astype(float)
    for name in CLASSES:
        found = getattr(weighted, name)(truth, told)(weights)
        np.testing.assert_allclose(found, each(getattr(metrics, name), truth, told, weights), atol=1e-12, err_msg=name)


@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-6, 1e8]))
def test_numbers_of_values_over_all_draws_are_those_of_each(n, seed, size):
    rng = np.random.default_rng(seed)
    truth = 40 + size * rng.normal(size=n).round(1)
    predicted = truth + size * rng.normal(size=n).round(1)
    weights, _ = collected(truth, stratify=False)
    pairs = {
        metrics.mean_absolute_error: weighted.mean_of(np.abs(predicted - truth)),
        metrics.mean_squared_error: weighted.mean_of((predicted - truth) ** 2),
        metrics.pearson_r: weighted.pearson_r(truth, predicted),
        lambda a, b: metrics.r2_about(37.0, a, b): weighted.r2_about(37.0, truth, predicted),
    }
    for metric, statistic in pairs.items():
        np.testing.assert_allclose(statistic(weights), each(metric, truth, predicted, weights), rtol=1e-9, atol=1e-7)


@given(st.integers(2, 4), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_one_class_against_the_others_over_all_draws_is_that_of_each(classes, n, seed):
    rng = np.random.default_rng(seed)
    truth, scores = rng.integers(0, classes, n).astype(float), rng.integers(0, 4, (n, classes)).astype(float)
    weights, _ = collected(truth, stratify=False)
    found = weighted.mean_auroc(truth, scores)(weights)
    np.testing.assert_allclose(found, each(metrics.mean_auroc, truth, scores, weights), atol=1e-12)


def test_each_draw_has_as_many_of_each_class_as_the_sample():
    truth = np.array([0.0, 1, 1, 0, 0, 2, 1])
    weights, found = collected(truth, draws=200)
    assert found.stratified
    assert (found.redrawn, found.clusters) == (0, 7)
    for value, count in ((0, 3), (1, 3), (2, 1)):
        assert (weights[:, truth == value].sum(axis=1) == count).all()
    assert len(np.unique(weights, axis=0)) > 50


def test_families_are_drawn_whole_and_as_many_as_there_are():
    families = np.array(["a", "b", "a", "c", "c", "c", "d"])
    weights, found = collected(np.arange(7.0), draws=300, stratify=False, clusters=families)
    assert found.clusters == 4
    assert not found.stratified
    for family in "abcd":
        members = weights[:, families == family]
        assert (members == members[:, :1]).all()
    first = [np.flatnonzero(families == family)[0] for family in "abcd"]
    assert (weights[:, first].sum(axis=1) == 4).all()


def test_where_families_are_of_both_classes_draws_of_one_class_are_drawn_again_and_counted():
    # Two families of one class each, and one of both: of three families drawn, (1/3)^3 twice have one class only.
    truth, families = np.array([0.0, 1, 0, 1]), np.array([0, 1, 2, 2])
    weights, found = collected(truth, draws=2000, clusters=families)
    assert not found.stratified
    assert ((weights @ (truth == 0) > 0) & (weights @ (truth == 1) > 0)).all()
    assert 90 < found.redrawn < 220  # 2000 x 2/27 = 148, of which again some
    values = bootstrap(
        {"auroc": weighted.auroc(truth, np.arange(4.0))}, truth=truth, draws=2000, stratify=True, clusters=families
    )
    assert np.isfinite(values.values["auroc"]).all()


def test_families_of_one_class_each_are_drawn_by_class():
    truth, families = np.array([0.0, 0, 1, 1, 1]), np.array([4, 4, 2, 2, 9])
    weights, found = collected(truth, draws=100, clusters=families)
    assert found.stratified
    assert (weights[:, 0] == 1).all()
    assert set((weights[:, 2] + weights[:, 4]).tolist()) == {2.0}


def test_an_interval_of_families_that_agree_is_wider_than_that_of_as_many_strangers():
    rng = np.random.default_rng(3)
    families = np.repeat(np.arange(15), 4)
    error = rng.normal(size=15)[families] ** 2
    alone = middle(bootstrap({"m": weighted.mean_of(error)}, truth=error, draws=800, stratify=False).values["m"])
    drawn = bootstrap({"m": weighted.mean_of(error)}, truth=error, draws=800, stratify=False, clusters=families)
    low, high = middle(drawn.values["m"])
    assert high - low > 1.5 * (alone[1] - alone[0])


@pytest.mark.parametrize("clusters", [None, np.array([0, 0, 1, 2, 3, 3, 1, 4, 5])])
def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch, clusters):
    truth = np.array([0.0, 1, 1, 0, 1, 0, 0, 1, 0])
    together, found = collected(truth, draws=333, clusters=clusters)
    monkeypatch.setattr(resampling, "_CHUNK_WEIGHTS", 70)
    apart, again = collected(truth, draws=333, clusters=clusters)
    np.testing.assert_array_equal(together, apart)
    assert found.redrawn == again.redrawn


def test_one_class_alone_is_drawn_without_end_being_waited_for():
    truth = np.ones(5)
    found = bootstrap(
        {"auroc": weighted.auroc(truth, np.arange(5.0))}, truth=truth, draws=50, stratify=True, clusters=np.zeros(5)
    )
    assert math.isnan(middle(found.values["auroc"])[0])
    nobody = bootstrap({"auroc": weighted.auroc(np.zeros(0), np.zeros(0))}, truth=np.zeros(0), draws=9, stratify=True)
    assert math.isnan(middle(nobody.values["auroc"])[1])


def test_a_metric_that_is_not_known_over_draws_gives_the_same_interval_one_by_one():
    rng = np.random.default_rng(1)
    truth, score = np.repeat([0.0, 1.0], 20), rng.normal(size=40)
    families = rng.integers(0, 25, 40)
    options = {"draws": 300, "stratify": True, "clusters": families}
    fast = metrics.bootstrap_interval(metrics.auroc, truth, score, **options)
    slow = metrics.bootstrap_interval(lambda a, b: metrics.auroc(a, b), truth, score, **options)
    assert fast == pytest.approx(slow, abs=1e-12)


def test_a_paired_interval_is_that_of_the_difference_on_the_same_draws():
    rng = np.random.default_rng(2)
    truth = np.repeat([0.0, 1.0], 25)
    a, b = truth + rng.normal(size=50), truth + rng.normal(size=50)
    families = rng.integers(0, 30, 50)
    found = metrics.paired_interval(metrics.auroc, truth, a, b, draws=400, stratify=True, clusters=families)
    weights, _ = collected(truth, draws=400, clusters=families)
    minus = each(metrics.auroc, truth, a, weights) - each(metrics.auroc, truth, b, weights)
    assert found == pytest.approx(tuple(np.quantile(minus, (0.025, 0.975))), abs=1e-12)
    assert metrics.paired_interval(metrics.auroc, truth, a, a, draws=50, stratify=True) == (0, 0)


@pytest.mark.parametrize(
    ("truth", "clusters", "stratify"),
    [
        ([0.0, 1, 1], [7, 7, 7], False),
        ([0.0, 1], [0, 1], True),
        ([3.0], None, False),
        ([0.0, 1, 0, 1], [0, 0, 0, 0], True),
    ],
)
def test_where_all_draws_are_the_sample_itself_there_is_no_interval(truth, clusters, stratify):
    truth = np.array(truth)
    clusters = None if clusters is None else np.array(clusters)
    low, high = metrics.bootstrap_interval(
        metrics.mean_absolute_error, truth, truth + 1, draws=20, stratify=stratify, clusters=clusters
    )
    assert math.isnan(low)
    assert math.isnan(high)
