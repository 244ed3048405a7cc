"""Scores of real ranks against an oracle that knows nothing of ours: each window once, each number as scikit-learn has it."""

import json
import math
import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as oracle

from fmristream import convert
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from tests.ingest.nifti_files import nifti_bytes
from tests.train.scoring_ranks import DRAWS, OBJECTIVES, recipe_of, scored, write
from train.evaluate import NonFiniteError, ScoringError, _sorted_predictions
from train.launch import World
from train.objectives import Objective
from train.resampling import bootstrap
from train.summary import report_of

ROOT = Path(__file__).parents[2]
NO_SEX, NO_AGE = ("07", "16"), ("04", "11", "17")


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """18 subjects in families of two and alone, 1 to 2 sessions of 1 to 2 runs of 10 to 19 frames, some labels missing."""
    folder = tmp_path_factory.mktemp("families")
    rng, rows = np.random.default_rng(0), []
    (folder / "in").mkdir()
    for number in range(18):
        subject = f"{number:02d}"
        sex = "n/a" if subject in NO_SEX else "MF"[number % 2]
        age = "n/a" if subject in NO_AGE else 20 + number
        hand = ("left", "right", "both")[number % 3]
        rows.append(f"{subject},{sex},{age},{hand},{number // 2 if number < 12 else ''},{'AB'[number % 2]}")
        for session in range(1 + number % 2):
            for run in range(1 + (number + session) % 3 // 2):
                bold = 1000 + 100 * rng.normal(size=(6, 6, 6, 10 + 3 * ((number + run) % 4)))
                name = f"sub-{subject}_ses-{session}_task-rest_run-{run}_space-MNI152NLin6Asym_bold.nii"
                (folder / "in" / name).write_bytes(nifti_bytes(bold.astype("<i2")))
    (folder / "people.csv").write_text("\n".join(["participant_id,sex,age,hand,family,site", *rows]) + "\n")
    options = ConvertOptions(
        mask="none",
        split="exact",
        split_ratios=(0.2, 0.4, 0.4),
        phenotypes=Phenotypes(url=str(folder / "people.csv"), group_by="family"),
    )
    convert(str(folder / "in"), str(folder / "dataset"), options=options)
    return str(folder / "dataset")


@pytest.fixture(scope="session")
def alone(families, tmp_path_factory):
    """What one process leaves."""
    out = tmp_path_factory.mktemp("alone")
    write(scored(recipe_of(families), World()), out)
    return out


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def run_ranks(size, url, out):
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL"}
    command = [sys.executable, str(Path(__file__).with_name("scoring_ranks.py")), url, str(out)]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | quiet | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, said


def rows_of(out):
    return pq.read_table(out / "predictions.parquet").to_pylist()


def units(rows, truth, scores):
    """(family or subject, truth, means of scores) of each subject by label: by hand, from the rows of a split."""
    runs = defaultdict(list)
    for row in rows:
        if row[truth] is not None:
            runs[row["subject"], row["run"]].append(row)
    found = {}
    for subject in sorted({subject for subject, _ in runs}):
        of_subject = [windows for (label, _), windows in sorted(runs.items()) if label == subject]
        means = [np.mean([[row[name] for name in scores] for row in windows], axis=0) for windows in of_subject]
        first = of_subject[0][0]
        found[subject] = (first["family"] or f"alone {subject}", first[truth], np.mean(means, axis=0))
    clusters, truths, values = zip(*found.values(), strict=True)
    return list(found), np.array(clusters), np.array(truths), np.array(values)


def expected_of_classes(truth, told, scores):
    return {
        "auroc": oracle.roc_auc_score(truth, scores),
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, told),
        "accuracy": oracle.accuracy_score(truth, told),
        "f1": oracle.f1_score(truth, told, zero_division=math.nan),
    }


def expected_of_numbers(truth, predicted):
    squares = np.sum((truth - 30.0) ** 2)
    return {
        "mae": oracle.mean_absolute_error(truth, predicted),
        "mse": oracle.mean_squared_error(truth, predicted),
        "r": np.corrcoef(truth, predicted)[0, 1],
        "r2": 1 - len(truth) * oracle.mean_squared_error(truth, predicted) / squares,
    }


