"""Baselines see the network's subjects by its split, are scored by its metrics, and are compared with it in pairs."""

import dataclasses
import json
from contextlib import ExitStack

import numpy as np
import pytest

from fmristream import convert
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from fmristream.synth.cohort import parse_url
from tests.train.small import small_tables
from train import metrics
from train.baselines import (
    CONNECTIVITY,
    NUISANCE,
    beside_network,
    fit_baseline,
    main,
    paired_differences,
    recipe_baselines,
    summary,
)
from train.baselines_fit import Features
from train.baselines_paired import clusters
from train.config import recipe_from
from train.data import open_part
from train.evaluate import Subjects, words_of_runs
from train.launch import World
from train.loop import train
from train.report import write_report


@pytest.fixture(scope="module")
def recipe(cohort):
    return recipe_from(small_tables(cohort, train={"steps": 2}))


@pytest.fixture(scope="module")
def network(recipe, tmp_path_factory):
    """A finished run of the trainer."""
    out = tmp_path_factory.mktemp("network")
    outcome = train(recipe, out=out, world=World())
    write_report(outcome, recipe, out=out)
    return out, outcome


@pytest.fixture(scope="module")
def found(recipe):
    return recipe_baselines(recipe, block=4)


def test_baselines_score_the_networks_subjects_against_its_truths(found, network):
    assert [baseline.name for baseline in found] == [CONNECTIVITY, NUISANCE]
    _, outcome = network
    for baseline in found:
        assert set(baseline.parts) == {"train", "val", "test"}
        for part in ("val", "test"):
            theirs = getattr(outcome, part)
            assert baseline.parts[part].label == theirs.label
            np.testing.assert_array_equal(baseline.parts[part].truth, theirs.truth)
            assert np.isfinite(baseline.parts[part].score).all()


def test_connectivity_reads_a_planted_coupling_and_the_scan_does_not(found):
    connectivity, nuisance = (metrics.auroc(b.parts["test"].truth, b.parts["test"].score) for b in found)
    assert connectivity > 0.85
    assert nuisance < connectivity


