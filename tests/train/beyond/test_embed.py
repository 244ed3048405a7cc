"""Vectors of windows: what the head reads, the same on one rank and on two, and their means by run and subject."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from fmristream.catalog.row_tables import read_rows
from train.beyond.opened import open_for
from train.beyond.streaming import Means
from train.beyond.trained import load_trained
from train.launch import World
from train.main import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def embedded(trained_sex, cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "out"
    assert main(["--task", "embed", str(trained_sex), cohort, "--out", str(out)]) == 0
    return out


def test_a_vector_is_what_the_head_reads(embedded, trained_sex, cohort):
    windows, _ = read_rows(embedded / "windows.parquet")
    with ExitStack() as stack:
        opened = open_for(load_trained(str(trained_sex)), cohort, world=World(), stack=stack)
        batch = next(opened.batches())
        with torch.no_grad():
            expected = opened.model(batch.bold)
            read = opened.model.output_head.head(torch.from_numpy(windows["features"][: len(batch)].copy()))
    assert torch.allclose(read, expected, atol=1e-6)
    assert windows["window"].tolist() == list(range(100))


def test_runs_and_subjects_are_means_of_means(embedded):
    windows, _ = read_rows(embedded / "windows.parquet")
    runs, _ = read_rows(embedded / "runs.parquet")
    subjects, _ = read_rows(embedded / "subjects.parquet")
    names = np.array(windows["run"])
    for run, mean, count in zip(runs["run"], runs["features"], runs["windows"], strict=True):
        rows = windows["features"][names == run].astype(np.float64)
        assert len(rows) == count
        assert np.allclose(rows.mean(0), mean, atol=1e-6)
    assert len(subjects["subject"]) == len(set(runs["subject"])) == 20
    assert subjects["runs"].tolist() == [1] * 20


def test_means_of_groups_that_follow_each_other():
    means, done = Means(2), []
    for group, row in [("a", [1, 2]), ("a", [3, 4]), ("b", [5, 6])]:
        done.append(means.take(group, np.array(row)))
    assert done[:2] == [None, None]
    assert (done[2].of, done[2].rows, done[2].mean.tolist()) == ("a", 2, [2.0, 3.0])
    assert means.finish().mean.tolist() == [5.0, 6.0]
    assert means.finish() is None


def on_two_ranks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "train", *map(str, arguments), "--nproc", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.full
def test_where_the_data_are_out_of_reach_both_ranks_end_and_nothing_is_left(trained_sex, cohort, tmp_path):
    done = on_two_ranks("--task", "predict", trained_sex, cohort + "-gone", "--out", tmp_path / "out")
    assert done.returncode != 0
    assert "no dataset here" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_write_the_same_rows_in_the_same_order(embedded, trained_sex, cohort, tmp_path):
    done = on_two_ranks("--task", "embed", trained_sex, cohort, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for name in ("windows", "runs", "subjects"):
        one, facts = read_rows(embedded / f"{name}.parquet")
        two, other = read_rows(tmp_path / "two" / f"{name}.parquet")
        assert facts == other
        assert list(one) == list(two)
        for column in one:
            if column == "features":
                assert np.allclose(one[column], two[column], rtol=1e-5, atol=1e-6)
            else:
                assert list(one[column]) == list(two[column])
