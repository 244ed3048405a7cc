"""A whole run in one process: it learns from where it stood, scores every window once, and stops before it spoils anything."""

import json
import math
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from fmristream.errors import ResumeError, UsageError
from tests.train.small import write_small
from train import loop
from train.checkpoint import checkpoint_steps, load_checkpoint
from train.evaluate import NonFiniteError, scores_of
from train.launch import StopRequest, World
from train.log import read_history
from train.main import main
from train.report import write_report
from train.scoring import predictions

ALONE = World()


def final_weights(out):
    return load_checkpoint(out / "checkpoints" / f"step-{checkpoint_steps(out / 'checkpoints')[0]}").model


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    """An uninterrupted run by the command line, and where it wrote."""
    out = tmp_path_factory.mktemp("run")
    recipe = write_small(
        out,
        cohort,
        train={"steps": 30, "checkpoint_every": 5, "keep_last": 9, "eval_every": 10},
        eval={"baselines": False},
    )
    assert main([str(recipe), "--out", str(out / "run")]) == 0
    return recipe, out / "run"


def test_a_run_leaves_its_recipe_log_checkpoints_report_and_picture(finished):
    _, out = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "MODEL_CARD.md",
        "checkpoints",
        "curves.png",
        "leaks.json",
        "log.jsonl",
        "predictions.parquet",
        "provenance.json",
        "recipe.toml",
        "report.html",
        "report.json",
        "tensorboard",
    ]
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert checkpoint_steps(out / "checkpoints") == [30, 25, 20, 15, 10, 5]
    report = json.loads((out / "report.json").read_text())
    assert (report["val"]["num_subjects"], report["test"]["num_subjects"]) == (4, 6)
    low, high = report["test"]["intervals"]["auroc"]
    assert 0 <= low <= report["test"]["metrics"]["auroc"] <= high <= 1
    assert main([str(out / "recipe.toml"), "--check"]) == 0


def test_every_window_of_an_epoch_is_taken_once(finished):
    steps = read_history(finished[1] / "log.jsonl").steps
    assert [entry["step"] for entry in steps] == list(range(1, 31))
    windows = [window for entry in steps for window in entry["windows"]]
    assert sorted(windows[:50]) == sorted(windows[50:100]) == list(range(50))
    assert windows[:50] != windows[50:100]
    assert [entry["position"] for entry in steps] == list(range(0, 120, 4))
    assert [entry["epoch"] for entry in steps[:14]] == [0] * 13 + [1]


def test_a_finished_run_is_only_scored_again(finished, tmp_path):
    recipe, out = finished
    shutil.copytree(out, tmp_path / "run")
    before = json.loads((out / "report.json").read_text())
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == before
    assert len(read_history(tmp_path / "run" / "log.jsonl").steps) == 30


@pytest.mark.parametrize("step", [5, 15])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, tmp_path, step):
    recipe, out = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    for later in checkpoint_steps(again / "checkpoints"):
        if later > step:
            shutil.rmtree(again / "checkpoints" / f"step-{later}")
    with open(again / "log.jsonl", "a") as log:
        log.write('{"event": "step", "st')  # as a kill leaves it
    assert main([str(recipe), "--out", str(again)]) == 0
    for name, tensor in final_weights(out).items():
        assert torch.equal(final_weights(again)[name], tensor), name
    ours, theirs = read_history(again / "log.jsonl"), read_history(out / "log.jsonl")
    kept = ("step", "epoch", "position", "loss", "lr", "gradient_norm", "windows")
    assert [[e[k] for k in kept] for e in ours.steps] == [[e[k] for k in kept] for e in theirs.steps]
    assert ours.evals == theirs.evals
    assert f'"resumed_from": "step-{step}"' in (again / "log.jsonl").read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(finished, tmp_path, capsys):
    recipe, out = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    (again / "checkpoints" / "step-30" / "model.safetensors").write_bytes(b"")
    assert main([str(recipe), "--out", str(again)]) == 0
    said = capsys.readouterr().out
    assert "damaged: checkpoint step-30" in said
    assert "resumed_from step-25" in said
    for name, tensor in final_weights(out).items():
        assert torch.equal(final_weights(again)[name], tensor), name


