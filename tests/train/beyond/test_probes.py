"""Probes: equal to scikit-learn by hand, beside chance, learnt from training subjects alone."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fmristream import open as open_dataset
from train.baselines_fit import Features
from train.beyond.probe_readers import NEIGHBOURS, Question, read
from train.beyond.probes import column_question, motion_question
from train.main import main


def parts_of(numbers, *, features=6, seed=0, signal=2.0):
    rng = np.random.default_rng(seed)
    parts, truth = {}, {}
    for name, count in numbers.items():
        labels = tuple(f"{name}-{place}" for place in range(count))
        classes = np.arange(count) % 2
        values = rng.normal(size=(count, features))
        values[:, 0] += signal * classes
        parts[name] = Features(subject=labels, group=labels, values=values)
        truth |= dict(zip(labels, classes.astype(float).tolist(), strict=True))
    return parts, truth


def test_a_linear_probe_is_the_logistic_regression_of_scikit_learn():
    parts, truth = parts_of({"train": 40, "val": 10, "test": 30})
    found = read(
        Question(name="x", kind="classification", truth=truth, classes=("a", "b")), parts, reader="linear", draws=20
    )
    scaler = StandardScaler().fit(parts["train"].values)
    rows = scaler.transform(parts["train"].values) / np.sqrt(6)
    wanted = np.array([truth[label] for label in parts["train"].subject])
    model = LogisticRegression(C=1 / found.setting, tol=1e-8, max_iter=10_000).fit(rows, wanted)
    expected = model.decision_function(scaler.transform(parts["test"].values) / np.sqrt(6))
    assert np.allclose(found.test.score, expected, atol=1e-4)
    assert found.numbers["auroc"] == pytest.approx(roc_auc_score(found.test.truth, expected), abs=1e-9)
    mean, low, high = found.chance["auroc"]
    assert low < 0.5 < high < found.numbers["auroc"]
    assert mean == pytest.approx(0.5, abs=0.02)


def test_a_linear_probe_of_numbers_is_the_ridge_of_scikit_learn():
    parts, _ = parts_of({"train": 40, "val": 10, "test": 30})
    truth = {
        label: float(30 + 4 * row[1])
        for part in parts.values()
        for label, row in zip(part.subject, part.values, strict=True)
    }
    found = read(Question(name="x", kind="regression", truth=truth), parts, reader="linear", draws=20)
    scaler = StandardScaler().fit(parts["train"].values)
    wanted = np.array([truth[label] for label in parts["train"].subject])
    rows = scaler.transform(parts["train"].values) / np.sqrt(6)
    model = Ridge(alpha=found.setting).fit(rows, (wanted - wanted.mean()) / wanted.std())
    expected = wanted.mean() + wanted.std() * model.predict(scaler.transform(parts["test"].values) / np.sqrt(6))
    assert np.allclose(found.test.score, expected)
    assert found.numbers["r"] > 0.99


def test_neighbours_are_those_of_scikit_learn_and_their_number_is_chosen_within_training():
    parts, truth = parts_of({"train": 40, "val": 10, "test": 30})
    found = read(
        Question(name="x", kind="classification", truth=truth, classes=("a", "b")), parts, reader="k-nn", draws=20
    )
    wanted = np.array([truth[label] for label in parts["train"].subject])
    values = parts["train"].values
    groups = np.unique(parts["train"].group, return_inverse=True)[1]
    losses = {}
    for count in [one for one in NEIGHBOURS if one <= 20]:
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
        losses[count] = 0.0
        for train, held in splitter.split(values, wanted, groups):
            model = make_pipeline(StandardScaler(), KNeighborsClassifier(count)).fit(values[train], wanted[train])
            shares = (model.predict_proba(values[held]) * count + 1) / (count + 2)
            losses[count] -= np.log(shares[np.arange(len(held)), wanted[held].astype(int)]).sum()
    assert found.setting == min(losses, key=losses.get)
    count = int(found.setting)
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(count)).fit(values, wanted)
    votes = model.predict_proba(parts["test"].values) * count
    assert np.allclose(found.test.score, np.log((votes[:, 1] + 1) / (votes[:, 0] + 1)))


def test_what_features_do_not_know_lies_within_chance():
    parts, truth = parts_of({"train": 60, "val": 20, "test": 60}, signal=0.0)
    question = Question(name="x", kind="classification", truth=truth, classes=("a", "b"))
    for reader in ("linear", "k-nn"):
        found = read(question, parts, reader=reader, draws=20)
        _, low, high = found.chance["auroc"]
        assert low <= found.numbers["auroc"] <= high


def test_columns_are_classes_or_numbers(parcelled):
    dataset = open_dataset(parcelled)
    hand, age = column_question(dataset, "hand"), column_question(dataset, "age")
    assert (hand.kind, hand.classes) == ("classification", ("both", "left", "right"))
    assert (age.kind, len(age.truth)) == ("regression", 12)
    assert motion_question(dataset) is None


def test_the_task_embeds_and_reads_targets(trained_sex, cohort, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--task", "probe", str(trained_sex), cohort, "--out", str(out), "--target", "sex", "--target", "age"]
    assert main(arguments) == 0
    document = json.loads((out / "probes.json").read_text())
    assert document["subjects"] == {"train": 10, "val": 4, "test": 6}
    assert [row["target"] for row in document["probes"]][:2] == ["sex", "age"]
    for row in document["probes"]:
        for reader in row["readers"].values():
            assert "refused" in reader or reader["test"] == 6
    assert "| sex | linear | 10 | 6 | auroc |" in (out / "probes.md").read_text()
    assert (out / "embeddings" / "subjects.parquet").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    other = ["--task", "probe", str(trained_sex), cohort, "--out", str(tmp_path / "other"), "--target", "height"]
    assert main(other) == 2
    assert "no such column" in capsys.readouterr().err
