"""Beside every supervised network stand baselines on its subjects; what ends that in the middle leaves the network's report."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.train.small import write_small
from train import beside, metrics
from train.baselines import CONNECTIVITY, NUISANCE
from train.baselines_paired import Difference, cluster_interval, paired_differences, sentence
from train.beside import compared, stand_beside
from train.config import load_recipe
from train.evaluate import Subjects
from train.files import read_json, write_json
from train.main import main
from train.report_view import targets_of


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    """A run of the command line with its baselines: (recipe's file, folder)."""
    folder = tmp_path_factory.mktemp("beside")
    write_small(folder, cohort, train={"checkpoint_every": 3, "eval_every": 3}, eval={"bootstrap_draws": 200})
    assert main([str(folder / "small.toml"), "--out", str(folder / "run")]) == 0
    return folder / "small.toml", folder / "run"


def without_beside(finished, out):
    """A copy of the run as it is before its baselines: what a kill would leave."""
    recipe, run = finished
    out.mkdir()
    for name in ("recipe.toml", "provenance.json", "leaks.json", "log.jsonl"):
        (out / name).write_bytes((run / name).read_bytes())
    report = read_json(run / "report.json")
    del report["beside"]
    write_json(out / "report.json", report)
    return load_recipe(str(recipe)), report


def test_each_difference_is_the_networks_number_minus_the_baselines(finished):
    _, out = finished
    report, kept = read_json(out / "report.json"), read_json(out / "baselines.json")
    found = report["beside"]
    assert (found["status"], found["reused"], found["draws"], found["drawn"]) == ("done", False, 200, "subjects")
    rows = found["targets"]["sex"]["baselines"]
    assert [row["name"] for row in rows] == [CONNECTIVITY, NUISANCE]
    network = {row["subject"]: row for row in report["test"]["subjects"]}
    for row, fitted in zip(rows, kept["baselines"], strict=True):
        differences = {one["metric"]: one for one in row["differences"]}
        truth = [network[one["subject"]]["truth"] for one in fitted["test"]["subjects"]]
        theirs = roc_auc_score(truth, [network[one["subject"]]["score"] for one in fitted["test"]["subjects"]])
        ours = roc_auc_score(truth, [one["score"] for one in fitted["test"]["subjects"]])
        assert differences["auroc"]["network"] == pytest.approx(theirs, abs=1e-12)
        assert differences["auroc"]["baseline"] == pytest.approx(ours, abs=1e-12)
        assert differences["auroc"]["difference"] == pytest.approx(theirs - ours, abs=1e-12)
        assert differences["balanced_accuracy"]["network"] == report["test"]["metrics"]["balanced_accuracy"]
        assert "subjects" not in row["test"]
    assert len(found["targets"]["sex"]["verdict"]) == 2


def test_a_rerun_takes_the_fitted_baselines_and_another_recipe_fits_again(finished):
    recipe, out = finished
    before = (out / "baselines.json").read_bytes()
    assert main([str(recipe), "--out", str(out)]) == 0
    assert read_json(out / "report.json")["beside"]["reused"]
    assert (out / "baselines.json").read_bytes() == before
    assert main([str(recipe), "--out", str(out), "--set", "data.stride=8"]) in (
        0,
        1,
    )  # another order is refused by resume
    other = load_recipe(str(recipe), ["eval.bootstrap_draws=150"])
    stand_beside(other, out=out)
    found = read_json(out / "report.json")["beside"]
    assert (found["reused"], found["draws"]) == (False, 150)


def test_a_damaged_file_of_baselines_is_fitted_again(finished, tmp_path):
    recipe, _ = without_beside(finished, tmp_path / "run")
    (tmp_path / "run" / "baselines.json").write_text('{"format": 1, "key')
    stand_beside(recipe, out=tmp_path / "run")
    assert read_json(tmp_path / "run" / "report.json")["beside"]["status"] == "done"


def test_a_kill_while_baselines_are_fitted_leaves_the_networks_report(finished, tmp_path):
    out = tmp_path / "run"
    _, report = without_beside(finished, out)
    command = [sys.executable, "-u", "-m", "train.beside", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout.readline().startswith("beside the net")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert read_json(out / "report.json") == report
    assert not (out / "baselines.json").exists()
    assert beside.main([str(out)]) == 0
    again = read_json(out / "report.json")
    assert again["beside"]["status"] == "done"
    assert {key: value for key, value in again.items() if key != "beside"} == report


def test_without_scikit_learn_the_report_says_so(finished, tmp_path, monkeypatch, capsys):
    recipe, report = without_beside(finished, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    stand_beside(recipe, out=tmp_path / "run")
    found = read_json(tmp_path / "run" / "report.json")
    assert found["beside"]["status"] == "not done"
    assert "scikit-learn" in found["beside"]["why"]
    assert found["test"] == report["test"]


def test_a_recipe_can_leave_them_out(finished, tmp_path):
    without_beside(finished, tmp_path / "run")
    stand_beside(load_recipe(str(finished[0]), ["eval.baselines=false"]), out=tmp_path / "run")
    assert read_json(tmp_path / "run" / "report.json")["beside"]["status"] == "left out"
    assert not (tmp_path / "run" / "baselines.json").exists()


def test_a_dataset_that_says_something_else_by_now_is_not_compared(finished, tmp_path):
    recipe, _ = without_beside(finished, tmp_path / "run")
    provenance = read_json(tmp_path / "run" / "provenance.json")
    provenance["data"]["content_digest"] = "0" * 64
    write_json(tmp_path / "run" / "provenance.json", provenance)
    stand_beside(recipe, out=tmp_path / "run")
    assert "train again" in read_json(tmp_path / "run" / "report.json")["beside"]["why"]


def part(truth, score):
    people = [
        {"subject": f"{row:03d}", "truth": float(t), "score": float(s)}
        for row, (t, s) in enumerate(zip(truth, score, strict=True))
    ]
    return {"num_subjects": len(people), "metrics": {}, "intervals": {}, "subjects": people}


def test_every_target_is_compared_and_sites_of_few_have_no_row():
    rng = np.random.default_rng(0)
    sex, age = (np.arange(60) % 2).astype(float), rng.uniform(20, 80, 60)
    network = {
        "targets": {
            "sex": {"objective": "classification", "threshold": 0.1, "test": part(sex, sex + rng.normal(size=60))},
            "age": {"objective": "regression", "test": part(age, age + rng.normal(size=60))},
        }
    }
    poor = {"baseline": CONNECTIVITY, "features": 3, "penalty": 1.0}
    document = {
        "baselines": [
            {
                **poor,
                "target": "sex",
                "objective": "classification",
                "threshold": 0.0,
                "test": part(sex, rng.normal(size=60)),
            },
            {**poor, "target": "age", "objective": "regression", "test": part(age, np.full(60, age.mean()))},
        ],
        "people": [
            {"subject": f"{row:03d}", "family": None, "site": "small" if row < 5 else "AB"[row % 2]}
            for row in range(60)
        ],
    }
    found = compared(targets_of(network), document, draws=300)
    assert list(found["targets"]) == ["sex", "age"]
    (row,) = found["targets"]["age"]["baselines"]
    mae = {one["metric"]: one for one in row["differences"]}["mae"]
    assert mae["says"] == "better"
    assert mae["interval"][1] < 0
    assert "the net is better than functional connectivity" in found["targets"]["age"]["verdict"][0]
    sites = found["targets"]["age"]["sites"]
    assert [(one["site"], one["subjects"]) for one in sites] == [("A", 27), ("B", 28), (None, 5)]
    of_a = [n for n in range(5, 60) if n % 2 == 0]
    told = [network["targets"]["age"]["test"]["subjects"][n] for n in of_a]
    assert sites[0]["subjects"] == len(of_a)
    expected = np.mean([abs(one["truth"] - one["score"]) for one in told])
    assert sites[0]["numbers"]["net"]["mae"] == pytest.approx(expected, abs=1e-12)


def test_intervals_of_differences_agree_with_an_independent_bootstrap():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=80)
    labels = tuple(map(str, range(80)))
    one = Subjects(label=labels, truth=truth, score=truth + rng.normal(size=80))
    other = Subjects(label=labels, truth=truth, score=truth + 1.5 * rng.normal(size=80))
    (mae, _) = paired_differences(one, other, kind="regression", draws=2000)
    gaps = np.abs(one.score - truth) - np.abs(other.score - truth)
    assert mae.difference == pytest.approx(gaps.mean(), abs=1e-12)
    draws = np.random.default_rng(99).integers(0, 80, size=(20_000, 80))
    expected = np.quantile(gaps[draws].mean(axis=1), (0.025, 0.975))
    np.testing.assert_allclose(mae.interval, expected, atol=0.15 * gaps.std() / np.sqrt(80))


def test_families_are_drawn_whole():
    rng = np.random.default_rng(2)
    shared = np.repeat(rng.normal(size=30), 4)  # what four siblings have in common
    truth = np.zeros(120)
    family = [f"f{row // 4}" for row in range(120)]
    low, high = cluster_interval(lambda t, s: float(s.mean()), truth, shared, clusters=family, draws=2000)
    draws = np.random.default_rng(5).integers(0, 30, size=(20_000, 30))
    expected = np.quantile(shared[::4][draws].mean(axis=1), (0.025, 0.975))
    spread = shared[::4].std() / np.sqrt(30)
    np.testing.assert_allclose((low, high), expected, atol=0.15 * spread)
    alone = metrics.bootstrap_interval(lambda t, s: float(s.mean()), truth, shared, draws=2000)
    assert high - low > 1.6 * (alone[1] - alone[0])
    labels = tuple(map(str, range(120)))
    one = Subjects(label=labels, truth=truth, score=shared)
    other = Subjects(label=labels, truth=truth, score=np.zeros(120))
    of = dict(zip(labels, family, strict=True))
    wide, narrow = (
        paired_differences(one, other, kind="regression", draws=500, family=known)[0] for known in (of, None)
    )
    assert np.ptp(wide.interval) > 1.4 * np.ptp(narrow.interval)


@pytest.mark.parametrize(
    ("metric", "difference", "interval", "drawn", "says", "words"),
    [
        ("auroc", 0.1, (0.02, 0.2), 10, "better", "is better than"),
        ("auroc", -0.1, (-0.2, -0.02), 40, "worse", "is worse than"),
        ("auroc", 0.01, (-0.06, 0.08), 40, "not told apart", "no proof that they are equal"),
        ("mae", -1.0, (-2.0, -0.1), 40, "better", "is better than"),
        ("mae", 1.0, (0.1, 2.0), 40, "worse", "is worse than"),
        ("r", 0.1, (float("nan"), float("nan")), 40, "unknown", "cannot be compared"),
        ("auroc", 0.0, (0.0, 0.0), 40, "not told apart", "not told apart"),
        ("mae", -1.0, (-2.0, -0.1), 9, "too few", "9 unrelated test subjects or families are too few"),
    ],
)
def test_a_verdict_says_no_more_than_its_interval(metric, difference, interval, drawn, says, words):
    found = Difference(
        metric=metric,
        network=0.5,
        baseline=0.5 - difference,
        difference=difference,
        interval=interval,
        drawn=drawn,
    )
    assert found.says == says
    assert words in sentence(found, target="sex", baseline="functional connectivity", subjects=40)


def test_a_document_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "one.json"
    write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": None}
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]
