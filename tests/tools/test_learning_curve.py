"""Learning curves: cells are nested and gone on from, the baseline learns from the same subjects, planted laws are found."""

import json
from itertools import pairwise

import numpy as np
import pytest

from fmristream import convert
from fmristream import open as open_dataset
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from tests.train import tables
from tests.train.small import write_small
from tools.learning_curve import cell_recipe, digest_of, errors_of, main, network_numbers
from tools.learning_curve_fit import PowerLaw, fit_power_law, fit_with_interval
from tools.proof_results import read_lines
from train.config import recipe_from
from train.data import training_part
from train.evaluate import scores_of
from train.state import Outcome
from train.summary import report_of


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """20 subjects: 10 to train, 4 to validate, 6 to test."""
    url = str(tmp_path_factory.mktemp("cohort") / "dataset")
    source = "synth://?subjects=20&shape=12x12x12&frames=22&effect=coupling&strength=1.6"
    convert(source, url, options=ConvertOptions(split="exact", split_ratios=(0.5, 0.2, 0.3)))
    return url


SIZES = np.array([8, 16, 32, 64, 128, 256], dtype=np.float64)


@pytest.mark.parametrize("law", [(0.9, 0.4, 0.1), (2.0, 1.1, 0.0), (30.0, 0.6, 4.0)])
def test_a_planted_law_is_found(law):
    scale, exponent, floor = law
    found = fit_power_law(SIZES, scale * SIZES**-exponent + floor)
    assert found.exponent == pytest.approx(exponent, rel=0.02)
    assert np.allclose(found(SIZES), scale * SIZES**-exponent + floor, rtol=1e-3)


def test_with_few_sizes_there_is_no_floor_and_the_law_is_the_line_of_logarithms():
    errors = 0.7 * SIZES[:3] ** -0.3
    found = fit_power_law(SIZES[:3], errors)
    assert (found.exponent, found.floor) == (pytest.approx(0.3, rel=1e-4), 0.0)


def test_intervals_hold_the_truth_and_shrink_with_less_noise():
    def fitted(noise):
        rng = np.random.default_rng(4)
        truth = PowerLaw(scale=0.8, exponent=0.35, floor=0.0)
        table = {
            int(size): {seed: float(truth(size) * np.exp(noise * rng.normal())) for seed in range(6)}
            for size in SIZES[:3]
        }
        return fit_with_interval(table, draws=200)

    loud, quiet = fitted(0.1), fitted(0.01)
    for fit in (loud, quiet):
        assert fit.exponent[0] <= 0.35 <= fit.exponent[1]
        assert (fit.low <= fit.curve + 1e-9).all()
        assert (fit.curve <= fit.high + 1e-9).all()
    assert np.ptp(quiet.exponent) < np.ptp(loud.exponent) / 3
    assert np.isnan(fit_with_interval({8: {0: 0.5}, 16: {0: 0.4}}).exponent).all()


def subjects_of(recipe):
    dataset, part = training_part(recipe)
    every = set(open_dataset(recipe.data.url).where("split == 'train'").runs.column("subject"))
    return {subject for subject in every if dataset is None or part.has(subject)}


def test_larger_cells_hold_smaller_ones_and_seeds_differ(cohort):
    recipe = recipe_from({"data": {"url": cohort}})
    held = [subjects_of(cell_recipe(recipe, size=size, seed=3)) for size in range(1, 11)]
    assert [len(one) for one in held] == list(range(1, 11))
    assert all(one < other for one, other in pairwise(held))
    assert held[-1] == subjects_of(recipe)
    assert subjects_of(cell_recipe(recipe, size=5, seed=3)) != subjects_of(cell_recipe(recipe, size=5, seed=4))
    with pytest.raises(UsageError, match="has 10 groups"):
        training_part(cell_recipe(recipe, size=11, seed=0))


@pytest.fixture
def arguments(cohort, tmp_path):
    recipe = write_small(tmp_path, cohort, data={"stride": 14}, train={"steps": 2}, eval={"bootstrap_draws": 10})
    return [str(recipe), str(tmp_path / "curve"), "--sizes", "6", "10", "--seeds", "0"]


def test_a_small_curve_is_computed_once_and_drawn(arguments, tmp_path, capsys):
    out = tmp_path / "curve"
    assert main(arguments) == 0
    lines = read_lines(out / "results.jsonl")
    assert [(line["size"], line["seed"]) for line in lines] == [(6, 0), (10, 0)]
    assert set(lines[0]["numbers"]) == {"network", "functional connectivity"}
    assert (out / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "| 6 | 1 |" in (out / "curve.md").read_text()
    assert set(json.loads((out / "fit.json").read_text())["laws"]) == {"network", "functional connectivity"}
    assert not list((out / "cells").rglob("checkpoints"))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "groups, seed" not in capsys.readouterr().out
    assert read_lines(out / "results.jsonl") == lines


def test_a_cell_that_another_recipe_was_stopped_in_is_not_gone_on_with(arguments, tmp_path):
    one = [*arguments[:3], "6", *arguments[5:], "--no-baseline"]
    for change in ([], ["--set", "optim.lr=1e-4"]):
        assert main([*one, *change]) == 0
    logs = [path.read_text() for path in sorted((tmp_path / "curve" / "cells").glob("6-0-*/log.jsonl"))]
    assert [log.count('"event": "start"') for log in logs] == [1, 1]


def test_cells_of_a_dataset_that_was_changed_are_computed_anew(cohort):
    recipe = recipe_from({"data": {"url": cohort}})
    assert digest_of(recipe, version="1") == digest_of(recipe, version="1") != digest_of(recipe, version="2")


@pytest.mark.parametrize("several", [False, True])
def test_a_networks_numbers_are_those_of_its_own_report(several):
    rows = [row for row in tables.cohort(30) if row[0] == "test"]  # no validation: the threshold is a half of sigmoids
    targets = (tables.target(), tables.target(name="age", classes=())) if several else (tables.target(),)
    found = tables.table([(*row, 40.0, 41.0) for row in rows], targets, average="sigmoid")
    outcome = Outcome(step=5, task=None, val=None, test=scores_of(found, "test"), table=found)
    report = report_of(found)
    expected = (report["targets"]["sex"] if several else report)["test"]["metrics"]
    assert network_numbers(outcome) == expected
    assert expected["balanced_accuracy"] == expected["balanced_accuracy_at_0"] > 0.6


def test_errors_are_what_is_missing_to_one_or_the_error_itself():
    lines = [
        {"size": 4, "seed": 0, "numbers": {"network": {"auroc": 0.75, "mae": 3.0}}},
        {"size": 4, "seed": 1, "numbers": {"network": {"auroc": None, "mae": 4.0}}},
    ]
    assert errors_of(lines, "network", "auroc") == {4: {0: 0.25}}
    assert errors_of(lines, "network", "mae") == {4: {0: 3.0, 1: 4.0}}


def test_a_curve_of_nothing_to_predict_is_refused(capsys):
    assert main(["brainlm_pretrain", "/nowhere", "--sizes", "4"]) == 2
    assert "has no target" in capsys.readouterr().err
