"""What a checkpoint says of its data is held against other data; what was fitted stays; imports are used as far as they go."""

import dataclasses
import json
import shutil
from contextlib import ExitStack
from types import MappingProxyType

import numpy as np
import pytest
import torch

from fmristream.catalog.row_tables import read_rows
from fmristream.errors import CorruptDataError, SpaceError, UsageError
from tests.train.models.test_imported import prepared
from train.beyond.facts import data_facts, differences
from train.beyond.opened import open_for
from train.beyond.predict import frozen_thresholds, joined_scores, score_windows, table_of
from train.beyond.trained import load_trained, remap
from train.launch import World
from train.main import main
from train.models.imported import write_import
from train.objectives import Objective
from train.units import units_of

ALONE = World()
LSTM = {"name": "lstm", "hidden": 6}


@pytest.fixture(scope="module")
def fitted_run(parcelled, train_tables):
    """A network of series in units that were fitted to the training runs."""
    data = {"url": parcelled, "target": "age", "window": 8, "normalize": "parcels | cohort-zscore"}
    return train_tables(data=data, model=LSTM, objective={"kind": "regression"}, train={"steps": 3, "batch_size": 4})


def facts_with(trained, **changes):
    return dataclasses.replace(trained, facts={**trained.facts, **changes})


def opened(trained, url, stack, **arguments):
    return open_for(trained, url, world=ALONE, stack=stack, **arguments)


def test_what_was_fitted_to_the_training_runs_is_taken_as_it_is(fitted_run, parcelled, convert_hands, tmp_path):
    report = json.loads((fitted_run / "report.json").read_text())
    trained = load_trained(str(fitted_run))
    with ExitStack() as stack:
        here = opened(trained, parcelled, stack, split="test")
        table = table_of(here, score_windows(here), url=parcelled, split="test")
        found = units_of(table, table.about.targets[0], unit="subject")
        assert found.score.tolist() == [row["score"] for row in report["test"]["subjects"]]
        assert found.label == tuple(row["subject"] for row in report["test"]["subjects"])
    kept = {path.name: path.read_bytes() for path in (fitted_run / "fitted").iterdir()}
    assert len(kept) == 1
    shutil.copytree(fitted_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fitted")
    with ExitStack() as stack, pytest.raises(UsageError, match="0 fitted statistics"):
        opened(load_trained(str(tmp_path / "run")), parcelled, stack)


def test_statistics_of_voxels_are_taken_to_the_same_voxels_only(parcelled, train_tables, convert_hands):
    data = {"url": parcelled, "target": "age", "window": 8, "stride": 8, "normalize": "voxel-zscore | cohort-zscore"}
    model = {"name": "cnn_rnn", "channels": [4, 4], "norm_groups": 2, "hidden": 6}
    trained = load_trained(str(train_tables(data=data, model=model, objective={"kind": "regression"})))
    elsewhere = convert_hands(("left", "right"))
    with ExitStack() as stack:
        there = opened(trained, elsewhere, stack)
        assert there.told == ()
        assert np.isfinite(score_windows(there).score).all()
        other = facts_with(trained, space_digest="1" * 64)
        with pytest.raises(SpaceError, match="statistics of training are of voxels"):
            opened(other, elsewhere, stack)
        assert "stored voxels" in opened(other, parcelled, stack, split="val").told[0]  # its own data


def test_one_checkpoint_and_the_whole_run_are_the_same_network(fitted_run, parcelled):
    whole, one = load_trained(str(fitted_run)), load_trained(str(fitted_run / "checkpoints" / "step-3"))
    assert one.folder == whole.folder.absolute()
    assert all(torch.equal(tensor, one.weights[name]) for name, tensor in whole.weights.items())


def test_damaged_and_missing_checkpoints_are_named(fitted_run, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_trained(str(tmp_path / "nothing"))
    shutil.copytree(fitted_run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-3" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptDataError, match="1 are damaged"):
        load_trained(str(tmp_path / "run"))
    with pytest.raises(UsageError, match="frozen"):
        load_trained(str(fitted_run), ["data.window=4"])


def test_axes_are_turned_to_those_of_training(trained_sex, cohort):
    trained = load_trained(str(trained_sex))
    axes = trained.facts["orientation"]
    other = {"R": "L", "L": "R"}[axes[0]] + axes[1:]
    with ExitStack() as stack:
        plain, turned = opened(trained, cohort, stack), opened(facts_with(trained, orientation=other), cohort, stack)
        assert turned.clips.orientation == other
        assert np.array_equal(turned.clips[0]["bold"], plain.clips[0]["bold"][:, ::-1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"voxel_sizes_mm": [2.0, 2.0, 2.0]}, "voxels of 16 x 16 x 16 mm, the network was trained on 2 x 2 x 2 mm"),
        ({"grid": [12, 12, 13]}, "trained on 12 x 12 x 13"),
        ({"channels": 2}, "channels of 1"),
    ],
)
def test_data_that_mean_other_places_are_refused(trained_sex, cohort, changes, sentence):
    with ExitStack() as stack, pytest.raises(SpaceError, match=sentence):
        opened(facts_with(load_trained(str(trained_sex)), **changes), cohort, stack)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tr_s": [0.72]}, "TR is 2 s, that of training 0.72 s"),
        ({"tr_s": []}, "not known"),
        ({"spaces": ["MNI152NLin6Asym"]}, "that of training MNI152NLin6Asym"),
        ({"space_digest": "0" * 64}, "stored voxels are not those of training"),
    ],
)
def test_what_differs_and_can_be_taken_is_said(trained_sex, cohort, changes, sentence):
    trained = load_trained(str(trained_sex))
    with ExitStack() as stack:
        assert opened(trained, cohort, stack).told == ()
        told = opened(facts_with(trained, **changes), cohort, stack).told
    assert len(told) == 1
    assert sentence in told[0]