def test_a_resumed_run_says_what_it_does_otherwise(finished, tmp_path, capsys):
    recipe, out = finished
    shutil.copytree(out, tmp_path / "run")
    assert main([str(recipe), "--out", str(tmp_path / "run"), "--set", "optim.lr=5e-4", "--set", "train.steps=31"]) == 0
    said = capsys.readouterr().out
    assert "changed: optim.lr 0.001 -> 0.0005, train.steps 30 -> 31\n" in said


def test_of_a_finished_run_a_recipe_that_would_have_trained_otherwise_is_refused(finished, tmp_path, capsys):
    recipe, out = finished
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main([str(recipe), "--out", str(out), "--set", "optim.lr=4", "--set", "train.batch_size=6"]) == 2
    said = capsys.readouterr().err
    assert "its 30 steps are done" in said
    assert "(optim.lr 0.001 -> 4.0, train.batch_size 4 -> 6)" in said
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() if path.name != "log.jsonl"} == {
        name: data for name, data in before.items() if name != "log.jsonl"
    }


def test_a_batch_larger_than_the_split_is_refused(small_recipe, tmp_path):
    with pytest.raises(UsageError, match=r"train.batch_size 99999: split 'train' has 50 windows"):
        loop.train(small_recipe(train={"batch_size": 99999}), out=tmp_path, world=ALONE)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.window=9", "window"),
        ("data.stride=8", "stride"),
        ("train.seed=1", "seed"),
        (
            "model.embed_dim=12",
            "was made by another network than the recipe's; give another --out, or the recipe of then: ",
        ),
        ("model.embed_dim=12", "; and "),
    ],
)
def test_a_checkpoint_of_another_stream_or_network_is_refused(finished, capsys, change, sentence):
    recipe, out = finished
    assert main([str(recipe), "--out", str(out), "--set", change]) == 1
    assert sentence in capsys.readouterr().err


def test_every_window_of_every_subject_is_scored_once_whatever_the_batch(small_recipe, tmp_path):
    tables = []
    for batch_size in (1, 4, 64):
        with ExitStack() as stack:
            recipe = small_recipe(eval={"batch_size": batch_size, "stride": 3})
            run = loop.start(recipe, out=tmp_path / str(batch_size), world=ALONE, stack=stack)
            found = predictions(run, {"test": run.test})
            assert run.test.clips.num_windows == len(found) == 6 * 10
            tables.append((found, scores_of(found, "test")))
            assert run.model.training
    for found, subjects in tables:
        assert found.numbers["window"].tolist() == list(range(60))
        scores = found.values["score_sex"]
        np.testing.assert_allclose(scores, tables[0][0].values["score_sex"], rtol=1e-5, atol=1e-6)
        assert subjects.label == tables[0][1].label
        assert len(subjects.label) == 6
        means = scores.reshape(6, 10).mean(axis=1)
        np.testing.assert_allclose(np.sort(subjects.score), np.sort(means), rtol=1e-6)


