"""A trained network before data that need no label: its scores are those of its own evaluation, and nothing is fitted anew."""

import csv
import json
from contextlib import ExitStack

import numpy as np
import pytest

from fmristream import convert
from fmristream.catalog.row_tables import read_rows
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from fmristream.synth.cohort import parse_url
from train.beyond.opened import open_for
from train.beyond.predict import run_columns, score_windows, scored_subjects, window_columns
from train.beyond.trained import load_trained
from train.launch import World
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
    assert facts["class_names"] == {"sex": ["F", "M"]}
    assert set(np.unique(table["truth_sex"])) == {0.0, 1.0}


def test_families_are_those_that_a_run_of_its_own_would_draw(trained_sex, tmp_path):
    cohort = parse_url("synth://?subjects=6&shape=12x12x12&frames=16&seed=9")
    rows = [
        f"{row['subject']},{row['sex']},{'' if n > 3 else f'f{n // 2}'}" for n, row in enumerate(cohort.participants())
    ]
    (tmp_path / "people.csv").write_text("\n".join(["participant_id,sex,family", *rows]) + "\n")
    options = ConvertOptions(split="none", phenotypes=Phenotypes(url=str(tmp_path / "people.csv")))
    convert(cohort.url(), str(tmp_path / "data"), options=options)
    trained = load_trained(str(trained_sex))
    with ExitStack() as stack:
        opened = open_for(trained, str(tmp_path / "data"), world=World(), stack=stack)
        found = scored_subjects(opened, score_windows(opened), trained.objectives[0])
        columns = window_columns(opened, np.arange(2), np.array([0, 5]), run_columns(opened))
    assert [one.split(" ")[0] for one in found.cluster] == ["family"] * 4 + ["subject"] * 2
    assert len(set(found.cluster)) == 4
    assert columns["family"] == ["f0", None]