def require_equal(found, expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name


def oracle_intervals(expected, truth, clusters, *, stratify):
    """The same draws, each scored by itself."""
    drawn = []

    def keep(weights):
        drawn.extend(np.repeat(np.arange(len(truth)), row.astype(int)) for row in weights)
        return np.zeros(len(weights))

    bootstrap({"keep": keep}, truth=truth, draws=DRAWS, stratify=stratify, clusters=clusters)
    assert len(drawn) == DRAWS
    values = [expected(rows) for rows in drawn]
    return {name: np.nanquantile([one[name] for one in values], (0.025, 0.975)).tolist() for name in values[0]}


@pytest.mark.parametrize(
    "size", [1, pytest.param(2, marks=pytest.mark.full), 3, pytest.param(4, marks=pytest.mark.full)]
)
def test_ranks_give_the_numbers_of_an_oracle_that_reads_their_table(families, alone, tmp_path, size):
    out = alone
    if size > 1:
        out = tmp_path
        run_ranks(size, families, out)
        told = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(size)]
        assert {one["size"] for one in told} == {size}
        assert len({one["table"] for one in told}) == 1  # every rank has the whole table
    rows, report = rows_of(out), json.loads((out / "report.json").read_text())["targets"]
    for split in ("val", "test"):
        of_split = [row for row in rows if row["split"] == split]
        assert [row["window"] for row in of_split] == list(range(len(of_split)))
        _, clusters, truth, score = units(of_split, "truth_sex", ["score_sex"])
        cut = report["sex"]["threshold"]
        found = report["sex"][split]
        require_equal(found["metrics"], expected_of_classes(truth, score[:, 0] > cut, score[:, 0]))
        at_0 = expected_of_classes(truth, score[:, 0] > 0, score[:, 0])
        require_equal(
            found["metrics"], {f"{name}_at_0": at_0[name] for name in ("balanced_accuracy", "accuracy", "f1")}
        )
        assert found["confusion"] == oracle.confusion_matrix(truth, score[:, 0] > cut, labels=[0, 1]).tolist()
        bounds = oracle_intervals(
            lambda at, truth=truth, score=score, cut=cut: expected_of_classes(
                truth[at], score[at, 0] > cut, score[at, 0]
            ),
            truth,
            clusters,
            stratify=True,
        )
        require_equal(found["intervals"], bounds)

        _, clusters, truth, score = units(of_split, "truth_age", ["score_age"])
        found = report["age"][split]
        require_equal(found["metrics"], expected_of_numbers(truth, score[:, 0]))
        bounds = oracle_intervals(
            lambda at, truth=truth, score=score: expected_of_numbers(truth[at], score[at, 0]),
            truth,
            clusters,
            stratify=False,
        )
        require_equal(found["intervals"], bounds)

        names = [f"score_hand_{word}" for word in ("both", "left", "right")]
        _, _, truth, score = units(of_split, "truth_hand", names)
        chances = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
        told = score.argmax(axis=1)
        expected = {
            "auroc": oracle.roc_auc_score(truth, chances, multi_class="ovr"),
            "balanced_accuracy": oracle.balanced_accuracy_score(truth, told),
            "accuracy": oracle.accuracy_score(truth, told),
            "f1": oracle.f1_score(truth, told, average="macro"),
        }
        require_equal(report["hand"][split]["metrics"], expected)
    if size > 1:
        for ours, theirs in zip(rows, rows_of(alone), strict=True):
            assert {k: v for k, v in ours.items() if "score" not in k} == {
                k: v for k, v in theirs.items() if "score" not in k
            }
            for name in (k for k in ours if k.startswith("score")):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5)


def test_every_window_of_every_run_is_there_with_what_is_known_of_it(families, alone):
    import fmristream

    dataset = fmristream.open(families)
    rows = rows_of(alone)
    expected = []
    for split in ("val", "test"):
        for run in dataset.runs:
            if run.split == split:
                expected += [(split, run.name, start) for start in range(0, run.frames - 3, 3)]
    assert [(row["split"], row["run"], row["start_frame"]) for row in rows] == expected
    people = {str(row["subject"]): row for row in dataset.participants}
    assert {row["frames"] for row in rows} == {4}
    assert len({run.frames for run in dataset.runs}) > 2
    for row in rows:
        person = people[row["subject"]]
        assert row["site"] == person["site"]
        assert row["family"] == (None if person["family"] is None else str(int(person["family"])))
        assert row["truth_age"] == person["age"]
        assert row["truth_sex"] == (None if person["sex"] is None else float(person["sex"] == "M"))
        assert row["session"] in "01"
    assert any(row["truth_sex"] is None for row in rows)
    assert any(row["truth_age"] is None for row in rows)


