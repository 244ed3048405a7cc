"""Copies of a run within a dataset are found, whatever they are called; other runs are not taken for copies."""

import numpy as np

import fmristream
from fmristream.ingest.options import ConvertOptions
from fmristream.report.duplicates import find_duplicates
from tests.report.datasets import write_runs

SHAPE = (12, 14, 12)
LARGE = ((8.0, 0, 0, -40.0), (0, 8.0, 0, -50.0), (0, 0, 8.0, -30.0))


def noise(seed: int, frames: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(1000, 20, (*SHAPE, frames))


def test_copies_are_named_with_the_splits_that_they_leak_between(tmp_path, memory_url):
    copy = np.rint(noise(1)[..., 4:] * 20).astype("<i2")
    runs = {"sub-1_bold.nii": noise(1).astype("<f4"), "sub-2_bold.nii": noise(2).astype("<f4"), "sub-3_bold.nii": copy}
    source = write_runs(tmp_path / "in", runs, srow=LARGE)
    (tmp_path / "split.tsv").write_text("subject\tsplit\n1\ttrain\n2\ttrain\n3\ttest\n")
    fmristream.convert(
        str(source),
        memory_url,
        options=ConvertOptions(mask="none", split=str(tmp_path / "split.tsv"), split_ratios=(0.5, 0.0, 0.5)),
    )
    [found] = find_duplicates(fmristream.open(memory_url))
    assert found.runs == ("sub-1_bold", "sub-3_bold")
    assert found.splits == ("train", "test")
    assert (found.same_subject, found.lag) == (False, 4)
    assert found.time > 0.9


def test_runs_without_sketches_are_passed_over(tmp_path, memory_url):
    runs = {f"sub-{name}_bold.nii": noise(1).astype("<f4") for name in "12"}
    source = write_runs(tmp_path / "in", runs, srow=LARGE)
    fmristream.convert(str(source), memory_url, options=ConvertOptions(mask="none", split="none", sketch=False))
    assert find_duplicates(fmristream.open(memory_url)) == ()
