"""Every kind of learning takes its steps from a stored dataset, alike on any number of ranks and after any interruption."""

import dataclasses
import json
import math
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fmristream
from fmristream.errors import ResumeError, UsageError
from tests.train.small import MODEL
from tests.train.test_launch import finish, results, start_ranks
from train import export, loop, models, resuming
from train.build import make_model, make_task
from train.checkpoint import checkpoint_steps, load_checkpoint, newest_whole
from train.config import RECIPES, as_toml, recipe_from
from train.data import Signal
from train.evaluate import Windows
from train.extras import fit_extras
from train.launch import World
from train.log import read_history
from train.main import main
from train.models.load import WeightsError
from train.objectives import Objective
from train.report import write_report

ALONE = World()
SWIFT = {"name": "swift", **MODEL}
TFF = {"intermediate_vec": 16, "num_attention_heads": 2, "bert_intermediate_size": 24, "transformer_hidden_layers": 1}
TOKENS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}
BRAINLM = {"name": "brainlm", "timepoint_patching_size": 4, "conv_kernel_size": 3, **TOKENS}
VITMAE = {"name": "brainlm-vitmae", "image_size": 32, "patch_size": 8, **TOKENS}
SERIES = {"target": None, "normalize": "parcels | voxel-zscore", "window": 8, "stride": 4}
FORECAST = SERIES | {"stats": "context", "context": 4}
PAIRS = {"target": None, "window": 6, "stride": 3, "views": "same-subject"}
TWO_CHANNELS = {"target": None, "window": 2, "stride": 6, "normalize": "tff"}

# Name -> (data, model, objective).
UNSCORED = {
    "contrast": (PAIRS, SWIFT, {"kind": "contrastive"}),
    "contrast-augmented": (PAIRS | {"augment": "swift"}, SWIFT, {"kind": "contrastive", "temperature": 0.5}),
    "contrast-tff": (PAIRS | {"window": 2}, {"name": "tff-contrast", **TFF}, {"kind": "contrastive"}),
    "tff1": (TWO_CHANNELS | {"window": 1}, {"name": "tff1", **TFF}, {"kind": "reconstruct"}),
    "tff2": (TWO_CHANNELS, {"name": "tff2", **TFF}, {"kind": "reconstruct", "perceptual": "random"}),
    "masked": (SERIES, BRAINLM, {"kind": "masked", "mask_ratio": 0.5}),
    "masked-picture": (SERIES, VITMAE, {"kind": "masked", "loss": "l1"}),
    "forecast": (FORECAST, BRAINLM, {"kind": "masked", "masking": "predict_last", "mask_frames": 4}),
    "masked-fitted": (
        SERIES | {"normalize": "parcels | brainlm-robust", "where": "age > 0"},
        BRAINLM,
        {"kind": "masked"},
    ),
}
SCORED = {
    "classes": ({"target": "hand"}, SWIFT, {"kind": "classification"}),
    "huber": ({"target": "age"}, SWIFT | {"head": "v2"}, {"kind": "regression", "loss": "huber", "huber_delta": 0.5}),
    "l1-tff3": (
        {"target": "age", "window": 2, "stride": 6},
        {"name": "tff3", **TFF},
        {"kind": "regression", "loss": "l1"},
    ),
    "random-phase": (
        {"target": "age", "random_phase": True, "orientation": "LPS", "step": 2},
        SWIFT,
        {"kind": "regression"},
    ),
    "series": (SERIES | {"target": "age"}, BRAINLM, {"kind": "regression"}),
    "series-classes": (SERIES | {"target": "hand"}, VITMAE | {"pooling": "mean"}, {"kind": "classification"}),
    "probe": (SERIES | {"target": "age"}, BRAINLM | {"learning": "head"}, {"kind": "regression"}),
    "joint": (
        SERIES | {"target": "age"},
        BRAINLM | {"learning": "all"},
        {"kind": "regression", "reconstruction_weight": 0.5, "mask_ratio": 0.5},
    ),
}


def without_none(values):
    return {key: value for key, value in values.items() if value is not None}