def test_parcels_must_be_those_of_training(fitted_run, parcelled):
    trained = load_trained(str(fitted_run))
    assert trained.facts["parcels"] == list(range(27))
    assert np.shape(trained.facts["centres_mm"]) == (27, 3)
    with ExitStack() as stack, pytest.raises(SpaceError, match="parcels with voxels"):
        opened(facts_with(trained, parcels=list(range(1, 28))), parcelled, stack)
    with ExitStack() as stack:
        clips = opened(trained, parcelled, stack).clips
        assert differences(MappingProxyType(data_facts(clips, frames=8)), clips) == []


def test_words_have_the_codes_of_training():
    found = remap(["both", "left"], ["left", "none", "both"], column="hand", where="x")
    assert np.array_equal(found, [1.0, np.nan, 0.0], equal_nan=True)
    with pytest.raises(UsageError, match="holds words, in training it held numbers"):
        remap([], ["left"], column="hand", where="x")


def test_scores_of_several_targets_stand_side_by_side():
    several = [
        Objective(kind="regression", target="age", offset=40.0, scale=10.0),
        Objective(kind="classification", target="hand", classes=(0.0, 1.0, 2.0), names=("a", "b", "c")),
        Objective(kind="classification", target="sex"),
    ]
    outputs = torch.arange(10.0).view(2, 5)
    expected = torch.tensor([[40.0, 1, 2, 3, 4], [90.0, 6, 7, 8, 9]])
    assert torch.equal(joined_scores(several, outputs), expected)
    with pytest.raises(UsageError, match="gives 4 outputs"):
        joined_scores(several, outputs[:, :4])


def test_an_import_embeds_and_gives_its_own_outputs(cohort, tmp_path):
    write_import(tmp_path / "import", *prepared(tmp_path))
    arguments = [str(tmp_path / "import"), cohort, "--where", "split == 'val'"]
    assert main(["--task", "embed", *arguments, "--out", str(tmp_path / "vectors")]) == 0
    vectors, _ = read_rows(tmp_path / "vectors" / "windows.parquet")
    assert len(vectors["window"]) == 4 * 9
    scored = ["--set", "objective.kind=regression", "--set", "data.target=age"]
    assert main(["--task", "predict", *arguments, *scored, "--out", str(tmp_path / "scores")]) == 0
    about = json.loads((tmp_path / "scores" / "about.json").read_text())
    assert "the network's own outputs" in about["notes"][0]
    assert read_rows(tmp_path / "scores" / "predictions.parquet")[0]["score_age"].shape == (36,)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_scores_its_best_look_is_applied_with_those_weights(cohort, trained_sex, tmp_path, elsewhere):
    out, place = tmp_path / "run", tmp_path / "kept" if elsewhere else tmp_path / "run" / "checkpoints"
    changed = ["train.eval_every=1", "train.ema=0.5", "eval.use=best", "optim.lr=0.05", "eval.baselines=false"]
    changed += [f"train.checkpoints={place}"] if elsewhere else []
    given = [part for one in changed for part in ("--set", one)]
    assert main([str(trained_sex.parent / "small.toml"), *given, "--out", str(out)]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (best,) = [entry["step"] for entry in log if entry.get("event") == "best"]
    assert best < 8, "the best look must not be the last one here; take another rate"
    report = json.loads((out / "report.json").read_text())
    trained = load_trained(str(out))
    assert (report["step"], trained.name) == (best, f"step-{best}")
    with ExitStack() as stack:
        here = opened(trained, cohort, stack, split="test")
        table = table_of(here, score_windows(here), url=cohort, split="test")
    found = units_of(table, table.about.targets[0], unit="subject")
    assert found.score.tolist() == [row["score"] for row in report["test"]["subjects"]]
    assert frozen_thresholds(trained) == {"sex": report["threshold"]}
    assert f"| checkpoint | step-{best}, weights the running mean" in (out / "MODEL_CARD.md").read_text()
    if not elsewhere:
        other = load_trained(str(place / "step-8"))
        assert frozen_thresholds(other) == {}, "the threshold was chosen for other weights"


@pytest.fixture(scope="module")
def patient_run(parcelled, train_tables, tmp_path_factory):
    """A network that was best before its last step, its weights averaged, its checkpoints elsewhere."""
    data = {"url": parcelled, "target": "age", "window": 8, "normalize": "parcels | voxel-zscore"}
    train = {"steps": 30, "batch_size": 4, "eval_every": 2, "patience": 2, "ema": 0.5}
    train["checkpoints"] = str(tmp_path_factory.mktemp("elsewhere") / "kept")
    tables = {"data": data, "model": LSTM, "objective": {"kind": "regression"}, "train": train, "optim": {"lr": 1.0}}
    return train_tables(**tables)


def test_the_weights_that_a_report_is_of_are_taken_wherever_they_are_kept(patient_run, parcelled):
    report = json.loads((patient_run / "report.json").read_text())
    events = [json.loads(line) for line in (patient_run / "log.jsonl").read_text().splitlines()]
    (ended,) = (event for event in events if event["event"] == "patience")
    assert report["step"] == ended["at"] == ended["step"] - 4
    trained = load_trained(str(patient_run))
    assert trained.name == f"step-{ended['at']}"
    with ExitStack() as stack:
        here = opened(trained, parcelled, stack, split="test")
        table = table_of(here, score_windows(here), url=parcelled, split="test")
    found = units_of(table, table.about.targets[0], unit="subject")
    assert found.score.tolist() == [row["score"] for row in report["test"]["subjects"]]
    assert f"| checkpoint | {trained.name}, weights the running mean" in (patient_run / "MODEL_CARD.md").read_text()