def test_a_number_is_standardised_by_training_subjects_and_reported_in_its_own_unit(small_recipe, tmp_path):
    recipe = small_recipe(data={"target": "age"}, objective={"kind": "regression"})
    outcome = loop.train(recipe, out=tmp_path, world=ALONE)
    with ExitStack() as stack:
        part = loop.open_part(recipe, split="train", seed=0, world=ALONE, stack=stack)
        ages = np.array(part.clips.target_values["age"])
    assert outcome.task.objective.offset == pytest.approx(ages.mean())
    assert outcome.task.objective.scale == pytest.approx(ages.std())
    assert (outcome.test.truth > 10).all()
    # Hardly trained, the net says about the mean age.
    assert np.abs(outcome.test.score - ages.mean()).max() < 3 * ages.std()
    write_report(outcome, recipe, out=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["test"]["metrics"]) == {"mae", "mse", "r", "r_squared", "r2"}
    assert "threshold" not in report


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_its_windows(small_recipe, tmp_path):
    recipe = small_recipe(train={"checkpoint_every": 1}, optim={"lr": 1e-3})
    with ExitStack() as stack:
        run = loop.start(recipe, out=tmp_path, world=ALONE, stack=stack)
        with torch.no_grad():
            next(run.model.parameters()).fill_(torch.inf)
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        with pytest.raises(NonFiniteError, match=r"step 1: .* windows \[") as caught:
            loop.fit(run, loop.StopRequest())
        with ExitStack() as other:
            again = loop.open_part(recipe, split="train", seed=0, world=ALONE, stack=other)
            assert str(next(iter(again.loader)).window.tolist()) in str(caught.value)
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(tensor, before[name])
    assert checkpoint_steps(tmp_path / "checkpoints") == []


def test_asked_to_stop_a_run_saves_and_goes_on_later(small_recipe, tmp_path):
    recipe = small_recipe()
    with ExitStack() as stack:
        run = loop.start(recipe, out=tmp_path, world=ALONE, stack=stack)
        stop = loop.StopRequest()
        stop.is_asked = True
        assert not loop.fit(run, stop)
    assert checkpoint_steps(tmp_path / "checkpoints") == [1]
    outcome = loop.train(recipe, out=tmp_path, world=ALONE)
    assert outcome.step == 12
    assert [entry["step"] for entry in read_history(tmp_path / "log.jsonl").steps] == list(range(1, 13))


class AskedAt(StopRequest):
    """A signal that comes at a certain look for one: the first are those before each step and each batch of a look."""

    def __init__(self, moment):
        self.moments_left = moment
        super().__init__()

    @property
    def is_asked(self):
        self.moments_left -= 1
        return self._is_asked or self.moments_left < 0

    @is_asked.setter
    def is_asked(self, value):
        self._is_asked = value


def history_of(out):
    log = read_history(out / "log.jsonl")
    steps = [(entry["step"], entry["loss"]) for entry in log.steps]
    return steps, log.evals


def test_a_signal_at_any_moment_also_of_a_look_or_the_last_scoring_changes_nothing(small_recipe, tmp_path):
    recipe = small_recipe(
        train={"steps": 4, "eval_every": 2, "ema": 0.9}, optim={"lr": 1e-2}, eval={"use": "best", "batch_size": 8}
    )
    expected = loop.train(recipe, out=tmp_path / "undisturbed", world=World())
    states, moment, outcome = set(), 0, None
    while outcome is None:
        out = tmp_path / str(moment)
        outcome = loop.train(recipe, out=out, world=World(stop=AskedAt(moment)))
        if outcome is None:
            newest = max(checkpoint_steps(out / "checkpoints"))
            states.add((newest, load_checkpoint(out / "checkpoints" / f"step-{newest}").state["look_is_due"]))
            again = loop.train(recipe, out=out, world=World())
            assert not load_checkpoint(out / "checkpoints" / "step-4").state["look_is_due"], moment
            assert np.array_equal(again.table.values["score_sex"], expected.table.values["score_sex"]), moment
            assert history_of(out) == history_of(tmp_path / "undisturbed"), moment
        moment += 1
    assert states == {(1, False), (2, True), (3, False), (4, True), (4, False)}