VIT = {"patch_size": [4, 4, 4, 4], "embed_dim": 12, "depth": 1, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
FROM_OTHER_MODULES = {
    "mae4d": ({"target": None}, {"name": "mae4d-pretrain", **VIT, **DECODER}, {"kind": "masked"}),
    "mae4d-forecast": (
        {"target": None, "stats": "context", "context": 4},
        {"name": "mae4d-pretrain", **VIT, **DECODER, "mask": "future", "mask_ratio": 0.5},
        {"kind": "masked", "loss": "l1"},
    ),
    "mae4d-classes": ({"target": "hand"}, {"name": "mae4d", **VIT}, {"kind": "classification"}),
    "cnn_rnn": (
        {"target": "age", "window": 0, "stride": None},
        {"name": "cnn_rnn", "channels": [4, 4], "norm_groups": 2, "hidden": 6},
        {"kind": "regression"},
    ),
    "mlp": (
        {"target": "hand", "normalize": "parcels | voxel-zscore", "window": 0, "stride": None},
        {"name": "mlp", "hidden": [6]},
        {"kind": "classification"},
    ),
    "lstm": (SERIES | {"target": "age"}, {"name": "lstm", "hidden": 6}, {"kind": "regression"}),
}


@pytest.fixture
def make(parcelled):
    """A recipe of one of the tasks; keywords change its sections."""

    def _make(name, **sections):
        data, model, objective = (UNSCORED | SCORED | FROM_OTHER_MODULES)[name]
        tables = {
            "data": {"url": parcelled, "window": 8, "stride": 8} | data,
            "model": model,
            "objective": objective,
            "train": {"steps": 2, "batch_size": 3, "keep_last": 9},
            "eval": {"bootstrap_draws": 20},
        }
        for section, changes in sections.items():
            tables[section] = tables.get(section, {}) | changes
        return recipe_from({section: without_none(values) for section, values in tables.items()})

    return _make


@pytest.mark.parametrize("name", UNSCORED)
def test_tasks_without_a_target_train_and_tell_the_loss_of_every_window(make, tmp_path, name):
    recipe = make(name, train={"eval_every": 1})
    outcome = loop.train(recipe, out=tmp_path, world=ALONE)
    assert isinstance(outcome.test, Windows)
    history = read_history(tmp_path / "log.jsonl")
    assert [math.isfinite(step["loss"]) and step["loss"] > 0 for step in history.steps] == [True, True]
    assert history.evals[-1]["loss"] == outcome.val.numbers["loss"]
    assert history.evals[0]["loss"] != history.evals[1]["loss"]  # something was learnt
    write_report(outcome, recipe, out=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["val"]["num_windows"] == outcome.val.num_windows > 2
    assert "subjects" not in report["val"]


@pytest.mark.parametrize("name", ["contrast", "tff2", "masked", "masked-picture", "joint", "series-classes"])
def test_under_bf16_the_first_losses_are_those_of_fp32_but_for_rounding(make, tmp_path, name):
    found = {}
    for precision in ("fp32", "bf16"):
        still = {"dropout_green": 0.0, "dropout_transformer": 0.0} if name == "tff2" else {}
        recipe = make(
            name, train={"precision": precision, "steps": 1}, data={"val_split": "", "test_split": ""}, model=still
        )
        loop.train(recipe, out=tmp_path / precision, world=ALONE)
        found[precision] = read_history(tmp_path / precision / "log.jsonl").steps[0]
    for what in ("loss", "gradient_norm"):
        assert found["bf16"][what] == pytest.approx(found["fp32"][what], rel=0.05)
    assert found["bf16"]["gradient_norm"] != found["fp32"]["gradient_norm"]


@pytest.mark.parametrize("name", SCORED)
def test_targets_of_each_kind_are_learnt_and_scored_by_subject(make, tmp_path, name):
    recipe = make(name)
    outcome = loop.train(recipe, out=tmp_path, world=ALONE)
    assert (len(outcome.val.label), len(outcome.test.label)) == (3, 3)
    assert np.isfinite(outcome.test.score).all()
    write_report(outcome, recipe, out=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    if recipe.data.target == "hand":
        assert outcome.test.score.shape == (3, 3)
        assert report["classes"] == ["both", "left", "right"]
        assert set(report["test"]["metrics"]) == {"auroc", "accuracy", "balanced_accuracy", "f1"}
    else:
        assert (outcome.test.truth > 10).all()


@pytest.mark.parametrize("name", FROM_OTHER_MODULES)
def test_networks_of_other_modules_train_where_they_are(make, tmp_path, name):
    recipe = make(name)
    outcome = loop.train(recipe, out=tmp_path, world=ALONE)
    assert isinstance(outcome.test, Windows) == (recipe.objective.kind == "masked")
    assert [math.isfinite(step["loss"]) for step in read_history(tmp_path / "log.jsonl").steps] == [True, True]


def test_the_autoencoder_of_volumes_hands_over_its_encoder_and_never_sees_the_future(make, tmp_path):
    recipe = make("mae4d")
    loop.train(recipe, out=tmp_path / "first", world=ALONE)
    start = {"from": str(tmp_path / "first"), "freeze": ["encoder."]}
    loop.train(make("mae4d-classes", start=start), out=tmp_path / "second", world=ALONE)
    before, after = (newest_whole(tmp_path / run / "checkpoints")[0].model for run in ("first", "second"))
    shared = [name for name in after if name.startswith("encoder.")]
    assert len(shared) > 10
    assert all(torch.equal(after[name], before[name]) for name in shared)
    assert not after["encoder.patches.brain"].all()
    for changes in ({"stats": None, "context": None}, {"context": 5}):
        with pytest.raises(UsageError, match="context"):
            loop.train(make("mae4d-forecast", data=changes), out=tmp_path / "third", world=ALONE)


def test_columns_and_side_series_are_standardised_by_training_and_given_to_who_joins_them(make, tmp_path):
    data = {"columns": ["hand", "weight"], "side": ["parcels"], "window": 8, "stride": 8}
    recipe = make("cnn_rnn", data=data)
    with ExitStack() as stack:
        part = loop.open_part(recipe, split="train", seed=0, world=ALONE, stack=stack)
        extras = fit_extras(part.clips, columns=recipe.data.columns, out=tmp_path, world=ALONE)
        again = fit_extras(part.clips, columns=recipe.data.columns, out=tmp_path, world=ALONE)
        assert again == extras
        weights = np.array(part.clips.target_values["weight"])
        dataset = fmristream.open(recipe.data.url)
        runs = [dataset.parcels(run.name).values for run in dataset.runs.where("split", "train")]
        frames = np.concatenate(runs).astype(np.float64)[:, :27]
        assert extras.sizes == {"columns": [3, 0], "side": 28}
        batch = next(iter(part.loader))
        found = extras(batch)
        np.testing.assert_allclose(
            found["columns"][:, 1], (batch.targets["weight"] - weights.mean()) / weights.std(), rtol=1e-4
        )
        assert found["columns"][:, 0].tolist() == batch.targets["hand"].tolist()
        wanted = (batch.side["parcels"][..., :27].numpy() - frames.mean(0)) / frames.std(0)
        np.testing.assert_allclose(found["side"][..., :27], wanted, rtol=1e-3, atol=1e-3)
    outcome = loop.train(recipe, out=tmp_path / "run", world=ALONE)
    assert len(outcome.test.label) == 3
    loop.train(recipe, out=tmp_path / "run", world=ALONE)  # the same statistics, or it would be refused


def test_whole_runs_of_several_lengths_need_a_network_that_knows_them(make):
    recipe = make("classes", data={"window": 0, "stride": None})
    signal = Signal(takes="volume", grid=(12, 12, 12), channels=1, frames=24, varies=True)
    model = make_model(recipe, signal, outputs=3)
    objective = Objective(kind="regression", target="age")
    with pytest.raises(UsageError, match="would take padding for signal"):
        make_task(recipe, model=model, signal=signal, objectives=(objective,))

    class Knowing(torch.nn.Module):
        def forward(self, bold, *, lengths=None):
            return lengths

    task = make_task(recipe, model=Knowing(), signal=signal, objectives=(objective,))
    assert task.inputs.names == {"bold", "lengths"}


def test_whole_runs_come_with_their_lengths(make, tmp_path):
    recipe = make("huber", data={"window": 0, "stride": None}, model={"window_size": [2, 2, 2, 4]})
    with ExitStack() as stack:
        run = loop.start(recipe, out=tmp_path, world=ALONE, stack=stack)
        batch = next(iter(run.train.loader))
        bold, named = dataclasses.replace(run.task.inputs, names=frozenset({"lengths"}))(batch)
        assert bold.shape == (3, 1, 12, 12, 12, 24)
        assert named["lengths"].tolist() == [24, 24, 24]
        assert loop.fit(run, loop.StopRequest())


@pytest.mark.parametrize("name", ["tff1", "tff2", "contrast", "masked", "masked-picture", "joint", "probe"])
def test_every_parameter_that_learns_gets_a_gradient(make, tmp_path, name):
    loop.train(make(name, train={"steps": 1}), out=tmp_path, world=ALONE)
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "step-1")
    stepped = {key.partition("/")[2] for key in checkpoint.optimizer if key.startswith("exp_avg/")}
    frozen = {key for key in checkpoint.model if key.startswith("model.")} if name == "probe" else set()
    buffers = {key for key in checkpoint.model if key.endswith((".pe", "running_mean", "running_var", "tracked"))}
    buffers |= (
        {key for key in checkpoint.model if key.endswith(("position_embeddings", "decoder_pos_embed"))}
        if "picture" in name
        else set()
    )
    assert stepped == set(checkpoint.model) - frozen - buffers


def test_draws_and_losses_do_not_depend_on_how_a_batch_is_shared(make, tmp_path):
    names = ("contrast-augmented", "masked-fitted", "masked-picture", "tff1")
    recipes, alone = tmp_path / "recipes", {}
    recipes.mkdir()
    for name in names:
        still = {"dropout_green": 0.0} if name == "tff1" else {}  # each rank has a dropout of its own
        recipe = make(name, train={"steps": 3, "batch_size": 5}, model=still)
        (recipes / f"{name}.toml").write_text(as_toml(recipe))
        alone[name] = loop.train(recipe, out=tmp_path / name, world=ALONE).val.numbers["loss"]
    ended = finish(start_ranks(2, ["learn", str(tmp_path)], RECIPES=str(recipes)))
    assert [code for code, _ in ended] == [0, 0], ended
    first, second = results(tmp_path, "learn", 2)
    for name in names:
        steps = read_history(tmp_path / name / "log.jsonl").steps
        assert [step["step"] for step in steps] == [1, 2, 3]
        np.testing.assert_allclose(first[name]["losses"], [step["loss"] for step in steps], rtol=1e-5)
        np.testing.assert_allclose(first[name]["norms"], [step["gradient_norm"] for step in steps], rtol=1e-4)
        # A bias before batch normalisation has no gradient but rounding, by which Adam moves it; running means follow.
        rtol = 1e-3 if name.startswith("contrast") else 1e-5
        np.testing.assert_allclose(first[name]["val"], alone[name], rtol=rtol)
        assert second[name]["val"] == first[name]["val"]


@pytest.mark.parametrize("name", ["masked", "contrast-augmented", "masked-fitted"])
def test_an_interrupted_run_goes_on_bit_for_bit(make, tmp_path, name):
    recipe = make(name, train={"steps": 6, "checkpoint_every": 2})
    loop.train(recipe, out=tmp_path / "whole", world=ALONE)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step}")
    loop.train(recipe, out=tmp_path / "again", world=ALONE)
    whole, again = (newest_whole(tmp_path / run / "checkpoints")[0] for run in ("whole", "again"))
    assert again.step == 6
    for key, tensor in whole.model.items():
        assert torch.equal(again.model[key], tensor), key
    losses = [[step["loss"] for step in read_history(tmp_path / run / "log.jsonl").steps] for run in ("whole", "again")]
    assert losses[0] == losses[1]


def test_statistics_are_fitted_once_to_training_runs_and_kept_with_the_run(make, tmp_path):
    recipe = make("masked-fitted")
    loop.train(recipe, out=tmp_path, world=ALONE)
    (kept,) = (tmp_path / "fitted").iterdir()
    loop.train(recipe, out=tmp_path, world=ALONE)
    assert list((tmp_path / "fitted").iterdir()) == [kept]
    fitted = fmristream.load_fitted(str(tmp_path), kept.name)
    assert (fitted.split, fitted.runs) == ("train", 6)


def test_parcels_outside_the_brain_are_left_out_and_the_others_have_their_places(make, tmp_path):
    with ExitStack() as stack:
        run = loop.start(make("masked"), out=tmp_path, world=ALONE, stack=stack)
        clips, inputs = run.train.clips, run.task.inputs
        dataset = fmristream.open(run.recipe.data.url)
        stored = dataset.parcels(0)
        inside = np.flatnonzero(stored.coverage > 0)
        assert inside.tolist() == list(range(27))
        assert clips.voxels == 28
        assert np.isnan(clips.parcel_centres_mm[27]).all()
        assert inputs.parcels.tolist() == inside.tolist()
        mask, affine = dataset.space(0).mask, dataset.runs[0].affine_matrix
        blocks = np.arange(12) // 4
        labels = 9 * blocks[:, None, None] + 3 * blocks[:, None] + blocks
        for parcel, centre in zip(inside, inputs.xyz, strict=True):
            voxels = np.argwhere(mask & (labels == parcel))
            np.testing.assert_allclose(centre, affine[:3, :3] @ voxels.mean(0) + affine[:3, 3], atol=1e-3)
        batch = next(iter(run.train.loader))
        series, named = inputs(batch)
        assert series.shape == (3, len(inside), 8)
        assert set(named) == {"xyz"}
        assert (series.std(2) > 0).all()


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("contrast", "huber", "model.patch_embed.fc.weight"),
        ("tff1", "tff2", "encoder.down_block1.conv0.weight"),
        ("masked", "probe", "vit.layernorm.weight"),
        ("masked-picture", "series-classes", "vit.layernorm.weight"),
        ("joint", "masked", "vit.layernorm.weight"),
    ],
)
def test_a_run_begins_with_the_weights_of_another_one(make, tmp_path, first, second, shared):
    data = {"window": 8} if first == "contrast" else {}
    loop.train(make(first, data=data), out=tmp_path / "first", world=ALONE)
    recipe = make(second, start={"from": str(tmp_path / "first")}, optim={"lr": 1e-12})
    loop.train(recipe, out=tmp_path / "second", world=ALONE)
    before, after = (newest_whole(tmp_path / run / "checkpoints")[0].model for run in ("first", "second"))
    here, there = (next(name for name in state if name.endswith(shared)) for state in (before, after))
    torch.testing.assert_close(after[there], before[here])
    assert '"event": "begin"' in (tmp_path / "second" / "log.jsonl").read_text()