def test_the_command_writes_what_a_networks_report_has_and_the_paired_difference(recipe, network, tmp_path, capsys):
    out, _ = network
    arguments = [str(out / "recipe.toml"), "--out", str(tmp_path), "--beside", str(out), "--block", "4"]
    assert main(arguments) == 0
    written = json.loads((tmp_path / "baselines.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert [one["baseline"] for one in written] == [CONNECTIVITY, NUISANCE]
    for one in written:
        assert set(one["test"]) == set(report["test"])
        assert set(one["test"]["metrics"]) == set(report["test"]["metrics"])
        rows = {row["metric"]: row for row in one["network_minus_baseline"]}
        assert rows["auroc"]["network"] == report["test"]["metrics"]["auroc"]
        assert rows["auroc"]["baseline"] == one["test"]["metrics"]["auroc"]
        assert rows["balanced_accuracy"]["network"] == report["test"]["metrics"]["balanced_accuracy"]
    assert "network minus baseline, auroc" in capsys.readouterr().out


def test_numbers_are_read_in_their_own_unit(recipe):
    changes = {"data": {"target": "age"}, "objective": {"kind": "regression"}}
    changed = dataclasses.replace(
        recipe,
        **{section: dataclasses.replace(getattr(recipe, section), **values) for section, values in changes.items()},
    )
    for baseline in recipe_baselines(changed, block=4):
        assert (baseline.parts["train"].truth > 10).all()
        assert abs(baseline.parts["test"].score.mean() - baseline.parts["train"].truth.mean()) < 25
        assert set(summary(baseline, changed)["test"]["metrics"]) == {"mae", "mse", "r", "r_squared", "r2"}


def drawn(subjects=40, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.arange(subjects) % classes
    values = rng.normal(size=(subjects, 5)) + 2.0 * (truth[:, None] == np.arange(5))
    labels = tuple(f"{row:03d}" for row in range(subjects))
    return Features(subject=labels, group=labels, values=values), dict(zip(labels, truth.astype(float), strict=True))


def test_three_classes_are_fitted_scored_and_compared():
    features, truth = drawn(90, classes=3)
    parts = {"train": features.of(features.subject[:60]), "test": features.of(features.subject[60:])}
    test = fit_baseline("x", parts, truth, kind="classification").parts["test"]
    assert test.score.shape == (30, 3)
    noise = Subjects(label=test.label, truth=test.truth, score=np.random.default_rng(1).normal(size=(30, 3)))
    rows = {row.metric: row for row in paired_differences(test, noise, kind="classification", draws=200)}
    assert rows["accuracy"].network == pytest.approx(np.mean(test.score.argmax(1) == test.truth))
    assert rows["balanced_accuracy"].interval[0] > 0


def test_subjects_without_a_target_are_left_out():
    features, truth = drawn(40)
    for label in ("001", "035"):
        truth[label] = np.nan
    del truth["036"]
    parts = {"train": features.of(features.subject[:30]), "test": features.of(features.subject[30:])}
    found = fit_baseline("x", parts, truth, kind="classification").parts
    assert (len(found["train"].label), len(found["test"].label)) == (29, 8)


def test_a_subject_in_two_parts_is_refused():
    features, truth = drawn(40)
    parts = {"train": features.of(features.subject[:31]), "test": features.of(features.subject[30:])}
    with pytest.raises(UsageError, match="1 subjects are in two parts"):
        fit_baseline("x", parts, truth, kind="classification")


def test_the_paired_difference_is_tighter_than_the_intervals_of_two_models_that_agree():
    rng = np.random.default_rng(0)
    truth = (np.arange(60) % 2).astype(float)
    common = truth + rng.normal(size=60)
    labels = tuple(map(str, range(60)))
    one = Subjects(label=labels, truth=truth, score=common + 0.05 * rng.normal(size=60))
    order = rng.permutation(60)
    other = Subjects(
        label=tuple(labels[i] for i in order), truth=truth[order], score=(common + 0.05 * rng.normal(size=60))[order]
    )
    (auroc, _) = paired_differences(one, other, kind="classification")
    low, high = metrics.bootstrap_interval(metrics.auroc, truth, one.score, draws=2000, stratify=True)
    assert auroc.network == metrics.auroc(truth, one.score)
    assert auroc.difference == pytest.approx(auroc.network - auroc.baseline)
    assert auroc.interval[0] <= auroc.difference <= auroc.interval[1]
    assert auroc.interval[1] - auroc.interval[0] < 0.3 * (high - low)
    same = paired_differences(one, one, kind="classification")
    assert [(row.difference, row.interval) for row in same] == [(0, (0, 0))] * 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label": ("a", "b", "d")}, "2 subjects were scored by one"),
        ({"truth": np.array([0.0, 1, 0])}, "different truths"),
    ],
)
def test_other_subjects_and_other_truths_are_not_compared(change, sentence):
    one = Subjects(label=("a", "b", "c"), truth=np.array([0.0, 1, 1]), score=np.arange(3.0))
    with pytest.raises(UsageError, match=sentence):
        paired_differences(one, dataclasses.replace(one, **change), kind="classification")


def test_reports_without_test_subjects_are_not_compared():
    with pytest.raises(UsageError, match="no test subjects"):
        beside_network({}, {}, kind="classification", draws=10)


def test_what_is_missing_is_wrong_usage(tmp_path, capsys):
    assert main(["swift_tiny_cpu", "--out", str(tmp_path)]) == 2
    arguments = ["swift_tiny_cpu", "--set", "data.url=nowhere", "--out", str(tmp_path), "--beside", str(tmp_path)]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "data.url is not set" in said
    assert "finished run" in said


def test_families_of_the_participants_table_are_kept_whole_in_tuning_and_in_intervals(tmp_path):
    """Where the conversion knew nothing of them: each subject was a group of its own."""
    source = parse_url("synth://?subjects=16&shape=8x8x8&frames=20")
    people = source.participants()
    rows = [f"{row['subject']},{row['sex']},{place // 4}" for place, row in enumerate(people)]
    (tmp_path / "people.csv").write_text("\n".join(["participant_id,sex,family_id", *rows]) + "\n")
    url = str(tmp_path / "dataset")
    phenotypes = Phenotypes(url=str(tmp_path / "people.csv"))
    convert(
        source.url(), url, options=ConvertOptions(split="exact", split_ratios=(0.5, 0.0, 0.5), phenotypes=phenotypes)
    )
    recipe = recipe_from(
        {
            "data": {"url": url, "window": 8, "stride": 8, "val_split": ""},
            "model": {"name": "swift"},
            "eval": {"bootstrap_draws": 20},
        }
    )
    expected = {row["subject"]: str(place // 4) for place, row in enumerate(people)}
    for baseline in recipe_baselines(recipe, block=4):
        test = baseline.parts["test"]
        assert test.cluster == tuple(f"family {expected[label]}" for label in test.label)
        assert summary(baseline, recipe)["test"]["bootstrap"]["clusters"] == len(set(test.cluster)) < len(test.label)
        assert baseline.family == expected


def test_families_are_drawn_whole_where_a_conversion_kept_sites_together(tmp_path):
    """As a network's own intervals draw them: a site is no family."""
    source = parse_url("synth://?subjects=16&shape=8x8x8&frames=20")
    people = source.participants()
    rows = [f"{row['subject']},{row['sex']},s{place // 4},f{place // 2}" for place, row in enumerate(people)]
    (tmp_path / "people.csv").write_text("\n".join(["participant_id,sex,site,family_id", *rows]) + "\n")
    url, phenotypes = str(tmp_path / "dataset"), Phenotypes(url=str(tmp_path / "people.csv"), group_by="site")
    how = ConvertOptions(split="exact", split_ratios=(0.5, 0.0, 0.5), phenotypes=phenotypes)
    convert(source.url(), url, options=how)
    recipe = recipe_from({"data": {"url": url, "window": 8, "stride": 8, "val_split": ""}})
    baseline = recipe_baselines(recipe, block=4)[0]
    with ExitStack() as stack:
        clips = open_part(recipe, split="test", seed=None, world=World(), stack=stack).clips
    words = words_of_runs(clips)
    expected = dict(zip(words["subject"], words["family"], strict=True))
    assert sorted(set(expected.values())) == sorted(
        {f"f{place // 2}" for place, row in enumerate(people) if row["subject"] in expected}
    )
    assert baseline.parts["test"].cluster == tuple(
        f"family {expected[label]}" for label in baseline.parts["test"].label
    )
    assert {label: baseline.family[label] for label in expected} == expected


def test_a_network_scored_by_session_is_compared_by_its_subjects_means():
    truth = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}
    rows = [("a", 0.5), ("a", -2.5), ("b", 3.0), ("c", -1.0), ("c", 2.0), ("d", 0.0)]
    network = Subjects(
        label=tuple(label for label, _ in rows),
        session=("1", "2", "1", "1", "2", "1"),
        truth=np.array([truth[label] for label, _ in rows]),
        score=np.array([score for _, score in rows]),
    )
    baseline = Subjects(label=tuple(truth), truth=np.array(list(truth.values())), score=np.array([1.0, 0.0, 0.0, 1.0]))
    rows = paired_differences(network, baseline, kind="classification", draws=50)
    auroc = {row.metric: row for row in rows}["auroc"]
    assert auroc.network == metrics.auroc(baseline.truth, np.array([-1.0, 3.0, 0.5, 0.0])) == 0.75
    assert auroc.interval == paired_differences(
        Subjects(label=tuple(truth), truth=baseline.truth, score=np.array([-1.0, 3.0, 0.5, 0.0])),
        baseline, kind="classification", draws=50,
    )[0].interval  # fmt: skip


def test_a_family_and_a_subject_of_one_name_are_not_drawn_together():
    assert clusters(("1", "2", "3"), {"2": "1"}) == ()
    assert clusters(("1", "2", "3"), {"2": "1", "3": "1"}) == ("subject 1", "family 1", "family 1")
