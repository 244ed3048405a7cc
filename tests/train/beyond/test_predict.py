"""A trained network before data that need no label: its scores are those of its own evaluation, and nothing is fitted anew."""

import csv
import json
import shutil

import numpy as np
import pytest

from fmristream.catalog.row_tables import read_rows
from tests.train.tables import table
from tools import score
from train.beyond.predict import subject_rows
from train.beyond.transfer import numbers_of
from train.files import json_text
from train.main import main
from train.predictions import read_predictions
from train.summary import report_of


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def predicted(trained_sex, cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "out"
    assert main(["--task", "predict", str(trained_sex), cohort, "--out", str(out), "--split", "test"]) == 0
    return out


def test_scores_of_the_test_subjects_are_exactly_those_of_the_evaluation(predicted, trained_sex):
    report = json.loads((trained_sex / "report.json").read_text())
    ours = {row["subject"]: float(row["score_sex"]) for row in rows_of(predicted / "subjects.csv")}
    assert ours == {row["subject"]: row["score"] for row in report["test"]["subjects"]}


def test_the_table_has_every_window_once_in_order_with_where_it_comes_from(predicted):
    found, facts = read_rows(predicted / "predictions.parquet")
    assert found["window"].tolist() == list(range(6 * 5))
    assert found["start_frame"].tolist() == [0, 7, 14, 21, 28] * 6
    assert set(found["frames"].tolist()) == {8}
    assert set(found["split"]) == {"test"}
    (target,) = facts["predictions"]["targets"]
    assert (target["name"], target["classes"]) == ("sex", ["F", "M"])
    assert set(np.unique(found["truth_sex"])) == {0.0, 1.0}


def test_the_table_is_scored_by_itself_to_the_numbers_of_the_runs_report(predicted, trained_sex, tmp_path):
    assert score.main([str(predicted), "--out", str(tmp_path / "report.json")]) == 0
    ours, run = (
        json.loads((tmp_path / "report.json").read_text()),
        json.loads((trained_sex / "report.json").read_text()),
    )
    assert ours["test"] == run["test"]
    assert (ours["threshold"], ours["step"]) == (run["threshold"], run["step"])
    assert "by the run that trained" in ours["threshold_chosen_on"]
    assert "val" not in ours


def test_a_report_that_was_made_again_with_sigmoids_gives_its_threshold_to_sigmoids(trained_sex, cohort, tmp_path):
    """The checkpoint still says logits."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained_sex, run)
    changes = ["--set", "eval.average=sigmoid", "--set", "eval.baselines=false"]
    assert main([str(run / "recipe.toml"), "--out", str(run), *changes]) == 0
    assert main(["--task", "predict", str(run), cohort, "--out", str(out), "--split", "test"]) == 0
    found = report_of(read_predictions(out / "predictions.parquet"))
    report = json.loads((run / "report.json").read_text())
    assert (found["average"], found["threshold"]) == ("sigmoid", report["threshold"])
    assert found["test"] == report["test"]


def test_of_all_the_data_of_training_every_row_says_its_split(trained_sex, cohort, tmp_path):
    assert main(["--task", "predict", str(trained_sex), cohort, "--out", str(tmp_path / "all")]) == 0
    rows = read_predictions(tmp_path / "all" / "predictions.parquet")
    assert set(rows.splits) == {"train", "val", "test"}
    found, run = report_of(rows), json.loads((trained_sex / "report.json").read_text())
    for split in ("val", "test"):
        assert json.loads(json_text(found[split])) == run[split]
    assert rows.numbers["window"].tolist() == list(range(len(rows)))


NAN = float("nan")
# split, subject, session, run, family, truth, score: two sessions of b, who is related to a; c is not labelled
ROWS = [
    ("all", "b", "1", "b1", "f", 1, 1.0),
    ("all", "b", "1", "b1", "f", 1, 2.0),
    ("all", "b", "2", "b2", "f", 1, -8.0),
    ("all", "a", "1", "a1", "f", 0, -1.0),
    ("all", "c", "1", "c1", None, NAN, 5.0),
    ("all", "d", "1", "d1", None, 0, 0.5),
]


def test_subjects_or_their_sessions_have_a_row_each_whether_labelled_or_not():
    rows = subject_rows(table(ROWS, thresholds={"sex": 1.0}))
    assert [(row["subject"], row["windows"], row["score_sex"]) for row in rows] == [
        ("a", 1, -1.0), ("b", 3, (1.5 - 8) / 2), ("c", 1, 5.0), ("d", 1, 0.5)
    ]  # fmt: skip
    assert [row["told_sex"] for row in rows] == ["F", "F", "M", "F"]
    assert [row["truth_sex"] for row in rows[:2]] == ["F", "M"]
    assert np.isnan(rows[2]["truth_sex"])
    assert rows[3]["probability_sex_M"] == pytest.approx(1 / (1 + np.exp(-0.5)))
    rows = subject_rows(table(ROWS, unit="session"))
    assert [(row["subject"], row["session"], row["score_sex"]) for row in rows] == [
        ("a", "1", -1.0), ("b", "1", 1.5), ("b", "2", -8.0), ("c", "1", 5.0), ("d", "1", 0.5)
    ]  # fmt: skip


def test_chances_that_are_averaged_are_told_as_they_are():
    (row, *_) = subject_rows(table(ROWS[:3], average="sigmoid"))
    chances = [1 / (1 + np.exp(-score)) for score in (1.0, 2.0, -8.0)]
    expected = ((chances[0] + chances[1]) / 2 + chances[2]) / 2
    assert row["score_sex"] == row["probability_sex_M"] == pytest.approx(expected)
    assert row["told_sex"] == "F"


def test_numbers_elsewhere_are_of_units_and_families_as_a_runs_own():
    found = numbers_of(table(ROWS, unit="session", thresholds={"sex": 1.0}), there={"sex": {}})["sex"]
    assert (found["unit"], found["threshold"], found["num_subjects"], found["num_units"]) == ("session", 1.0, 3, 4)
    assert found["bootstrap"]["clusters"] == 2
    assert found["metrics"]["balanced_accuracy"] == 0.75
    nobody = table([(*row[:5], NAN, row[6]) for row in ROWS])
    assert numbers_of(nobody, there={"sex": {}}) == {"sex": {"error": "no subject has a known value"}}
    assert numbers_of(nobody, there={}) == {"sex": {"error": "the data have no such column"}}