def test_weights_that_were_trained_with_other_heads_are_refused_though_every_shape_fits(make, tmp_path):
    heads = TFF["num_attention_heads"]
    loop.train(make("tff2"), out=tmp_path / "first", world=ALONE)
    start, model = {"from": str(tmp_path / "first")}, {"num_attention_heads": 2 * heads}
    data = {"normalize": "tff"}
    with pytest.raises(
        WeightsError, match=rf"another num_attention_heads \({heads}, the recipe's network has {2 * heads}"
    ):
        loop.train(make("l1-tff3", data=data, start=start, model=model), out=tmp_path / "second", world=ALONE)
    with pytest.raises(ResumeError, match="trained with another num_attention_heads"):
        loop.train(make("tff2", model=model), out=tmp_path / "first", world=ALONE)
    loop.train(make("l1-tff3", data=data, start=start), out=tmp_path / "third", world=ALONE)
    # The first phase has no heads that could be others.
    loop.train(make("tff1"), out=tmp_path / "phase1", world=ALONE)
    start = {"from": str(tmp_path / "phase1")}
    loop.train(make("tff2", start=start, model=model), out=tmp_path / "phase2", world=ALONE)


@pytest.mark.parametrize("is_older", [False, True])
def test_a_file_of_weights_is_held_against_what_it_says_of_its_network(make, tmp_path, is_older):
    heads, file = TFF["num_attention_heads"], tmp_path / "weights.safetensors"
    loop.train(make("tff2", train={"steps": 1}), out=tmp_path / "first", world=ALONE)
    size = ["--set", "img_size=[12,12,12,2]"]  # which the recipe took from the data
    assert export.main([str(tmp_path / "first"), "--to", str(file), *size]) == 0
    if is_older:  # files of the first releases have the options of the recipe alone
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["fmristream"])
        del about["network"]
        save_file(load_file(file), file, {"fmristream": json.dumps(about)})
    start, data = {"from": str(file)}, {"normalize": "tff"}
    model = {"num_attention_heads": 2 * heads}
    with pytest.raises(
        WeightsError, match=rf"another num_attention_heads \({heads}, the recipe's network has {2 * heads}"
    ):
        loop.train(make("l1-tff3", data=data, start=start, model=model), out=tmp_path / "second", world=ALONE)
    loop.train(make("l1-tff3", data=data, start=start), out=tmp_path / "third", world=ALONE)
    assert '"event": "begin"' in (tmp_path / "third" / "log.jsonl").read_text()


