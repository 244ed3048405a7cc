"""Scored elsewhere: classes agree by their words, what cannot be scored is said, and the run's own report stands."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from fmristream.catalog.row_tables import read_rows
from train.main import main


@pytest.fixture(scope="module")
def elsewhere(parcelled, convert_hands, train_small):
    """(run trained on the words both, left, right; data of left and right; data with a word that it does not know)."""
    two, strange = convert_hands(("right", "left")), convert_hands(("left", "none", "right"))
    urls = f"urls = {json.dumps([two, strange, parcelled, two + '-gone'])}"
    run = train_small(parcelled, data='target = "hand"', more=urls)
    return run, two, strange


def test_classes_agree_by_word_and_numbers_are_those_of_the_table(elsewhere):
    run, two, _ = elsewhere
    entry = json.loads((run / "report.json").read_text())["transfer"][0]
    assert entry["url"] == two
    table, facts = read_rows(run / "transfer" / "0" / "predictions.parquet")
    assert facts["predictions"]["targets"][0]["classes"] == ["both", "left", "right"]
    names = [f"score_hand_{name}" for name in ("both", "left", "right")]
    logits = np.stack([table[name] for name in names], axis=1)
    subjects = np.array(table["subject"])
    labels = sorted(set(subjects))
    told = [logits[subjects == label].mean(0).argmax() for label in labels]
    truth = [table["truth_hand"][subjects == label][0] for label in labels]
    # In their own dataset left is 0 and right is 1; the network learnt 1 and 2.
    assert sorted(set(truth)) == [1.0, 2.0]
    found = entry["targets"]["hand"]
    assert (found["unit"], found["num_subjects"], found["bootstrap"]["clusters"]) == ("subject", 6, 6)
    # Both cohorts count their subjects from 0: the same label of two datasets says little, and is said.
    assert "3 subjects are called like training subjects" in entry["notes"][-1]
    assert found["metrics"]["accuracy"] == pytest.approx(accuracy_score(truth, told), abs=1e-12)
    expected = (
        balanced_accuracy_score(truth, told) if set(told) <= set(truth) else found["metrics"]["balanced_accuracy"]
    )
    assert found["metrics"]["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_scored_is_said_and_costs_nothing_else(elsewhere):
    run, *_ = elsewhere
    report = json.loads((run / "report.json").read_text())
    _, strange, own, gone = report["transfer"]
    assert "none; it knows both, left, right" in strange["error"]
    assert "were trained on" in own["error"]
    assert "error" in gone
    assert report["test"]["num_subjects"] == 3
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    early = next(place for place, entry in enumerate(log) if entry["event"] == "eval.urls")
    assert list(log[early]) == ["event", gone["url"]]
    assert early < next(place for place, entry in enumerate(log) if entry["event"] == "step")
    assert sorted(path.name for path in (run / "transfer").iterdir()) == ["0"]


def test_data_without_the_target_are_predicted_all_the_same(elsewhere, cohort, tmp_path):
    run, *_ = elsewhere
    out = tmp_path / "out"
    assert main(["--task", "predict", str(run), cohort, "--out", str(out), "--where", "split == 'val'"]) == 0
    with open(out / "subjects.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert not any(name.startswith("truth") for name in rows[0])
    for row in rows:
        chances = [float(row[f"probability_hand_{name}"]) for name in ("both", "left", "right")]
        assert sum(chances) == pytest.approx(1)
        assert row["told_hand"] == ("both", "left", "right")[int(np.argmax(chances))]


def test_results_are_never_written_over(elsewhere, cohort, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert main(["--task", "predict", str(elsewhere[0]), cohort, "--out", str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_data_on_another_grid_are_refused_and_nothing_is_left(elsewhere, convert_hands, tmp_path, capsys):
    other = convert_hands(("left", "right"), url="synth://?subjects=2&shape=10x12x12&frames=16&seed=9")
    assert main(["--task", "predict", str(elsewhere[0]), other, "--out", str(tmp_path / "out")]) == 1
    assert "a grid of 10 x 12 x 12, the network was trained on 12 x 12 x 12" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
