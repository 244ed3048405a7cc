"""The record of finished cells: nothing is done twice, nothing is lost, and what made a number is told."""

import dataclasses
import json

import numpy as np
import pytest

from fmristream.errors import UsageError
from tools.proof_cells import EFFECTS, INPUTS, MODELS, NETWORKS, Cell, Settings, cells, described, digest_of, recipe_of
from tools.proof_cohorts import Scores
from tools.proof_results import (
    append,
    auroc_draws,
    code,
    expected_s,
    key_of,
    line_of,
    read_lines,
    remaining,
)
from train.config import as_toml
from train.metrics import auroc

SETTINGS = Settings()
CELL = Cell(effect="coupling", model="swift", input="voxel", seed=1)


def scores(seed=0, subjects=20):
    rng = np.random.default_rng(seed)
    truth = np.arange(subjects) % 2.0
    labels = tuple(f"{number:04d}" for number in range(subjects))
    return Scores(
        subject=labels, truth=truth, score=rng.normal(truth), shuffled=rng.normal(size=subjects).astype(np.float64)
    )


def made(cell=CELL, settings=SETTINGS, **facts):
    return line_of(cell, settings, scores(), {"num_train": 30, "seconds": 12.0, "core_s": 9.0, **facts})


def test_the_first_seed_of_everything_comes_first_and_ablations_after_own_inputs():
    found = cells(list(MODELS), list(EFFECTS), [3, 1])
    assert len(found) == len(set(found)) == 2 * 4 * (len(MODELS) + len(MODELS["swift"].inputs) - 1)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    first = found[: len(found) // 2]
    own = [cell.input == MODELS[cell.model].inputs[0] for cell in first]
    assert own == sorted(own, reverse=True)
    assert [cell.model for cell in first[:4]] == ["mean"] * 4


@pytest.mark.parametrize(("models", "effects"), [(["swfit"], ["order"]), (["swift"], ["orders"])])
def test_unknown_names_are_refused_with_those_that_are_known(models, effects):
    with pytest.raises(UsageError, match="known: "):
        cells(models, effects, [0])


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_s_recipe_can_be_written_and_is_in_its_description(model):
    for given in MODELS[model].inputs:
        cell = Cell(effect="order", model=model, input=given, seed=2)
        recipe = recipe_of(cell, SETTINGS, url="/data")
        assert f"normalize = {json.dumps(recipe.data.normalize)}" in as_toml(recipe)
        assert recipe.data.normalize.startswith(INPUTS[given].normalize)
        assert recipe.train.seed == 2
        facts = described(cell, SETTINGS)
        assert facts["recipe"]["optim"]["lr"] == MODELS[model].lr
        assert "/data" not in json.dumps(facts)
        assert "effect=order&strength=3.0" in facts["cohort"]


def test_a_digest_differs_by_cell_steps_and_subjects():
    others = [
        described(dataclasses.replace(CELL, seed=2), SETTINGS),
        described(dataclasses.replace(CELL, input="two"), SETTINGS),
        described(CELL, dataclasses.replace(SETTINGS, steps=600)),
        described(CELL, dataclasses.replace(SETTINGS, subjects=100)),
    ]
    digests = [digest_of(facts) for facts in (described(CELL, SETTINGS), *others)]
    assert len(set(digests)) == 5
    assert digests[0] == digest_of(json.loads(json.dumps(described(CELL, SETTINGS))))


def test_a_finished_cell_is_not_done_again_and_one_of_another_recipe_is(tmp_path):
    path = tmp_path / "results.jsonl"
    wanted = [CELL, dataclasses.replace(CELL, seed=2)]
    assert remaining(wanted, read_lines(path), SETTINGS) == wanted
    append(path, made())
    assert remaining(wanted, read_lines(path), SETTINGS) == wanted[1:]
    assert remaining(wanted, read_lines(path), dataclasses.replace(SETTINGS, steps=10)) == wanted


def test_a_line_that_a_kill_cut_short_is_done_again_and_harms_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, made())
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    assert len(read_lines(path)) == 1
    append(path, made(dataclasses.replace(CELL, seed=2)))
    assert [key_of(line) for line in read_lines(path)] == ["coupling/swift/voxel/1", "coupling/swift/voxel/2"]


def test_a_line_tells_scores_recipe_code_and_versions():
    line = json.loads(json.dumps(made()))
    told = scores()
    assert line["auroc"] == pytest.approx(auroc(told.truth, told.score))
    assert line["shuffled_auroc"] == pytest.approx(auroc(told.truth, told.shuffled))
    assert line["auroc_interval"][0] < line["auroc"] < line["auroc_interval"][1]
    assert (line["num_train"], line["num_test"], len(line["score"])) == (30, 20, 20)
    assert line["described"]["recipe"]["train"]["steps"] == SETTINGS.steps
    assert {"fmristream", "torch", "numpy", "python"} <= line["versions"].keys()
    assert len(line["code"]["digest"]) == 16
    assert code() == line["code"]


def test_what_a_cell_takes_is_learnt_from_those_that_are_done():
    other = dataclasses.replace(CELL, effect="order")
    assert expected_s(other, [], SETTINGS) == MODELS["swift"].expected_s
    half = dataclasses.replace(SETTINGS, steps=SETTINGS.steps // 2)
    assert expected_s(other, [], half) == MODELS["swift"].expected_s / 2
    lines = [made(core_s=took) for took in (10.0, 30.0, 20.0)]
    assert expected_s(other, lines, SETTINGS) == 20
    assert expected_s(other, lines, half) == MODELS["swift"].expected_s / 2
    assert expected_s(dataclasses.replace(other, input="two"), lines, SETTINGS) == MODELS["swift"].expected_s


def test_resampled_subjects_are_the_same_for_every_model_and_centre_on_the_auroc():
    told, rival = scores(0, 60), scores(1, 60)
    draws = auroc_draws(told.truth, told.score)
    assert draws.mean() == pytest.approx(auroc(told.truth, told.score), abs=0.01)
    # An order that ranks alike has the same AUROC in each draw.
    np.testing.assert_allclose(auroc_draws(told.truth, np.exp(told.score)), draws)
    assert not np.allclose(auroc_draws(rival.truth, rival.score), draws)
    reference = np.random.default_rng(0)
    positives, negatives = (reference.multinomial(30, np.full(30, 1 / 30), 2_000) for _ in range(2))
    subjects = np.concatenate(
        [np.repeat(np.arange(1, 60, 2), positives[5]), np.repeat(np.arange(0, 60, 2), negatives[5])]
    )
    assert draws[5] == pytest.approx(auroc(told.truth[subjects], told.score[subjects]))
