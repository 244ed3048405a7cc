"""A window number of a log or an error is told as run, frames and values, to whoever has the data."""

import json
from contextlib import ExitStack

import numpy as np
import pytest

from fmristream import StreamingDataset, convert
from fmristream import open as open_dataset
from fmristream.ingest.options import ConvertOptions
from tests.train.small import small_tables
from train import loop
from train.config import as_toml, recipe_from
from train.data import open_part
from train.launch import World
from train.windows import look_up, main


@pytest.fixture
def a_run(small_recipe, tmp_path):
    recipe = small_recipe(data={"random_phase": True}, train={"steps": 14})
    loop.train(recipe, out=tmp_path, world=World())
    return recipe, tmp_path


def test_a_window_of_the_log_is_the_run_and_the_frames_that_training_took(a_run):
    recipe, out = a_run
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    logged = [(entry["epoch"], window) for entry in steps if entry["event"] == "step" for window in entry["windows"]]
    with ExitStack() as stack:
        loader = open_part(recipe, split="train", seed=recipe.train.seed, world=World(), stack=stack).loader
        batches = loader.forever()
        taken = [
            (int(batch.epoch[row]), int(batch.window[row]), batch.run[row], int(batch.start[row]))
            for batch in (next(batches) for _ in range(14))
            for row in range(4)
        ]
    for (_, window), (epoch, number, run, start) in list(zip(logged, taken, strict=True))[::5]:
        (facts,) = look_up(recipe, [window], split="train", epoch=epoch, out=out)
        assert (facts.number, facts.run, facts.start_frame, facts.frames) == (number, run, start, 8)


def test_its_values_are_those_of_the_dataset(a_run, cohort, capsys):
    _, out = a_run
    assert main([str(out), "3", "--split", "val"]) == 0
    clips = StreamingDataset(cohort, split="val", window=8, stride=7, targets=("sex",))
    item = clips[3]
    inside = item["bold"].reshape(item["bold"].shape[0], -1, 8)[:, clips.positions]
    said = capsys.readouterr().out
    assert said.startswith(
        f"window 3: run {item['run']}, subject {item['subject']}, 8 frames from frame {item['start']}"
    )
    assert f"in-mask values {inside.min():.4g} to {inside.max():.4g}, SD {np.std(inside, dtype=np.float64):.4g}" in said
    assert "NOT FINITE" not in said


def test_its_target_is_that_of_its_subject_whatever_number_of_runs_subjects_have(tmp_path):
    url = str(tmp_path / "dataset")
    source = "synth://?subjects=6&shape=12x12x12&frames=16&runs=2"
    convert(source, url, options=ConvertOptions(split="exact", split_ratios=(0.5, 0.0, 0.5)))
    recipe = recipe_from(small_tables(url, data={"target": "age", "val_split": ""}, objective={"kind": "regression"}))
    ages = dict(zip(*(open_dataset(url).participant_columns[name] for name in ("subject", "age")), strict=True))
    found = look_up(recipe, range(6), split="test", epoch=0, out=tmp_path)
    assert [one.target for one in found] == [ages[one.subject] for one in found]


def test_a_number_that_there_is_not_is_refused_with_those_that_there_are(a_run, tmp_path, capsys):
    _, out = a_run
    assert main([str(out), "50"]) == 2
    assert "window 50: split 'train' has windows 0 to 49" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), "0"]) == 2
    (out / "recipe.toml").write_text(as_toml(a_run[0]).replace('val_split = "val"', 'val_split = ""'))
    assert main([str(out), "0", "--split", "val"]) == 2
    assert "the recipe has train, test" in capsys.readouterr().err
