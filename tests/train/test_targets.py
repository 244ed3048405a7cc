"""Several targets at once: outputs dealt in one order, losses of known labels added, each coded by the training subjects."""

import json
import math
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.nn.functional import huber_loss

import fmristream
from fmristream.errors import ResumeError, UsageError
from tests.train.test_tasks import BRAINLM, SERIES, SWIFT, TFF, VIT, VITMAE, without_none
from train import evaluate, loop
from train.checkpoint import load_checkpoint, newest_whole
from train.config import as_toml, load_recipe, recipe_from
from train.launch import World
from train.log import read_history
from train.main import main
from train.objectives import Objective
from train.targets import dealt, joined_scores, num_outputs, saved_outputs, summed_losses

ALONE = World()
TARGETS = {"memory": "regression", "hand": "classification", "age": "regression"}
AGE = Objective(kind="regression", target="age", offset=50.0, scale=10.0, loss="huber", huber_delta=0.7, weight=0.5)
HAND = Objective(kind="classification", target="hand", classes=(0.0, 1.0, 3.0), names=("b", "l", "r"), weight=2.0)
SEX = Objective(kind="classification", target="sex", class_weights=(0.6, 3.0))
EACH = (AGE, HAND, SEX)
SEVERAL = {
    "age": torch.tensor([40.0, torch.nan, 61.0, torch.nan]),
    "hand": torch.tensor([3.0, 0.0, torch.nan, torch.nan]),
    "sex": torch.tensor([torch.nan, 1.0, 0.0, torch.nan]),
}
NETWORKS = {
    "swift": ({}, SWIFT, {}),
    "tff3": ({"window": 2, "stride": 6}, {"name": "tff3", **TFF}, {}),
    "brainlm": (SERIES, BRAINLM, {}),
    "brainlm-joint": (SERIES, BRAINLM | {"learning": "all"}, {"reconstruction_weight": 0.5, "mask_ratio": 0.5}),
    "vitmae-probe": (SERIES, VITMAE | {"learning": "head"}, {}),
    "mae4d": ({}, {"name": "mae4d", **VIT}, {}),
    "cnn_rnn": (
        {"window": 0, "stride": None, "columns": ["weight"], "side": ["parcels"]},
        {"name": "cnn_rnn", "channels": [4, 4], "norm_groups": 2, "hidden": 6},
        {},
    ),
    "mlp": (SERIES | {"window": 0, "stride": None}, {"name": "mlp", "hidden": [6]}, {}),
    "lstm": (SERIES, {"name": "lstm", "hidden": 6}, {}),
}


@pytest.fixture
def several(parcelled):
    """A recipe of one of the networks with three targets; keywords change its sections."""

    def make(name, **sections):
        data, model, objective = NETWORKS[name]
        tables = {
            "data": {"url": parcelled, "window": 8, "stride": 8, "normalize": "voxel-zscore"} | data,
            "model": model,
            "objective": {"kind": "multitask", "targets": TARGETS} | objective,
            "train": {"steps": 2, "batch_size": 3, "keep_last": 9},
            "eval": {"bootstrap_draws": 20},
        }
        for section, changes in sections.items():
            tables[section] = tables.get(section, {}) | changes
        return recipe_from({section: without_none(values) for section, values in tables.items()})

    return make


def log_sum_exp(values):
    return np.log(np.exp(values).sum())


def test_the_loss_is_the_weighted_sum_over_the_labels_that_are_known():
    outputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = summed_losses(EACH, outputs, SEVERAL)
    x = outputs.detach().double().numpy()
    delta = 0.7

    def huber(gap):
        return gap**2 / 2 if abs(gap) <= delta else delta * (abs(gap) - delta / 2)

    expected = [
        0.5 * huber(x[0, 0] - (40 - 50) / 10) + 2 * (log_sum_exp(x[0, 1:4]) - x[0, 3]),
        2 * (log_sum_exp(x[1, 1:4]) - x[1, 1]) + 3.0 * np.log1p(np.exp(-x[1, 4])),
        0.5 * huber(x[2, 0] - (61 - 50) / 10) + 0.6 * np.log1p(np.exp(x[2, 4])),
        0.0,
    ]
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-5)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert (outputs.grad != 0).tolist() == [
        [True, True, True, True, False],
        [False, True, True, True, True],
        [True, False, False, False, True],
        [False, False, False, False, False],
    ]


def test_one_target_has_the_loss_that_it_had_alone():
    outputs = torch.randn(4, 1, generator=torch.Generator().manual_seed(1))
    plain = Objective(kind="regression", target="age", offset=50.0, scale=10.0, loss="huber", huber_delta=0.7)
    known = torch.isfinite(SEVERAL["age"])
    by_torch = huber_loss(outputs[:, 0], (SEVERAL["age"] - 50) / 10, reduction="none", delta=0.7)
    assert torch.equal(summed_losses((plain,), outputs, SEVERAL)[known], by_torch[known])


