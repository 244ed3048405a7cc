"""Readers are scikit-learn's on the same scaled features, tuned within the training subjects, and say what they cannot do."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from threadpoolctl import threadpool_limits

from fmristream.errors import UsageError
from train.baselines_fit import Features, fit_reader

PENALTIES = np.logspace(-2, 2, 5)


@pytest.fixture(autouse=True)
def one_thread():
    """Many small fits: threads would only wait for each other."""
    with threadpool_limits(1):
        yield


def features_of(values, group=None):
    labels = tuple(f"{row:04d}" for row in range(len(values)))
    return Features(subject=labels, group=labels if group is None else tuple(map(str, group)), values=values)


def drawn(rows, columns, classes=2, seed=0, telling=1):
    """Features of which the first `telling` tell each class, and the class."""
    rng = np.random.default_rng(seed)
    truth = np.arange(rows) % classes
    values = rng.normal(5.0, 3.0, (rows, columns))
    values[:, : telling * classes] += 4.0 * np.repeat(truth[:, None] == np.arange(classes), telling, axis=1)
    return values, truth.astype(np.float64)


def pipeline(model, columns):
    return make_pipeline(StandardScaler(), FunctionTransformer(lambda x: x / np.sqrt(columns)), model)


@pytest.mark.parametrize(("rows", "columns"), [(60, 8), (40, 300)], ids=["few features", "more features than subjects"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_is_scikit_learns_grid_search_over_whole_pipelines(rows, columns, classes):
    values, truth = drawn(rows, columns, classes)
    others, _ = drawn(17, columns, classes, seed=1)
    reader = fit_reader(features_of(values), truth, kind="classification", penalties=PENALTIES, folds=4, seed=3)
    search = GridSearchCV(
        pipeline(LogisticRegression(tol=1e-9, max_iter=10_000), columns),
        {"logisticregression__C": 1 / PENALTIES},
        scoring="neg_log_loss",
        cv=StratifiedGroupKFold(4, shuffle=True, random_state=3).split(values, truth, np.arange(rows)),
    ).fit(values, truth)
    assert reader.penalty == pytest.approx(1 / search.best_params_["logisticregression__C"])
    np.testing.assert_allclose(reader.scores(others), search.decision_function(others), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(reader.losses, -search.cv_results_["mean_test_score"], rtol=1e-3)
    assert reader.scores(others).shape == ((17,) if classes == 2 else (17, classes))


@pytest.mark.parametrize(("rows", "columns"), [(60, 8), (40, 300)])
def test_a_regression_is_scikit_learns_in_the_targets_own_unit(rows, columns):
    values, _ = drawn(rows, columns)
    truth = 40 + 3 * values[:, 0] + np.random.default_rng(2).normal(size=rows)
    others, _ = drawn(11, columns, seed=1)
    reader = fit_reader(features_of(values), truth, kind="regression", penalties=PENALTIES, folds=4)
    search = GridSearchCV(
        pipeline(Ridge(), columns),
        {"ridge__alpha": PENALTIES},
        scoring="neg_mean_squared_error",
        cv=GroupKFold(4).split(values, truth, np.arange(rows)),
    ).fit(values, truth)
    assert reader.penalty == pytest.approx(search.best_params_["ridge__alpha"])
    np.testing.assert_allclose(reader.scores(others), search.predict(others), rtol=1e-6)
    np.testing.assert_allclose(reader.losses, -search.cv_results_["mean_test_score"], rtol=1e-6)


def test_the_default_range_of_penalties_holds_the_best_one_for_ten_features_and_for_thousands():
    for columns, telling in ((10, 1), (3000, 4)):
        values, truth = drawn(60, columns, telling=telling)
        reader = fit_reader(features_of(values), truth, kind="classification")
        chosen = int(reader.losses.argmin())
        assert 0 < chosen < len(reader.losses) - 1
        assert reader.losses.min() < 0.95 * log_loss(truth, np.full(60, 0.5))


def test_families_are_not_divided_between_folds():
    """Pairs of twins with the same features and labels that mean nothing: only a divided pair could be told right."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(40, 500)), 2, axis=0)
    truth = np.repeat(rng.permutation(np.arange(40) % 2), 2).astype(np.float64)
    divided = fit_reader(features_of(values), truth, kind="classification", seed=1)
    together = fit_reader(features_of(values, group=np.arange(80) // 2), truth, kind="classification", seed=1)
    assert divided.losses.min() < 0.35
    assert together.losses.min() > 0.6


def test_nothing_is_learnt_from_subjects_without_a_target():
    values, truth = drawn(40, 6)
    odd = np.vstack([values, np.full((3, 6), 1e6)])
    with_odd = fit_reader(features_of(odd), np.append(truth, [np.nan] * 3), kind="classification")
    alone = fit_reader(features_of(values), truth, kind="classification")
    np.testing.assert_array_equal(with_odd.weights, alone.weights)
    np.testing.assert_array_equal(with_odd.centre, alone.centre)


def test_what_is_not_known_counts_as_the_training_mean_and_constants_as_nothing():
    values, truth = drawn(50, 5)
    values[:, 3], values[:, 4] = 0.1, np.nan
    values[::7, 0] = np.nan
    reader = fit_reader(features_of(values), truth, kind="classification")
    np.testing.assert_allclose(reader.centre[0], np.nanmean(values[:, 0]))
    assert reader.scale[3] == reader.scale[4] == 0
    row = values[1:2].copy()
    known, row[0, 0] = reader.scores(row), np.nan
    filled = row.copy()
    filled[0, 0] = reader.centre[0]
    np.testing.assert_allclose(reader.scores(row), reader.scores(filled))
    assert known != reader.scores(row)
    row[0, 3:] = 1e9
    np.testing.assert_allclose(reader.scores(row), reader.scores(filled))


def test_of_penalties_that_do_equally_well_the_largest_is_taken():
    values, truth = np.zeros((20, 3)), np.arange(20.0)
    reader = fit_reader(features_of(values), truth, kind="regression", penalties=PENALTIES)
    assert reader.penalty == PENALTIES[-1]
    np.testing.assert_allclose(reader.scores(values), truth.mean())


@pytest.mark.parametrize(
    ("truth", "group", "kind", "sentence"),
    [
        (np.zeros(6), None, "classification", "one class or value"),
        (np.full(6, np.nan), None, "regression", "one class or value"),
        (np.array([0, 0, 0, 0, 0, 1.0]), None, "classification", "2 groups"),
        (np.arange(6.0), np.zeros(6), "regression", "2 groups"),
    ],
)
def test_what_cannot_be_tuned_is_refused(truth, group, kind, sentence):
    values = np.random.default_rng(0).normal(size=(6, 2))
    with pytest.raises(UsageError, match=sentence):
        fit_reader(features_of(values, group=group), truth, kind=kind)


def test_two_rows_of_a_subject_are_refused():
    with pytest.raises(UsageError, match="one row"):
        Features(subject=("a", "a"), group=("a", "a"), values=np.zeros((2, 1)))
