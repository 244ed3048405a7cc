"""What is scored: the mean of runs, however long, of subjects or of their sessions, with those who belong together."""

import numpy as np
import pytest

from fmristream.errors import UsageError
from tests.train.tables import table, target
from train.units import codes, unit_of, units_of, window_scores

NAN = float("nan")
# split, subject, session, run, family, truth, score
ROWS = [
    ("test", "b", "1", "b1", "f", 1, 1.0),
    ("test", "b", "1", "b1", "f", 1, 2.0),
    ("test", "b", "1", "b1", "f", 1, 3.0),
    ("test", "b", "2", "b2", "f", 1, 8.0),
    ("test", "a", "1", "a1", "f", 0, -1.0),
    ("test", "c", "1", "c1", None, NAN, 5.0),
    ("test", "d", "1", "d1", None, 0, 0.5),
]
VARYING = [(*row[:5], float(row[2] == "2"), row[6]) for row in ROWS]


def test_runs_count_alike_however_long_and_the_unlabelled_are_left_out():
    found = units_of(table(ROWS), target(), unit="subject")
    assert found.label == ("a", "b", "d")
    assert found.truth.tolist() == [0, 1, 0]
    assert found.score.tolist() == [-1, 5, 0.5]  # b: runs of mean 2 and 8
    assert found.cluster == ("family f", "family f", "subject d")
    assert found.clusters.tolist() == [0, 0, 1]
    assert found.session == ()


def test_sessions_are_the_unit_where_the_label_varies_between_them():
    assert unit_of(table(ROWS), target()) == "subject"
    assert unit_of(table(VARYING), target()) == "session"
    found = units_of(table(VARYING), target(), unit="session")
    assert list(zip(found.label, found.session, found.truth, found.score, strict=True)) == [
        ("a", "1", 0, -1),
        ("b", "1", 0, 2),
        ("b", "2", 1, 8),
        ("c", "1", 0, 5),
        ("d", "1", 0, 0.5),
    ]
    assert found.num_subjects == 4
    assert found.cluster == ("family f", "family f", "family f", "subject c", "subject d")


def test_the_recipe_decides_where_it_says_so():
    assert unit_of(table(ROWS, unit="session"), target()) == "session"
    asked = table(VARYING, unit="subject")
    assert unit_of(asked, target()) == "subject"
    with pytest.raises(UsageError, match=r"sex: subject b has no single value of it; set eval\.unit"):
        units_of(asked, target(), unit="subject")


def test_a_label_that_varies_within_a_session_is_refused():
    rows = [*ROWS[:2], (*ROWS[2][:5], 0, 3.0)]
    with pytest.raises(UsageError, match="session b 1 has no single value"):
        units_of(table(rows), target(), unit=unit_of(table(rows), target()))


def test_subjects_of_their_own_are_no_clusters_but_sessions_of_one_are():
    rows = [(*row[:4], None, *row[5:]) for row in ROWS]
    assert units_of(table(rows), target(), unit="subject").clusters is None
    sessions = units_of(table(rows), target(), unit="session")
    assert sessions.cluster == ("subject a", "subject b", "subject b", "subject d")


def test_nobody_with_a_label_is_nobody():
    rows = [(*row[:5], NAN, row[6]) for row in ROWS]
    found = units_of(table(rows), target(), unit=unit_of(table(rows), target()))
    assert (found.label, found.truth.tolist(), found.score.tolist()) == ((), [], [])


def test_averages_of_sigmoids_and_softmaxes_are_those_written_out():
    logits = np.array([[0.0], [2.0], [-800.0], [800.0], [-40.0]])
    chances = window_scores(logits, target(), "sigmoid")[:, 0]
    np.testing.assert_allclose(chances, [0.5, 1 / (1 + np.exp(-2)), 0, 1, np.exp(-40)], rtol=1e-12)
    three = np.array([[1.0, 2, 3], [900, 0, -900]])
    of_three = window_scores(three, target("hand", ("a", "b", "c")), "sigmoid")
    np.testing.assert_allclose(of_three[0], np.exp(three[0]) / np.exp(three[0]).sum())
    np.testing.assert_allclose(of_three[1], [1, 0, 0])
    assert window_scores(logits, target(), "logit") is logits
    assert window_scores(logits, target("age", ()), "sigmoid") is logits


def test_labels_are_numbered_in_sorted_order():
    assert codes(["b", "a", "b"]) == (["a", "b"], pytest.approx([1, 0, 1]))