def test_frozen_parameters_stay_and_the_others_learn(make, tmp_path):
    loop.train(make("contrast", data={"window": 8}), out=tmp_path / "first", world=ALONE)
    start = {"from": str(tmp_path / "first" / "checkpoints" / "step-2"), "freeze": ["model."]}
    loop.train(make("classes", start=start), out=tmp_path / "second", world=ALONE)
    before, after = (newest_whole(tmp_path / run / "checkpoints")[0] for run in ("first", "second"))
    for name, tensor in after.model.items():
        if name.startswith("model."):
            assert torch.equal(tensor, before.model[name])
    assert {key.partition("/")[2] for key in after.optimizer} == {"output_head.head.weight", "output_head.head.bias"}


@pytest.mark.parametrize(
    ("name", "sections", "sentence"),
    [
        ("masked", {"data": {"normalize": "voxel-zscore"}}, "'brainlm' takes series, got volume"),
        ("classes", {"data": {"normalize": "parcels"}}, "'swift' takes volume, got series"),
        ("contrast", {"model": {"head": "v1"}}, "'v1' is not one for"),
        ("contrast", {"data": {"views": None}}, "learns from two views"),
        ("contrast", {"data": {"target": "hand"}}, "has no target"),
        ("masked", {"data": {"window": 0, "stride": None}}, "learns from windows"),
        ("classes", {"model": {"name": "tff1"}}, "'tff1' learns by reconstruct, got objective.kind 'classification'"),
        ("classes", {"data": {"columns": ["hand"]}}, "told what it is to learn"),
        ("classes", {"data": {"columns": ["age"]}}, "swift has no option columns"),
        ("masked", {"data": {"columns": ["age"]}}, "are of objectives with a target"),
        ("classes", {"model": {"in_chans": 2}}, "model.in_chans 2: data.normalize 'voxel-zscore' gives 1 channels"),
        ("classes", {"model": {"name": "lstms"}}, "did you mean lstm"),
        ("classes", {"data": {"window": 0}}, "no stride"),
        ("tff1", {"data": {"normalize": "voxel-zscore"}}, "two channels"),
        (
            "forecast",
            {"data": {"stats": None, "context": None}},
            "know the frames to predict; set data.stats = 'context'",
        ),
        ("forecast", {"data": {"context": 5}}, "set data.context = 4"),
        ("masked", {"objective": {"mask_frames": 4}}, "needs a predicting mode"),
        ("joint", {"objective": {"reconstruction_weight": None, "mask_ratio": None}}, "set both or neither"),
        (
            "probe",
            {"start": {"freeze": ["vit."]}},
            "no parameter's name begins with 'vit.'; the network has model, output_head",
        ),
        ("probe", {"start": {"from": "/nowhere"}}, "there is no such folder"),
        ("probe", {"start": {"from": "/nowhere", "keep_cls": True}}, "start.keep_cls is of tff"),
    ],
)
def test_what_does_not_fit_is_said_before_training(make, tmp_path, name, sections, sentence):
    with pytest.raises(UsageError) as caught:
        loop.train(make(name, **sections), out=tmp_path, world=ALONE)
    assert sentence in str(caught.value)


