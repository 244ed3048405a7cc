"""A profile says where a step goes: its parts add up, and the run that is profiled is the one that is not."""

import json
import re

import pytest
import torch

from train import loop
from train.checkpoint import load_checkpoint
from train.config import as_toml
from train.launch import World
from train.log import read_history
from train.main import main
from train.profiling import PHASES, slowest_rank, told


def rows(text):
    """Phase -> numbers of its row, of the first table."""
    found = {}
    for line in text.partition("\n\n")[0].splitlines():
        name = line[:16].strip()
        if name in (*PHASES, "a step"):
            found[name] = [float(number) for number in line[16:].split()]
    return found


def require_whole(table, *, column):
    parts = [numbers for name, numbers in table.items() if name != "a step"]
    assert table["a step"][column + 1] == 100.0
    assert sum(numbers[column + 1] for numbers in parts) == pytest.approx(100, abs=0.05 * len(parts))
    assert sum(numbers[column] for numbers in parts) == pytest.approx(table["a step"][column], abs=0.005 * len(parts))


@pytest.fixture
def finished(small_recipe, tmp_path):
    """A profiled run and where it wrote."""
    recipe = small_recipe(train={"steps": 16, "checkpoint_every": 7, "eval_every": 8}, watch={"profile": 4})
    assert loop.train(recipe, out=tmp_path / "run", world=World()) is not None
    return recipe, tmp_path / "run"


def test_every_moment_of_a_step_is_told_and_the_parts_are_the_whole(finished):
    _, out = finished
    (path,) = (out / "profile").glob("*.txt")
    assert path.name == "steps-6-9.txt"
    text = path.read_text()
    table = rows(text)
    require_whole(table, column=0)
    assert table.keys() >= {"data wait", "forward", "backward", "optimiser", "log", "validation", "checkpoint"}
    assert "all-reduce" not in table
    assert "1 checkpoint(s) fell among these steps" in text
    # Of the time that the log itself knows: a step up to its line, to a quarter (the machine does other things as well).
    logged = sum(entry["seconds"] for entry in read_history(out / "log.jsonl").steps[5:9])
    inside = sum(table[name][0] for name in table if name not in ("a step", "log", "validation", "checkpoint"))
    assert 4 * inside / 1000 == pytest.approx(logged, rel=0.25)


def test_the_trace_is_chromes_and_names_the_phases(finished):
    _, out = finished
    (path,) = (out / "profile").glob("*.json")
    assert path.name == "steps-10-13-rank-0.json"
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert names >= {"phase: data wait", "phase: forward", "phase: loss and backward", "phase: optimiser"}
    assert any(name.startswith("aten::") for name in names if name)


def test_a_profiled_run_computes_what_an_unprofiled_one_does(finished, small_recipe, tmp_path):
    _, out = finished
    plain = small_recipe(train={"steps": 16, "checkpoint_every": 7, "eval_every": 8})
    assert loop.train(plain, out=tmp_path / "plain", world=World()) is not None
    assert not (tmp_path / "plain" / "profile").exists()
    ours, theirs = (load_checkpoint(folder / "checkpoints" / "step-16").model for folder in (out, tmp_path / "plain"))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_run_with_too_few_steps_left_says_so_and_goes_on(small_recipe, tmp_path, capsys):
    recipe = small_recipe(train={"steps": 3}, watch={"profile": 4})
    assert loop.train(recipe, out=tmp_path, world=World()) is not None
    assert "takes 13 steps, 3 are left; nothing is profiled" in capsys.readouterr().out


@pytest.mark.full
def test_two_ranks_tell_the_all_reduce_and_the_slowest(small_recipe, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(as_toml(small_recipe(train={"steps": 14})))
    assert main([str(path), "--nproc", "2", "--profile", "4", "--out", str(tmp_path / "run")]) == 0
    (text,) = [found.read_text() for found in (tmp_path / "run" / "profile").glob("*.txt")]
    assert "2 ranks, CPU" in text
    assert text.count("(slowest)") == 1
    table = rows(text)
    for column in range(0, len(table["a step"]), 2):
        require_whole(table, column=column)
    assert table["all-reduce"][0] > 0
    assert table["backward"][0] > 0


def test_the_slowest_rank_is_the_one_that_others_wait_for():
    quick = dict.fromkeys(PHASES, 0.0) | {"forward": 1.0, "exchange": 8.0, "all-reduce": 2.0}
    slow = dict.fromkeys(PHASES, 0.0) | {"forward": 9.0, "exchange": 1.0, "all-reduce": 1.0}
    assert slowest_rank([quick, slow, quick]) == 1


def test_numbers_of_a_profile_are_milliseconds_and_percent_of_a_step():
    row = dict.fromkeys(PHASES, 0.0) | {"data wait": 0.2, "forward": 0.6, "backward": 1.0, "checkpoint": 0.2}
    text = told([row], slowest=0, first=11, last=14, about="", unwatched_s=0.25, checkpoints=1, checkpoint_every=100)
    assert rows(text) == {
        "data wait": [50.0, 10.0],
        "forward": [150.0, 30.0],
        "backward": [250.0, 50.0],
        "checkpoint": [50.0, 10.0],
        "a step": [500.0, 100.0],
    }
    # .2 s for every 100 steps of 1.8 s / 4.
    assert re.search(r"0\.20 s each; one every 100 steps is 0\.4 %", text)
