"""A trained network before data that need no label: its scores are those of its own evaluation, and nothing is fitted anew."""

import csv
import json

import numpy as np
import pytest

from fmristream.catalog.row_tables import read_rows
from train.main import main


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
    table, facts = read_rows(predicted / "predictions.parquet")
    assert table["window"].tolist() == list(range(6 * 5))
    assert table["start_frame"].tolist() == [0, 7, 14, 21, 28] * 6
    assert set(table["frames"].tolist()) == {8}
    assert set(table["split"]) == {"test"}
    (target,) = facts["predictions"]["targets"]
    assert (target["name"], target["classes"]) == ("sex", ["F", "M"])
    assert set(np.unique(table["truth_sex"])) == {0.0, 1.0}