def test_a_checkpoint_of_another_task_is_refused(make, tmp_path):
    loop.train(make("masked"), out=tmp_path, world=ALONE)
    with pytest.raises(ResumeError, match="was trained for"):
        loop.train(make("masked", objective={"mask_ratio": 0.25}), out=tmp_path, world=ALONE)


def test_a_checkpoint_of_the_first_releases_is_gone_on_from(make, tmp_path, monkeypatch):
    recipe = make("huber", objective={"loss": "mse", "huber_delta": None})
    written = resuming.as_json
    monkeypatch.setattr(
        resuming, "as_json", lambda state: {key: written(state)[key] for key in ("kind", "target", "offset", "scale")}
    )
    loop.train(recipe, out=tmp_path, world=ALONE)
    monkeypatch.undo()
    (step,) = checkpoint_steps(tmp_path / "checkpoints")
    assert set(load_checkpoint(tmp_path / "checkpoints" / f"step-{step}").state["objective"]) == {
        "kind",
        "target",
        "offset",
        "scale",
    }
    assert loop.train(recipe, out=tmp_path, world=ALONE).step == 2


def test_classes_that_only_test_subjects_have_are_refused_before_training(make, tmp_path):
    recipe = make("classes", data={"where": "hand != 'left' or split != 'train'"})
    with pytest.raises(UsageError, match="classes that no training subject has"):
        loop.train(recipe, out=tmp_path, world=ALONE)