def test_scores_stand_side_by_side_in_the_order_of_the_objectives():
    outputs = torch.arange(10.0).view(2, 5)
    expected = [[0 * 10 + 50.0, 1, 2, 3, 4], [5 * 10 + 50.0, 6, 7, 8, 9]]
    assert joined_scores(EACH, outputs).tolist() == expected
    assert [own.tolist() for own in dealt(EACH, outputs)] == [[[0], [5]], [[1, 2, 3], [6, 7, 8]], [[4], [9]]]
    assert joined_scores(EACH, outputs[:0]).shape == (0, 5)
    assert (num_outputs(EACH), num_outputs(())) == (5, None)
    with pytest.raises(RuntimeError):
        dealt(EACH, torch.zeros(2, 6))


def test_a_checkpoint_says_how_many_outputs_its_targets_had():
    assert (
        saved_outputs(json.loads(json.dumps({"kind": "multitask", "objectives": [one.state() for one in EACH]}))) == 5
    )
    assert [saved_outputs(one.state()) for one in EACH] == [1, 3, 1]
    assert saved_outputs({"kind": "classification"}) == 1  # as the first releases wrote it
    assert saved_outputs({"kind": "masked"}) is None


def test_each_target_is_coded_by_its_training_subjects_and_no_order_of_a_table_changes_the_outputs(several, tmp_path):
    turned = dict(reversed(TARGETS.items()))
    recipe = several("lstm", objective={"weights": {"age": 0.25}, "balance": True})
    assert recipe == several("lstm", objective={"weights": {"age": 0.25}, "balance": True, "targets": turned})
    with ExitStack() as stack:
        run = loop.start(recipe, out=tmp_path, world=ALONE, stack=stack)
        age, hand, memory = run.task.objectives
        assert [one.target for one in run.task.objectives] == ["age", "hand", "memory"]
        people = {row["subject"]: row for row in fmristream.open(recipe.data.url).participants}
        training = [people[subject] for subject in sorted(set(run.train.clips.subjects))]
        ages, known = (
            np.array([row[name] for row in training if row[name] is not None], dtype=float)
            for name in ("age", "memory")
        )
        assert 2 < len(known) < len(training) == 6
        assert (age.offset, age.scale, age.weight) == pytest.approx((ages.mean(), ages.std(), 0.25))
        assert (memory.offset, memory.scale, memory.weight) == pytest.approx((known.mean(), known.std(), 1))
        words = [row["hand"] for row in training]
        assert hand.class_weights == pytest.approx([6 / (3 * words.count(word)) for word in ("both", "left", "right")])
        batch = next(iter(run.train.loader))
        outputs = run.model(run.task.inputs(batch)[0])
        assert outputs.shape == (3, 5)
        losses = run.task.losses(run.model, batch).tolist()
        for row, subject in enumerate(batch.subject):
            values, person = outputs[row].detach().double().numpy(), people[subject]
            place = ("both", "left", "right").index(person["hand"])
            expected = 0.25 * (values[0] - (person["age"] - ages.mean()) / ages.std()) ** 2
            expected += hand.class_weights[place] * (log_sum_exp(values[1:4]) - values[1 + place])
            if person["memory"] is not None:
                expected += (values[4] - (person["memory"] - known.mean()) / known.std()) ** 2
            assert losses[row] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_with_a_target_takes_several(several, tmp_path, name):
    recipe = several(name)
    with ExitStack() as stack:
        run = loop.start(recipe, out=tmp_path, world=ALONE, stack=stack)
        assert loop.fit(run, loop.StopRequest())
        found = evaluate.predict(run.model, run.test, task=run.task, world=ALONE, bf16=False)
        count = run.test.clips.num_windows
        assert (found.target.shape, found.score.shape) == ((count, 3), (count, 5))
        people = {row["subject"]: row for row in fmristream.open(recipe.data.url).participants}
        subjects = [run.test.clips.runs[number].subject for number in found.run]
        for column, target in ((0, "age"), (2, "memory")):
            truth = [math.nan if people[one][target] is None else people[one][target] for one in subjects]
            np.testing.assert_array_equal(found.target[:, column], np.float32(truth))
    assert [math.isfinite(step["loss"]) for step in read_history(tmp_path / "log.jsonl").steps] == [True, True]
    (checkpoint, _) = newest_whole(tmp_path / "checkpoints")
    assert saved_outputs(checkpoint.state["objective"]) == 5
    assert recipe_from(checkpoint.state["recipe"]) == recipe
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe


def test_an_interrupted_run_goes_on_bit_for_bit_and_other_targets_or_weights_are_refused(several, tmp_path):
    recipe = several("lstm", train={"steps": 4, "checkpoint_every": 2})
    assert loop.train(recipe, out=tmp_path / "whole", world=ALONE).step == 4
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-4")
    loop.train(recipe, out=tmp_path / "again", world=ALONE)
    whole, again = (load_checkpoint(tmp_path / run / "checkpoints" / "step-4") for run in ("whole", "again"))
    for key, tensor in whole.model.items():
        assert torch.equal(again.model[key], tensor), key
    other = {"age": "regression", "hand": "classification", "weight": "regression"}  # as many outputs
    for changes in ({"weights": {"age": 2.0}}, {"balance": True}, {"loss": "l1"}, {"targets": other}):
        with pytest.raises(ResumeError, match="was trained for"):
            loop.train(several("lstm", objective=changes), out=tmp_path / "again", world=ALONE)