def test_without_validation_subjects_the_threshold_is_zero_and_says_why(small_recipe, tmp_path):
    recipe = small_recipe(data={"val_split": ""})
    outcome = loop.train(recipe, out=tmp_path, world=ALONE)
    assert outcome.val is None
    write_report(outcome, recipe, out=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["threshold"] == 0
    assert "no validation subjects" in report["threshold_chosen_on"]
    assert "val" not in report


def test_bf16_trains_on_a_cpu_too_and_its_scores_are_float32(small_recipe, tmp_path):
    outcome = loop.train(small_recipe(train={"precision": "bf16", "steps": 2}), out=tmp_path, world=ALONE)
    assert all(math.isfinite(score) for score in outcome.test.score)
    assert len(set(outcome.test.score.tolist())) == 6


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"data": {"target": "age"}}, "classification needs two classes"),
        ({"objective": {"kind": "regression"}}, "regression needs numbers"),
        ({"data": {"target": "height"}}, "height"),
        ({"data": {"train_split": "trian"}}, "trian"),
        ({"model": {"img_size": [12, 12, 12, 8]}}, "model.img_size follows from the data"),
        ({"model": {"embed_dims": 12}}, "did you mean embed_dim"),
        ({"model": {"name": "swif"}}, "swift"),
        ({"data": {"grid": [13, 13, 13]}}, "pad or crop the grid"),
    ],
)
def test_what_data_and_network_cannot_do_is_said_before_training(small_recipe, tmp_path, sections, sentence):
    with pytest.raises(UsageError, match=sentence):
        loop.train(small_recipe(**sections), out=tmp_path, world=ALONE)


def test_check_also_looks_at_the_network(capsys):
    assert main(["swift_sex", "--check"]) == 0
    assert main(["swift_sex", "--check", "--set", "model.embed_dims=12"]) == 2
    assert main(["swift_sex", "--check", "--set", "data.grid=[91, 109, 91]"]) == 2
    said = capsys.readouterr()
    assert "embed_dim = 36" in said.out
    assert "did you mean embed_dim" in said.err
    assert "pad or crop the grid" in said.err


def test_a_recipe_without_a_dataset_is_wrong_usage(capsys):
    assert main(["swift_tiny_cpu"]) == 2
    assert "data.url is not set" in capsys.readouterr().err


def test_state_of_another_dataset_is_refused(small_recipe, tmp_path, tmp_path_factory):
    loop.train(small_recipe(train={"steps": 2}), out=tmp_path, world=ALONE)
    with pytest.raises(ResumeError):
        loop.train(
            small_recipe(train={"steps": 3}, data={"train_split": "test", "test_split": ""}), out=tmp_path, world=ALONE
        )


def test_a_checkpoint_of_another_objective_is_refused(finished, capsys):
    recipe, out = finished
    arguments = [str(recipe), "--out", str(out), "--set", "objective.kind=regression", "--set", "data.target=age"]
    assert main(arguments) == 1
    assert "was trained for" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_with_what_to_do(cohort, tmp_path, capsys):
    (tmp_path / "file").touch()
    recipe = str(write_small(tmp_path, cohort))
    assert main([recipe, "--out", str(tmp_path / "file")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"train: {tmp_path / 'file'}: File exists; the same command goes on, once --out is a folder")
    with pytest.raises(SystemExit) as ended:
        main([recipe, "--out", ""])
    assert ended.value.code == 2
    assert "expected a folder, got an empty string" in capsys.readouterr().err


def test_no_evaluation_batch_is_padded_beyond_its_split(small_recipe):
    recipe = small_recipe(eval={"batch_size": 10**9})
    with ExitStack() as stack:
        part = loop.open_part(recipe, split="val", seed=None, world=ALONE, stack=stack)
        (batch,) = part.loader
        assert (batch.global_size, bool(batch.valid.all())) == (part.clips.num_windows, True)


def test_credentials_in_a_url_are_not_even_printed(capsys):
    assert main(["swift_tiny_cpu", "--check", "--set", "data.url=s3://KEY:SECRET@bucket/ds"]) == 2
    shown = capsys.readouterr()
    assert "SECRET" not in shown.out + shown.err
