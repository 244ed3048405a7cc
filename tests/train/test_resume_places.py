"""A run goes on from a bucket as from a disk; what begins with another run finds its checkpoints wherever they are."""

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fmristream import convert
from fmristream.errors import StorageError, UsageError
from fmristream.ingest.options import ConvertOptions
from train import build, loop
from train.checkpoint import checkpoint_steps, find_checkpoint, load_checkpoint, newest_whole
from train.config import as_toml, recipe_from
from train.launch import World
from train.main import main
from train.report import read_history
from train.resuming import resume, resume_rest, save, settle

from .checkpoint_places import assert_same, checkpoint_at, save_sharded, save_whole

OLD = Path(__file__).parents[1] / "golden" / "checkpoint_format_1"


def losses(out):
    return [entry["loss"] for entry in read_history(out / "log.jsonl").steps]


@pytest.fixture
def quick(small_recipe):
    """No scores, a checkpoint after every third step."""

    def make(**train):
        return small_recipe(
            data={"val_split": "", "test_split": ""},
            train={"steps": 7, "checkpoint_every": 3, "keep_last": 2, **train},
        )

    return make


@pytest.mark.parametrize("is_async", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_run_that_keeps_its_checkpoints_in_a_bucket_goes_on_from_there_to_the_bit(quick, tmp_path, s3_url, is_async):
    loop.train(quick(), out=tmp_path / "alone", world=World())
    there = f"{s3_url}/run"
    first = quick(steps=4, checkpoints=there, checkpoint_async=is_async)
    recipe = quick(checkpoints=there, checkpoint_async=is_async)
    with pytest.MonkeyPatch.context() as patch:  # the same schedule as the whole run
        patch.setattr("train.loop.learning_rate", lambda step, config, total_steps: rate(step, config, recipe))
        loop.train(first, out=tmp_path / "run", world=World())
    assert checkpoint_steps(there) == [4, 3]
    loop.train(recipe, out=tmp_path / "run", world=World())
    assert checkpoint_steps(there) == [7, 6]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    ours, theirs = load_checkpoint(f"{there}/step-7"), newest_whole(tmp_path / "alone" / "checkpoints")[0]
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in theirs.model)
    found, _ = find_checkpoint(tmp_path / "run")  # followed from the folder to the bucket
    assert found.where.startswith("s3://")


def rate(step, config, recipe):
    from train.optim import learning_rate

    return learning_rate(step, config=config, total_steps=recipe.train.steps)


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_same_command_goes_on(quick, tmp_path, capsys):
    file = tmp_path / "quick.toml"
    file.write_text(as_toml(quick()))
    arguments = [str(file), "--out", str(tmp_path / "run")]
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert main([*arguments, "--set", "train.steps=3"]) == 0
    largest = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "step-3").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    said = capsys.readouterr().err
    assert "step 6 could not be written" in said
    assert "File too large" in said
    assert newest_whole(tmp_path / "run" / "checkpoints")[0].step == 3
    assert main(arguments) == 0
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [7, 6]


def test_a_run_of_the_first_format_goes_on_as_it_did_then(tmp_path):
    convert(
        "synth://?subjects=8&shape=12x12x12&frames=36&effect=coupling&strength=1.6",
        "memory://fixture/dataset",
        options=ConvertOptions(split="exact", split_ratios=(0.5, 0.25, 0.25)),
    )
    shutil.copytree(OLD, tmp_path / "checkpoints")
    saved = json.loads((OLD / "step-3" / "state.json").read_text())
    recipe = recipe_from(saved["recipe"])
    recipe = replace(recipe, train=replace(recipe.train, steps=6))
    loop.train(recipe, out=tmp_path, world=World())
    # What the release that wrote it made of these steps.
    assert losses(tmp_path) == pytest.approx([0.9559993147850037, 0.9483221769332886, 0.9568032622337341], rel=1e-5)
    assert checkpoint_steps(tmp_path / "checkpoints") == [6, 5, 3]


