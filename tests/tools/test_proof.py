"""The proof's cells by the trainer's own loop; the command goes on where it was stopped."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.proof import ROOT, main
from tools.proof_cells import NETWORKS, Cell, Settings
from tools.proof_results import read_lines
from tools.proof_train import NotThereError, compute
from train import models as train_models

TINY = Settings(subjects=10, shape=(20, 20, 20), frames=32, window=16, stride=16, batch_size=4, steps=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("proof")


def cell(model="swift", given=None, effect="coupling"):
    return Cell(effect=effect, model=model, input=given or NETWORKS[model].inputs[0], seed=0)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(given, marks=[pytest.mark.full] if given in ("global", "two") else [])
        for given in NETWORKS["swift"].inputs
    ],
)
def test_swift_trains_on_every_input_and_scores_every_test_subject(out, given):
    done = compute(cell(given=given), TINY, out=out)
    assert len(done.scores.subject) == 4
    assert np.isfinite(done.scores.score).all()
    assert set(done.scores.truth) <= {0.0, 1.0}
    assert done.facts["num_train"] == 6
    assert done.facts["parameters"] > 50_000
    assert 0.2 < done.facts["last_loss"] < 3
    assert not list((out / "training").glob("*/checkpoints"))


def test_shuffled_frames_change_scores_and_training_is_repeatable(out):
    first = compute(cell(given="voxel"), TINY, out=out)
    again = compute(cell(given="voxel"), TINY, out=out)
    np.testing.assert_array_equal(first.scores.score, again.scores.score)
    np.testing.assert_array_equal(first.scores.shuffled, again.scores.shuffled)
    assert (first.scores.score != first.scores.shuffled).any()


@pytest.mark.parametrize("model", [model for model in NETWORKS if model != "swift"])
def test_every_other_network_trains(out, model):
    done = compute(cell(model), TINY, out=out)
    assert np.isfinite(done.scores.score).all()
    assert 10_000 < done.facts["parameters"] < 400_000


def test_a_network_that_the_trainer_does_not_have_is_named_as_missing(out, monkeypatch):
    models = {name: family for name, family in train_models.MODELS.items() if name != "mae4d"}
    monkeypatch.setattr(train_models, "MODELS", models)
    with pytest.raises(NotThereError, match="mae4d"):
        compute(cell("mae4d"), TINY, out=out)


def test_the_command_does_what_is_left_and_nothing_twice(tmp_path, capsys):
    words = [str(tmp_path), "--models", "mean", "swift", "--effects", "coupling", "--seeds", "0"]
    words += ["--subjects", "10", "--steps", "1"]
    assert main([*words, "--plan"]) == 0
    assert "0 of 6 cells are done; 6 left" in capsys.readouterr().out
    assert main([*words[:2], "mean", *words[4:], "--hours", "0"]) == 0
    assert "left for another time" in capsys.readouterr().out
    assert not read_lines(tmp_path / "results.jsonl")
    assert main([*words[:2], "mean", *words[4:]]) == 0
    assert "coupling/mean/features/0: AUROC" in capsys.readouterr().out
    assert main([*words[:2], "mean", *words[4:], "--report", str(tmp_path / "page.md")]) == 0
    told = capsys.readouterr().out
    assert "1 of 1 cells are done; 0 left" in told
    assert "AUROC" not in told
    assert len(read_lines(tmp_path / "results.jsonl")) == 1
    assert "1 of 1 cells are finished." in (tmp_path / "page.md").read_text()
    assert main([*words[:2], "man", *words[4:]]) == 2


@pytest.mark.full
def test_a_stopped_training_goes_on_from_its_checkpoint(tmp_path):
    command = [sys.executable, "tools/proof.py", str(tmp_path), "--models", "swift", "--effects", "coupling"]
    command += ["--seeds", "0", "--subjects", "10", "--steps", "30"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not any(_steps(log) >= 5 for log in tmp_path.glob("training/*/log.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    (checkpoint,) = tmp_path.glob("training/*voxel*/checkpoints/step-*")
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= stopped_at < 30
    assert subprocess.run(command, cwd=ROOT, timeout=600).returncode == 0
    (log,) = tmp_path.glob("training/*swift_voxel_*/log.jsonl")
    starts = [json.loads(text)["step"] for text in log.read_text().splitlines() if '"start"' in text]
    assert starts == [0, stopped_at]
    assert {line["input"] for line in read_lines(tmp_path / "results.jsonl")} == set(NETWORKS["swift"].inputs)


def _steps(log: Path) -> int:
    return sum('"event": "step"' in text for text in log.read_text().splitlines())


def test_settings_of_the_page_keep_cells_small():
    settings = Settings()
    assert settings.frames % settings.window == 0  # networks and readers are scored on the same frames
    assert dataclasses.replace(settings, steps=settings.steps).block == 4
    assert settings.steps >= 600  # fewer end on the plateau