def test_a_run_of_several_targets_begins_with_one_of_a_single_target_but_for_the_head(several, tmp_path):
    single = several(
        "swift", data={"target": "age"}, objective={"kind": "regression", "targets": None}, train={"steps": 1}
    )
    loop.train(single, out=tmp_path / "first", world=ALONE)
    recipe = several("swift", start={"from": str(tmp_path / "first"), "freeze": ["model."]})
    loop.train(recipe, out=tmp_path / "second", world=ALONE)
    before, after = (newest_whole(tmp_path / run / "checkpoints")[0].model for run in ("first", "second"))
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("model."))
    assert after["output_head.head.weight"].shape[0] == 5


def test_weights_of_a_run_with_several_targets_leave_it_as_any_others(several, tmp_path):
    from train.export import trained_network
    from train.scored import find_weights

    recipe = several("lstm")
    loop.train(recipe, out=tmp_path, world=ALONE)
    checkpoint = find_weights(tmp_path)
    network, told = trained_network(checkpoint, settings={"parcels": 27, "frames": 8})
    assert told.model.options["outputs"] == 5
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, checkpoint.tensors[name])


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"objective": {"targets": {"age": "regression"}}}, "must name two columns or more"),
        ({"objective": {"targets": None}}, "must name two columns or more"),
        ({"objective": {"targets": {"age": "regresion", "hand": "classification"}}}, "did you mean regression?"),
        ({"objective": {"weights": {"ages": 2.0}}}, "'ages' is not in objective.targets; did you mean 'age'?"),
        ({"objective": {"weights": {"age": 0.0}}}, "objective.weights.age must be above 0, got 0.0"),
        ({"objective": {"huber_delta": 1.0}}, "set objective.loss"),
        (
            {"objective": {"targets": {"hand": "classification", "sex": "classification"}, "loss": "l1"}},
            "objective.loss is of regression, which no target",
        ),
        (
            {"objective": {"targets": {"age": "regression", "weight": "regression"}, "balance": True}},
            "objective.balance is of classification, which no target",
        ),
        ({"objective": {"temperature": 0.1}}, "objective.temperature is of contrastive"),
        ({"data": {"target": "age"}}, "has its targets in objective.targets, got data.target 'age'"),
        ({"data": {"columns": ["memory"]}}, "data.columns has the target 'memory'"),
        ({"objective": {"kind": "regression"}}, "objective.targets is of multitask, got kind 'regression'"),
        (
            {"objective": {"kind": "regression", "targets": None, "balance": True}},
            "balance is of classification, multitask",
        ),
        ({"model": {"name": "tff1", "hidden": None}}, "'tff1' learns by reconstruct, got objective.kind 'multitask'"),
        ({"objective": {"targets": {"agee": "regression", "hand": "classification"}}}, "did you mean 'age'?"),
        ({"objective": {"targets": {"age": "classification", "hand": "classification"}}}, "age: classification needs"),
        ({"objective": {"targets": {"age": "regression", "hand": "regression"}}}, "hand: regression needs numbers"),
    ],
)
def test_what_does_not_fit_is_said_before_training(several, tmp_path, sections, sentence):
    with pytest.raises(UsageError) as caught:
        loop.train(several("lstm", **sections), out=tmp_path, world=ALONE)
    assert sentence in str(caught.value)


def test_targets_are_given_on_the_command_line_and_the_printed_recipe_says_the_same(capsys):
    targets = ['objective.targets.sex="classification"', "objective.targets.age=regression", "objective.weights.age=2"]
    arguments = [part for one in ("objective.kind=multitask", *targets) for part in ("--set", one)]
    assert main(["swift_sex", "--check", *arguments]) == 2  # the recipe has a target of its own
    assert "got data.target 'sex'" in capsys.readouterr().err
    recipe = recipe_from(
        {"objective": {"kind": "multitask", "targets": {"sex": "classification", "age": "regression"}}}
    )
    assert 'targets = { age = "regression", sex = "classification" }' in as_toml(recipe)
    assert list(recipe.targets) == ["age", "sex"]


def test_a_checkpoint_says_all_targets_and_what_the_network_joins(several, tmp_path):
    with ExitStack() as stack:
        run = loop.start(several("cnn_rnn"), out=tmp_path, world=ALONE, stack=stack)
        assert run.task.inputs.extras.sizes == {"columns": [0], "side": 28}
        state = run.task.state()
        assert set(state) == {"kind", "objectives", "extras"}
        assert [one["target"] for one in state["objectives"]] == ["age", "hand", "memory"]
