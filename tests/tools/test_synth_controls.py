"""The controls see what they should, and say how sure they are."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fmristream.synth import Cohort
from tools.controls import (
    FEATURES,
    auroc_interval,
    cohort_features,
    controls,
    main,
    subject_features,
    train_subjects,
)


def rows_of(effect, strength):
    cohort = Cohort(subjects=72, frames=40, shape=(18, 18, 18), effect=effect, strength=strength, seed=3)
    sexes = [person["sex"] for person in cohort.participants()]
    train = train_subjects(sexes, test_share=0.4, seed=0)
    return {row.name: row for row in controls(cohort_features(cohort, block=4), sexes, train, 0)}


def test_connectivity_sees_coupling_and_still_images_do_not():
    rows = rows_of("coupling", 1.6)
    assert tuple(rows) == FEATURES
    assert rows["functional connectivity"].auroc > 0.9
    for name in ("mean image", "SD image"):
        assert rows[name].low < 0.5 < rows[name].high


def test_the_sd_image_sees_amplitude():
    rows = rows_of("amplitude", 2.0)
    assert rows["SD image"].auroc > 0.9
    assert rows["mean image"].low < 0.5 < rows["mean image"].high


def test_features_are_those_of_the_whole_run_at_once():
    rng = np.random.default_rng(0)
    run = rng.normal(100, 5, (30, 8, 9, 7)).astype(np.float32)
    mask = rng.random((8, 9, 7)) < 0.7
    mean, sd, connectivity = subject_features(iter(run), mask, 4)
    np.testing.assert_allclose(mean, run[:, mask].mean(0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(sd, run[:, mask].std(0, dtype=np.float64), rtol=1e-9)
    blocks = [
        run[:, x : x + 4, y : y + 4, z : z + 4][:, mask[x : x + 4, y : y + 4, z : z + 4]].mean(1, dtype=np.float64)
        for x in (0, 4)
        for y in (0, 4, 8)
        for z in (0, 4)
        if mask[x : x + 4, y : y + 4, z : z + 4].sum() >= 6.4
    ]
    expected = np.arctanh(np.corrcoef(blocks)[np.triu_indices(len(blocks), 1)])
    np.testing.assert_allclose(connectivity, expected, rtol=1e-7)


def test_auroc_is_scikit_learns_and_ties_count_half():
    rng = np.random.default_rng(1)
    positive = rng.random(60) < 0.4
    scores = np.round(rng.normal(positive, 1.0), 1)
    auroc, low, high = auroc_interval(scores, positive, seed=0)
    assert auroc == pytest.approx(roc_auc_score(positive, scores))
    assert low < auroc < high
    assert auroc_interval(scores, positive, seed=0) == (auroc, low, high)
    assert auroc_interval(np.zeros(60), positive, seed=0) == (0.5, 0.5, 0.5)
    assert auroc_interval(positive * 1.0, positive, seed=0) == (1, 1, 1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    positive = np.arange(48) < 24
    # Two unit normals 1 apart: AUROC = Φ(1 / √2).
    inside = [
        low < 0.7602 < high
        for _, low, high in (auroc_interval(rng.normal(positive, 1.0), positive, seed=k) for k in range(100))
    ]
    assert 0.88 < np.mean(inside) <= 1


def test_a_feature_that_never_varies_scores_one_half():
    sexes = np.array(["F", "M"] * 20)
    train = train_subjects(sexes, test_share=0.5, seed=0)
    (row,) = controls({"nothing": np.ones((40, 5))}, sexes, train, 0)
    assert (row.auroc, row.low, row.high) == (0.5, 0.5, 0.5)


def test_one_class_is_refused():
    sexes = ["F"] * 10 + ["M"] * 2
    train = np.arange(12) < 8
    with pytest.raises(ValueError, match="training subjects"):
        controls({"x": np.zeros((12, 3))}, sexes, train, 0)


def test_a_run_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="2 frames or more"):
        subject_features([np.ones((4, 4, 4))], np.ones((4, 4, 4), dtype=bool), 2)


def test_the_command_prints_a_table(capsys):
    main(["synth://?subjects=20&frames=20&shape=12x12x12&effect=coupling", "--block", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sex, 12 training and 8 held-out subjects"
    assert [line.split("  ")[0] for line in lines[2:]] == list(FEATURES)
