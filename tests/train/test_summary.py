"""What a report says of a table: thresholds and lines of validation alone, and words where nothing can be said."""

import math

import numpy as np
import pytest

from tests.train.tables import cohort, table, target
from train.report import print_table, report_text
from train.summary import numbers_of, report_of, target_report
from train.units import Subjects

AGE = target("age", (), offset=40.0)


def subjects(truth, score, **more):
    labels = tuple(f"{place:02d}" for place in range(len(truth)))
    return Subjects(label=labels, truth=np.array(truth, float), score=np.array(score, float), **more)


def test_one_target_is_told_at_the_top_and_several_below_their_names():
    one = report_of(table(cohort()))
    assert list(one)[:3] == ["step", "target", "objective"]
    assert (one["target"], one["classes"], one["unit"], one["average"]) == ("sex", ["F", "M"], "subject", "logit")
    rows = [(*row, 30.0 + int(row[1][1:]), 35.0) for row in cohort()]
    two = report_of(table(rows, (target(), AGE)))
    assert set(two["targets"]) == {"sex", "age"}
    assert {name: two["targets"]["sex"][name] for name in ("val", "test")} == {
        name: one[name] for name in ("val", "test")
    }
    assert math.isnan(two["targets"]["age"]["test"]["metrics"]["r"])  # 35 of everybody
    assert '"r": null' in report_text(two)


def test_the_threshold_is_of_validation_alone():
    val, test = subjects([0, 0, 1, 1], [-3, 1, 2, 4]), subjects([0, 1, 1], [1.4, 1.6, 9])
    report = target_report(target(), {"val": val, "test": test}, draws=20)
    assert (report["threshold"], report["threshold_chosen_on"]) == (1.5, "4 validation subjects")
    assert report["test"]["metrics"]["accuracy"] == 1
    assert report["test"]["metrics"]["accuracy_at_0"] == pytest.approx(2 / 3)
    assert report["test"]["confusion"] == [[1, 0], [0, 2]]
    other = target_report(target(), {"val": val, "test": subjects([1, 0, 0], [1.4, 1.6, 9])}, draws=20)
    assert other["threshold"] == 1.5


@pytest.mark.parametrize("val", [None, subjects([1, 1], [2, 3]), subjects([], [])])
def test_validation_of_one_class_chooses_nothing_and_says_so(val):
    report = target_report(target(), {"val": val, "test": subjects([0, 1], [1, 2])}, draws=20)
    assert report["threshold"] == 0
    assert report["threshold_chosen_on"] == "nothing: there are no validation subjects of both classes"
    sigmoids = target_report(target(), {"val": val, "test": subjects([0, 1], [0.2, 0.6])}, draws=20, average="sigmoid")
    assert sigmoids["threshold"] == 0.5


def test_the_line_of_bias_is_of_validation_and_needs_no_truth_of_test():
    rng = np.random.default_rng(0)
    ages = rng.uniform(20, 80, 60)
    told = 40 + 0.5 * (ages - 40) + rng.normal(size=60)  # everybody pulled to 40
    val, test = subjects(ages[:30], told[:30]), subjects(ages[30:], told[30:])
    report = target_report(AGE, {"val": val, "test": test}, draws=20)
    slope, intercept = np.polyfit(ages[:30], told[:30], 1)
    assert report["bias_correction"]["slope"] == pytest.approx(slope)
    assert report["bias_correction"]["intercept"] == pytest.approx(intercept)
    corrected = (told[30:] - intercept) / slope
    assert report["test"]["bias_corrected"]["mae"] == pytest.approx(np.abs(corrected - ages[30:]).mean())
    assert report["test"]["bias_corrected"]["mae"] < 0.4 * report["test"]["metrics"]["mae"]
    assert "bias_corrected" not in report["val"]


@pytest.mark.parametrize(
    "val", [None, subjects([1, 2], [1, 2]), subjects([5, 5, 5], [1, 2, 3]), subjects([1, 2, 3], [3, 2, 1])]
)
def test_where_there_is_no_line_nothing_is_corrected(val):
    report = target_report(AGE, {"val": val, "test": subjects([1, 2], [1, 3])}, draws=20)
    assert "bias_correction" not in report
    assert "bias_corrected" not in report["test"]


def test_r2_is_about_the_training_mean_that_the_table_holds():
    report = target_report(AGE, {"test": subjects([30, 50, 60], [35, 45, 55])}, draws=20)
    assert report["train_mean"] == 40
    assert report["test"]["metrics"]["r2"] == pytest.approx(1 - 75 / (100 + 100 + 400))


def test_draws_that_were_drawn_again_or_gave_nothing_are_counted():
    families = tuple("aabbccdd")
    found = subjects([0, 1, 1, 1, 1, 1, 1, 1], np.arange(8), cluster=families)
    told = target_report(target(), {"test": found}, draws=200)["test"]["bootstrap"]
    assert (told["clusters"], told["stratified"]) == (4, False)
    assert told["redrawn"] > 20  # (3/4)^4 = .32 of the draws lack the only one of class 0
    told = target_report(AGE, {"test": subjects([1, 2], [1, 3])}, draws=200)["test"]["bootstrap"]
    assert 60 < told["undefined"]["r"] < 140  # half of the draws have one subject twice
    assert "undefined" in told
    assert told["says"].startswith("the middle 95 % over draws of 2 subjects of this part alone; the model is fixed")


def test_windows_without_a_target_give_their_mean_loss(capsys):
    rows = [(*row[:5], 0.25 * place) for place, row in enumerate(cohort(3))]
    report = report_of(table(rows, (), objective="masked"))
    assert report["target"] is None
    assert report["val"] == {"num_windows": 4, "metrics": {"loss": 0.375}, "intervals": {}}
    assert numbers_of(table(rows, (), objective="masked").of_split("val")) == {"loss": 0.375}
    print_table(report)
    assert "every window once" in capsys.readouterr().out


def test_numbers_on_the_way_carry_their_target_only_where_there_are_several():
    rows = [(*row, 30.0 + int(row[1][1:]), 35.0) for row in cohort(split="val")]
    assert "auroc" in numbers_of(table([row[:7] for row in rows]))
    assert {"sex.auroc", "age.mae"} <= set(numbers_of(table(rows, (target(), AGE))))


def test_tables_on_the_screen_name_unit_threshold_and_what_an_interval_is(capsys):
    rows = [(*row, 30.0 + int(row[1][1:]), 35.0) for row in cohort()]
    print_table(report_of(table(rows, (target(), AGE), scorings=3)))
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "sex after 5 steps, by subject",
        "age after 5 steps",
        "R2 about the training mean",
        "chosen on 4 validation",
    ):
        assert words in said
    assert "the model is fixed" in said
    assert "scored 3 times in this folder" in said