class Average:
    """Something that a run keeps, as an average of weights would be."""

    def __init__(self, value, count):
        self.value, self.count = torch.full((3,), float(value)), count

    def tensors(self):
        return {"value": self.value}

    def facts(self):
        return {"count": self.count}

    def restore(self, tensors, facts):
        self.value, self.count = tensors["value"], facts["count"]


class Counter:
    """Something that has no tensors."""

    def __init__(self, count):
        self.count = count

    def tensors(self):
        return {}

    def facts(self):
        return {"count": self.count}

    def restore(self, tensors, facts):
        assert not tensors
        self.count = facts["count"]


def test_what_a_run_keeps_beside_its_weights_comes_back_and_what_is_missing_is_said(quick, tmp_path):
    from contextlib import ExitStack

    with ExitStack() as stack:
        run = loop.start(quick(), out=tmp_path, world=World(), stack=stack)
        run.extra = {"ema": Average(2.5, 7), "best": Counter(4)}
        run.step = 1
        save(run, is_best=True)
        save(run)  # the same step again changes nothing
        settle(run)
        assert sorted(path.name for path in (tmp_path / "checkpoints" / "step-1").iterdir()) == [
            "ema.safetensors",
            "manifest.json",
            "model.safetensors",
            "optimizer.safetensors",
            "rng.safetensors",
            "state.json",
        ]
        run.extra = {"ema": Average(0, 0), "best": Counter(0), "scaler": Counter(9)}
        found = resume(run)
        assert found.name == "step-1"
        resume_rest(run, found)
        assert torch.equal(run.extra["ema"].value, torch.full((3,), 2.5))
        assert (run.extra["ema"].count, run.extra["best"].count, run.extra["scaler"].count) == (7, 4, 9)
    kept = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"kept"' in line]
    assert "scaler" in json.loads(kept[-1])
    assert find_checkpoint(tmp_path / "best")[0].step == 1


@pytest.mark.parametrize("save_it", [save_whole, save_sharded])
@pytest.mark.parametrize("kind", ["tmp_path", "memory_url", pytest.param("s3_url", marks=pytest.mark.full)])
def test_weights_to_begin_with_come_from_a_run_a_checkpoint_the_best_or_a_bucket(request, kind, save_it):
    run = str(request.getfixturevalue(kind))
    for step in (1, 2, 3):
        save_it(f"{run}/checkpoints", checkpoint_at(step, is_best=step == 1), keep_last=2, keep_best=1)
    for place, step in (
        (run, 3),
        (f"{run}/checkpoints", 3),
        (f"{run}/checkpoints/", 3),
        (f"{run}/checkpoints/step-2", 2),
        (f"{run}/best", 1),
        (f"{run}/checkpoints/best", 1),
    ):
        assert_same(find_checkpoint(place)[0].whole(), checkpoint_at(step))
        weights, *_ = build._weights_of(place)
        assert torch.equal(weights["weight"], checkpoint_at(step).model["weight"])


def test_where_there_is_no_checkpoint_it_is_said_without_secrets(tmp_path, memory_url):
    assert find_checkpoint(tmp_path / "nothing") == (None, [])
    assert find_checkpoint(f"{memory_url}/nothing") == (None, [])
    with pytest.raises(UsageError, match="expected a run"):
        build._weights_of(f"{memory_url}/nothing")
    with pytest.raises(UsageError) as caught:
        build._weights_of("s3://user:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


def test_a_lost_bucket_ends_the_run_before_its_first_step(quick, tmp_path, s3_endpoint):
    assert os.environ["AWS_ENDPOINT_URL"] == s3_endpoint
    with pytest.raises(StorageError, match="no-such-bucket"):
        loop.train(quick(checkpoints="s3://no-such-bucket/run"), out=tmp_path, world=World())
    assert losses(tmp_path) == []