def test_those_without_a_label_are_predicted_and_not_counted(alone):
    rows = rows_of(alone)
    report = json.loads((alone / "report.json").read_text())["targets"]
    for target, lacking in (("sex", NO_SEX), ("age", NO_AGE), ("hand", ())):
        for split in ("val", "test"):
            subjects = {row["subject"] for row in rows if row["split"] == split}
            counted = [one["subject"] for one in report[target][split]["subjects"]]
            assert counted == sorted(subjects - set(lacking))
            assert report[target][split]["num_subjects"] == len(counted)


def test_families_are_the_clusters_and_the_report_says_so(alone):
    found = json.loads((alone / "report.json").read_text())["targets"]["age"]["test"]["bootstrap"]
    rows = [row for row in rows_of(alone) if row["split"] == "test" and row["truth_age"] is not None]
    clusters = {row["family"] or row["subject"] + " alone" for row in rows}
    assert found["clusters"] == len(clusters) < len({row["subject"] for row in rows})
    assert "families" in found["says"]
    assert "the model is fixed" in found["says"]
    assert found["draws"] == DRAWS


def test_sigmoids_are_averaged_where_the_recipe_asks_for_it(families, alone):
    report = report_of(scored(recipe_of(families, average="sigmoid"), World()))["targets"]
    rows = [row for row in rows_of(alone) if row["split"] == "test"]
    sigmoids = [{**row, "score_sex": 1 / (1 + math.exp(-row["score_sex"]))} for row in rows]
    labels, _, truth, score = units(sigmoids, "truth_sex", ["score_sex"])
    found = report["sex"]["test"]
    assert report["sex"]["average"] == "sigmoid"
    assert [one["subject"] for one in found["subjects"]] == labels
    np.testing.assert_allclose([one["score"] for one in found["subjects"]], score[:, 0], rtol=1e-6)
    at_half = oracle.accuracy_score(truth, score[:, 0] > 0.5)
    assert found["metrics"]["accuracy_at_0"] == pytest.approx(at_half)
    assert 0 < report["sex"]["threshold"] < 1
    names = [f"score_hand_{word}" for word in ("both", "left", "right")]
    for row in rows:
        chances = np.exp([row[name] for name in names])
        row.update(zip(names, chances / chances.sum(), strict=True))
    _, _, truth, score = units(rows, "truth_hand", names)
    expected = oracle.roc_auc_score(truth, score, multi_class="ovr")
    assert report["hand"]["test"]["metrics"]["auroc"] == pytest.approx(expected, abs=1e-6)


def tensors(windows, score=0.0):
    import torch

    keys = torch.tensor([[window, 0, 0, 4] for window in windows])
    values = torch.full((len(windows), 2), 1.0)
    values[:, 1] = score
    return keys, values


@pytest.mark.parametrize("windows", [[0, 1, 1, 2], [0, 2, 3], [0, 1, 2]])
def test_a_window_that_is_missing_or_doubled_ends_the_evaluation(windows):
    with pytest.raises(ScoringError, match="expected 4 windows once each"):
        _sorted_predictions(*tensors(windows), targets=1, expected=4)


def test_rows_of_ranks_are_sorted_and_scores_that_are_not_finite_named_by_window():
    found = _sorted_predictions(*tensors([2, 0, 3, 1]), targets=1, expected=4)
    assert found.window.tolist() == [0, 1, 2, 3]
    with pytest.raises(NonFiniteError, match=r"4 of 4 windows are not finite, first windows \[0, 1, 2, 3\]"):
        _sorted_predictions(*tensors([2, 0, 3, 1], score=math.nan), targets=1, expected=4)


def test_a_class_that_training_lacks_is_refused(families):
    lacking = Objective(kind="classification", target="hand", classes=(0.0, 2.0, 3.0), names=("a", "b", "c"))
    with pytest.raises(UsageError, match="windows have a value that is none of the classes of training"):
        scored(recipe_of(families), World(), (*OBJECTIVES[:2], lacking))


def test_groups_are_families_unless_they_are_the_sites():
    from train.evaluate import _are_sites

    subjects = ["a", "b", "c", "d"]
    assert _are_sites(["A", "A", "B", "d"], subjects, ["A", "A", "B", None])
    assert not _are_sites(["1", "1", "2", "d"], subjects, ["1", "2", "2", "1"])
    assert not _are_sites(["1", "1", "2", "d"], subjects, [None] * 4)
    assert not _are_sites(subjects, subjects, ["A", "A", "B", "B"])
