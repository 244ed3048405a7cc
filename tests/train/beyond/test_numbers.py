"""Windows become subjects as in the evaluation of a run; where chances are averaged, they are those of the logits."""

import numpy as np
import pytest
from scipy.special import expit, softmax

from train.beyond.numbers import centre_of, subject_scores
from train.objectives import Objective

TWO = Objective(kind="classification", target="sex")
THREE = Objective(kind="classification", target="hand", classes=(0.0, 1.0, 2.0), names=("a", "b", "c"))
NUMBER = Objective(kind="regression", target="age")


@pytest.mark.parametrize(
    ("objective", "average", "made"),
    [
        (TWO, "logit", lambda x: x),
        (TWO, "sigmoid", expit),
        (THREE, "logit", lambda x: x),
        (THREE, "sigmoid", lambda x: softmax(x, axis=1)),
        (NUMBER, "sigmoid", lambda x: x),
    ],
)
def test_the_mean_is_over_runs_of_the_means_over_windows(objective, average, made):
    scores = 3 * np.random.default_rng(0).normal(size=(7, objective.outputs))
    runs, subjects = np.array([0, 0, 0, 1, 2, 2, 2]), np.array([4, 4, 4, 4, 2, 2, 2])
    places, found = subject_scores(scores, objective, runs=runs, subjects=subjects, average=average)
    rows = made(scores)
    assert places.tolist() == [2, 4]
    assert np.allclose(found[0], rows[4:].mean(0))
    assert np.allclose(found[1], (rows[:3].mean(0) + rows[3]) / 2)


def test_classes_are_as_likely_at_the_centre():
    assert (centre_of("logit"), centre_of("sigmoid")) == (0.0, expit(0.0))
