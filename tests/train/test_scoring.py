"""Test subjects are scored once: a finished run that is started again keeps its table, and one scored anew says so."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fmristream import convert
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from fmristream.synth.cohort import parse_url
from tests.train.small import small_tables
from train import loop
from train.config import recipe_from
from train.launch import World
from train.predictions import FILE, encode, read_predictions
from train.report import report_text, write_report
from train.summary import report_of

ALONE = World()


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    """(tables of its recipe, where it wrote)"""
    small = {"patch_size": [3, 3, 3, 1], "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 2]}
    windows = {"window_size": [2, 2, 2, 4], "first_window_size": [2, 2, 2, 4]}
    tables = {
        "data": {"url": cohort, "window": 8, "stride": 14},
        "model": small | windows,
        "train": {"steps": 2, "batch_size": 4, "eval_every": 1},
        "eval": {"bootstrap_draws": 20},
    }
    out = tmp_path_factory.mktemp("finished")
    recipe = recipe_from(tables)
    write_report(loop.train(recipe, out=out, world=ALONE), recipe, out=out)
    return tables, out


@pytest.fixture
def again(finished, tmp_path):
    """Start a copy of the run again, with some changes: where it is, and what it says."""
    tables, out = finished
    shutil.copytree(out, tmp_path / "run")

    def start(**sections):
        changed = {name: values | sections.get(name, {}) for name, values in tables.items()}
        recipe = recipe_from(changed)
        write_report(loop.train(recipe, out=tmp_path / "run", world=ALONE), recipe, out=tmp_path / "run")
        return json.loads((tmp_path / "run" / "report.json").read_text())

    return tmp_path / "run", start


def scored_again(out):
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [event["why"] for event in events if event["event"] == "scored again"]


def test_the_report_is_what_its_table_says_and_nothing_else(finished):
    _, out = finished
    table = read_predictions(out / FILE)
    assert (out / "report.json").read_text() == report_text(report_of(table))
    assert table.splits == ("val", "test")
    assert len(table) == 10 * 3
    assert (table.about.step, table.about.scorings) == (2, 1)
    assert table.about.targets[0].classes == ("F", "M")
    assert set(table.words["family"]) == {None}


def test_a_finished_run_takes_the_scores_that_it_has(again):
    out, start = again
    table = read_predictions(out / FILE)
    marked = dataclasses.replace(table, values=table.values | {"score_sex": table.values["score_sex"] + 1})
    (out / FILE).write_bytes(encode(marked))  # as no network would give them
    before = (out / FILE).read_bytes()
    report = start()
    assert (out / FILE).read_bytes() == before
    assert report["scorings"] == 1
    assert scored_again(out) == []
    first = table.values["score_sex"]
    marked_mean = np.mean([one["score"] for part in ("val", "test") for one in report[part]["subjects"]])
    assert marked_mean == pytest.approx(first.mean() + 1, abs=1e-5)


def test_how_rows_become_numbers_may_change_without_scoring_anew(again):
    out, start = again
    report = start(eval={"average": "sigmoid", "bootstrap_draws": 30})
    assert (report["average"], report["scorings"]) == ("sigmoid", 1)
    assert report["test"]["bootstrap"]["draws"] == 30
    assert scored_again(out) == []


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"eval": {"stride": 10}}, "changed: selection, stride"),
        ({"data": {"test_split": "train", "audit": "off"}}, "changed: data, selection"),
        ({"train": {"steps": 3}}, "the network was trained further"),
    ],
)
def test_other_rows_are_scored_anew_and_that_is_said_and_counted(again, sections, why):
    out, start = again
    report = start(**sections)
    assert report["scorings"] == 2
    assert scored_again(out) == [why]
    assert start(**sections)["scorings"] == 2


def test_a_damaged_table_is_scored_anew(again):
    out, start = again
    (out / FILE).write_bytes((out / FILE).read_bytes()[:-7])
    assert start()["scorings"] == 2
    assert "damaged" in scored_again(out)[0]


def test_a_table_of_other_weights_at_the_same_step_is_not_taken(finished, again):
    tables, _ = finished
    out, _ = again
    before = read_predictions(out / FILE).values["score_sex"]
    shutil.rmtree(out / "checkpoints")
    faster = tables | {"optim": {"lr": 0.3}}
    ended = loop.train(recipe_from(faster), out=out, world=ALONE).table  # and killed before its report
    assert not np.allclose(ended.values["score_sex"], before, atol=0.1)
    found = loop.train(recipe_from(faster), out=out, world=ALONE).table
    np.testing.assert_array_equal(found.values["score_sex"], ended.values["score_sex"])
    assert scored_again(out) == ["the network was trained further", "changed: checkpoint"]


@pytest.mark.parametrize("evaluation", [{"use": "best"}, {"use": "best", "metric": "accuracy"}])
def test_the_last_weights_of_a_run_that_was_over_are_not_taken_for_the_best(again, evaluation):
    out, start = again
    with pytest.raises(UsageError, match=r"no look of this run was compared by '(auroc|accuracy)'"):
        start(eval=evaluation)
    assert read_predictions(out / FILE).about.made_of["weights"] == ["last", 0.0]
    assert start()["scorings"] == 1


def test_labels_that_were_corrected_are_scored_against_and_the_log_says_that_the_data_have_changed(tmp_path):
    cohort, url, people = parse_url("synth://?subjects=6&shape=12x12x12&frames=16"), tmp_path / "d", tmp_path / "p.csv"

    def converted(correction, **how):
        rows = [f"{row['subject']},{row['age'] + correction.get(row['subject'], 0)}" for row in cohort.participants()]
        people.write_text("\n".join(["participant_id,years", *rows]) + "\n")
        options = ConvertOptions(
            split="exact", split_ratios=(0.5, 0.0, 0.5), phenotypes=Phenotypes(url=str(people)), **how
        )
        convert(cohort.url(), str(url), options=options)

    def truths():
        write_report(loop.train(recipe, out=tmp_path / "run", world=ALONE), recipe, out=tmp_path / "run")
        return {
            one["subject"]: one["truth"]
            for one in json.loads((tmp_path / "run" / "report.json").read_text())["test"]["subjects"]
        }

    converted({})
    data = {"target": "years", "val_split": ""}
    recipe = recipe_from(small_tables(str(url), data=data, objective={"kind": "regression"}, train={"steps": 1}))
    before = truths()
    wrong = min(before)
    converted({wrong: 30}, update="all")  # no run changes, and with none the digest of the content
    assert truths() == before | {wrong: pytest.approx(before[wrong] + 30, abs=1e-4)}
    assert scored_again(tmp_path / "run") == ["changed: version"]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["dataset.generation_digest" in event for event in events if event["event"] == "changed"] == [True]