def test_a_model_whose_module_is_not_here_is_told(monkeypatch, capsys):
    monkeypatch.setitem(
        models.MODELS, "later", models.Family(build="train.models.later:f", begin="", learns=("masked",))
    )
    with pytest.raises(UsageError, match=r"needs train\.models\.later, which this copy does not have; it has swift"):
        models.build_model("later", {})


@pytest.mark.parametrize("name", ["masked", "masked-picture", "forecast", "mae4d", "mae4d-forecast"])
def test_frames_that_were_scrubbed_do_not_count_among_what_was_hidden(make, tmp_path, name):
    recipe = make(name, data={"val_split": "", "test_split": ""})
    distance = np.abs if name in ("masked-picture", "mae4d-forecast") else np.square
    with ExitStack() as stack:
        run = loop.start(recipe, out=tmp_path, world=ALONE, stack=stack)
        batch = next(iter(run.train.loader)).to("cpu")
        kept = torch.tensor([[1, 0, 1, 1, 1, 1, 0, 1], [1] * 8, [0] * 8], dtype=torch.bool)
        scrubbed = dataclasses.replace(batch, kept=kept)
        run.model.eval()
        plain, losses = (run.task.losses(run.model, one) for one in (batch, scrubbed))
        signal, named = run.task.inputs(batch)
        found = run.model(signal, **named, **run.task.hiding(signal, batch))
        if recipe.model.name == "mae4d-pretrain":  # on the grid, where a value's frame is its last axis
            predicted, target, hidden = (
                run.model.volumes(values, found.hidden, frames=8)
                for values in (found.predicted, found.target, found.counted.float())
            )
        else:
            predicted, target, hidden = found.series, signal, found.hidden
        gaps = distance((predicted.double() - target.double()).detach().numpy())
        for row, frames in enumerate(kept.numpy()):
            chosen = hidden[row].numpy().astype(bool) & frames
            expected = gaps[row][chosen].mean() if chosen.any() else 0.0
            assert losses[row].item() == pytest.approx(expected, rel=1e-4)
        assert losses[0] != plain[0]
        assert losses[1] == plain[1]
        assert losses[2] == 0
        rows = run.task.rows(run.model, scrubbed)
        assert rows[:, 1].tolist() == [1, 1, 0]
        mean = run.task.window_losses(rows, ["a", "b", "c"]).nanmean().item()
        assert mean == pytest.approx((losses[0].item() + losses[1].item()) / 2)  # not of the window that has nothing


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_shipped_recipe_fits_its_network(name, capsys):
    assert main([name, "--check"]) == 0, capsys.readouterr().err
