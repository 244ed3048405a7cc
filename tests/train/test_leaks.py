"""A run whose splits share a run, a subject or a family does not begin; copies of runs are told; nobody is named."""

import json
import re

import numpy as np
import pytest

from fmristream import StreamingDataset, convert
from fmristream.errors import SplitError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from tests.ingest.nifti_files import nifti_bytes
from train.launch import World
from train.leaks import LEAKS_FILE, audit_pair
from train.loop import train
from train.main import main

ALONE = World()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """10 subjects on 8³ voxels: 4 train, 2 val, 4 test; `0008` of test is a rescaled copy of `0000`, and two families are cut."""
    folder = tmp_path_factory.mktemp("families")
    source = folder / "source"
    source.mkdir()
    generator = np.random.default_rng(0)
    first = None
    for number in range(10):
        values = generator.normal(1000, 20, size=(8, 8, 8, 40))
        first = values if first is None else first
        if number == 8:
            values = 0.5 * first + 3
        data = nifti_bytes(values.astype("<f4"), srow=((24, 0, 0, -96), (0, 24, 0, -96), (0, 0, 24, -96)), sform_code=1)
        (source / f"sub-{number:04d}_bold.nii").write_bytes(data)
    parts = ["train"] * 4 + ["val"] * 2 + ["test"] * 4
    related = ["A", "B", "C", "C", "B", "D", "A", "E", "F", "G"]  # A: train and test; B: train and val; C within train
    rows = [f"{number:04d},{'MF'[number % 2]},{related[number]}" for number in range(10)]
    (folder / "people.csv").write_text("\n".join(["participant_id,sex,family_id", *rows]) + "\n")
    (folder / "split.csv").write_text(
        "\n".join(["subject,split", *(f"{number:04d},{part}" for number, part in enumerate(parts))]) + "\n"
    )
    options = ConvertOptions(
        mask="none",
        space="MNI",
        split=str(folder / "split.csv"),
        phenotypes=Phenotypes(url=str(folder / "people.csv"), group_by="none"),
    )
    convert(str(source), str(folder / "dataset"), options=options)
    return str(folder / "dataset")


def clips(url, split):
    return StreamingDataset(url, window=8, stride=7, split=split, normalize="voxel-zscore")


def test_families_and_copies_of_two_parts_are_counted(families):
    found = audit_pair(clips(families, "train"), clips(families, "test"), names=("train", "test"))
    assert (found.one_runs, found.other_runs) == (4, 4)
    assert (found.same_run, found.same_subject, found.same_family, found.alike) == (0, 0, 1, 1)
    assert (found.certain, found.suspected) == (1, 1)
    (copy,) = found.named
    assert copy["kind"] == "alike"
    assert copy["time"] > 0.9
    dataset = clips(families, None).dataset
    objects = {run.subject: run.object for run in dataset.runs}
    assert (copy["one"], copy["other"]) == (objects["0000"], objects["0008"])


def test_a_subject_on_both_sides_is_not_told_again_as_a_family(families):
    found = audit_pair(clips(families, "train"), clips(families, "train"), names=("train", "test"))
    assert (found.same_run, found.same_subject, found.same_family) == (4, 4, 0)


def test_fingerprints_of_too_many_pairs_are_left_out_and_said(families):
    found = audit_pair(clips(families, "train"), clips(families, "test"), names=("train", "test"), most_pairs=15)
    assert not found.fingerprints
    assert (found.alike, found.same_family) == (0, 1)


def test_a_run_whose_test_subjects_are_trained_on_does_not_begin(small_recipe, cohort, tmp_path):
    with pytest.raises(SplitError, match="train and test share 10 runs, 10 subjects") as caught:
        train(small_recipe(data={"test_split": "train"}), out=tmp_path, world=ALONE)
    names = {run.name for run in clips(cohort, None).runs} | {run.subject for run in clips(cohort, None).runs}
    said = str(caught.value) + (tmp_path / "log.jsonl").read_text() + (tmp_path / LEAKS_FILE).read_text()
    assert not any(re.search(rf"\b{re.escape(name)}\b", said) for name in names)
    assert "fmristream audit" in said
    assert "warn" in said
    assert not (tmp_path / "checkpoints").exists()


def test_families_that_are_cut_end_the_run_unless_the_recipe_lets_them(small_recipe, families, tmp_path):
    recipe = {"url": families, "window": 8, "stride": 8, "target": "sex"}
    model = {"patch_size": [2, 2, 2, 1]}
    with pytest.raises(SplitError, match=r"train and val share 1 families; train and test share 1 families"):
        train(small_recipe(data=recipe, model=model), out=tmp_path / "one", world=ALONE)
    let = small_recipe(data={**recipe, "audit": "warn"}, model=model, train={"steps": 1})
    assert train(let, out=tmp_path / "two", world=ALONE) is not None
    document = json.loads((tmp_path / "two" / LEAKS_FILE).read_text())
    assert document["audit"] == "warn"
    assert [pair["same_family"] for pair in document["pairs"]] == [1, 1, 0]
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    (audit,) = [line for line in log if line["event"] == "audit"]
    assert (audit["same_family"], audit["alike"]) == (2, 1)
    (leak,) = [line for line in log if line["event"] == "leak"]
    assert leak["between"] == "train and test"


def test_a_restart_takes_the_answer_for_the_same_data_and_asks_again_for_other(small_recipe, cohort, tmp_path):
    recipe = small_recipe(train={"steps": 1})
    for _ in range(2):
        train(recipe, out=tmp_path, world=ALONE)
    other = small_recipe(train={"steps": 1}, data={"test_split": ""})
    train(other, out=tmp_path, world=ALONE)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("kept", False) for line in log if line["event"] == "audit"] == [False, True, False]
    (tmp_path / LEAKS_FILE).write_text("{")
    train(other, out=tmp_path, world=ALONE)
    assert json.loads((tmp_path / LEAKS_FILE).read_text())["pairs"][0]["same_run"] == 0


def test_a_leak_is_found_again_by_the_restart_that_takes_the_kept_answer(small_recipe, tmp_path):
    for _ in range(2):
        with pytest.raises(SplitError, match="10 subjects"):
            train(small_recipe(data={"val_split": "train"}), out=tmp_path, world=ALONE)


def test_who_does_not_want_it_is_told_that_nothing_was_compared(small_recipe, tmp_path):
    recipe = small_recipe(data={"test_split": "train", "audit": "off"}, train={"steps": 1})
    assert train(recipe, out=tmp_path, world=ALONE) is not None
    assert json.loads((tmp_path / LEAKS_FILE).read_text())["audit"] == "off"


def test_the_command_ends_with_1_and_names_what_to_do(cohort, tmp_path, capsys):
    arguments = [
        "swift_tiny_cpu",
        "--set",
        f"data.url={cohort}",
        "--set",
        "data.test_split=val",
        "--out",
        str(tmp_path),
    ]
    arguments += ["--set", "data.window=8", "--set", "data.grid=[12,12,12]", "--set", "model.patch_size=[2,2,2,1]"]
    arguments += ["--set", "model.window_size=[2,2,2,4]", "--set", "model.first_window_size=[2,2,2,4]"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "val and test share 4 runs, 4 subjects" in said
    assert "split anew" in said
