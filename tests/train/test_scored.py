"""A run's name means the weights that it scored, for everything that is done with it afterwards, wherever they lie."""

import dataclasses
import shutil

import pytest
import torch

from fmristream.errors import CorruptDataError
from tests.train.checkpoint_places import checkpoint_at, save_sharded
from train.checkpoint import save_checkpoint
from train.files import write_json
from train.scored import find_weights


def averaged_at(step, *, is_best=False):
    """A checkpoint whose running mean of one parameter is known."""
    made = checkpoint_at(step)
    name = next(name for name, tensor in made.model.items() if tensor.is_floating_point())
    extra = {**made.extra, "ema": {name: torch.full_like(made.model[name], 7.0, dtype=torch.float32)}}
    return name, dataclasses.replace(made, extra=extra, is_best=is_best)


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, the first the best; the report is of that."""
    for step in (1, 2, 3):
        save_checkpoint(
            tmp_path / "run" / "checkpoints", averaged_at(step, is_best=step == 1)[1], keep_last=3, keep_best=1
        )
    write_json(tmp_path / "run" / "report.json", {"step": 1})
    return tmp_path / "run"


def test_a_run_is_the_checkpoint_of_its_report_and_other_names_mean_what_they_say(run):
    assert find_weights(run).step == 1
    assert find_weights(f"{run.parent}/./run/").step == 1
    assert find_weights(run / "checkpoints").step == 3
    assert find_weights(run / "best").step == 1
    assert find_weights(run / "checkpoints" / "step-2").step == 2
    (run / "report.json").unlink()
    assert find_weights(run).step == 3
    assert find_weights(run / "nothing") is None


def test_a_running_mean_is_what_was_scored_and_is_said(run):
    name, made = averaged_at(1)
    found = find_weights(run)
    assert found.averaged
    assert "running mean" in found.which
    assert "train.ema" in found.notes[0]
    assert torch.equal(found.tensors[name], torch.full_like(made.model[name], 7.0))
    assert found.tensors[name].dtype == made.model[name].dtype
    others = [key for key in made.model if key != name]
    assert all(torch.equal(found.tensors[key], made.model[key]) for key in others)


def test_without_a_mean_they_are_as_the_last_step_left_them(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", checkpoint_at(4), keep_last=1)
    found = find_weights(tmp_path)
    assert (found.averaged, found.notes) == (False, ())
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in checkpoint_at(4).model.items())


def test_where_the_scored_one_is_gone_the_newest_is_taken_and_that_is_said(run):
    shutil.rmtree(run / "checkpoints" / "step-1")
    found = find_weights(run)
    assert found.step == 3
    assert "step-1, which the report scored, cannot be taken" in found.notes[0]
    for step in (2, 3):
        (run / "checkpoints" / f"step-{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptDataError, match="2 are damaged"):
        find_weights(run)


def test_weights_that_ranks_wrote_in_parts_are_put_together(tmp_path, memory_url):
    made = checkpoint_at(3)
    for place in (tmp_path / "run" / "checkpoints", f"{memory_url}/run/checkpoints"):
        save_sharded(str(place), made)
    for source in (tmp_path / "run", f"{memory_url}/run", f"{memory_url}/run/checkpoints/step-3"):
        found = find_weights(source)
        assert found.name == "step-3"
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in made.model.items())


def test_the_folder_of_the_run_is_known_by_every_name_of_its_checkpoints(run, memory_url):
    (run / "recipe.toml").write_text("")
    for name in ("", "best", "checkpoints", "checkpoints/best", "checkpoints/step-2"):
        assert find_weights(run / name).folder == run
    save_checkpoint(f"{memory_url}/run", checkpoint_at(1), keep_last=1)
    assert find_weights(f"{memory_url}/run").folder is None
