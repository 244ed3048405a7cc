"""What is on both sides of a split, or in two datasets: runs, subjects and copies of runs are found; others are not."""

import warnings

import numpy as np
import pytest

import fmristream
from fmristream.errors import SplitError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.leaks import find_leaks
from fmristream.signal.sketch import duplicates_between, near_duplicates
from tests.ingest.nifti_files import nifti_bytes

COHORT = "synth://?subjects=6&runs=1&shape=12x14x12&frames=120&seed=3"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("leaks") / "dataset")
    fmristream.convert(COHORT, url, options=ConvertOptions(split="exact", mask="none"))
    return url


@pytest.fixture(scope="module")
def copies_url(url, tmp_path_factory) -> str:
    """Runs of the dataset under other names: the first in another scale, the second with frames cut off, one unrelated."""
    folder = tmp_path_factory.mktemp("copies")
    source, dataset = folder / "source", fmristream.open(url)
    source.mkdir()
    affine = tuple(map(tuple, dataset.runs[0].affine_matrix[:3].tolist()))

    def bold(run: int, start: int = 0) -> np.ndarray:
        return np.asfortranarray(np.moveaxis(dataset.read(run, start), 0, -1))

    generator = np.random.default_rng(1)
    noise = generator.normal(1000, 20, size=bold(0).shape)
    files = {"x": bold(0) * 0.5 + 3, "y": bold(1, 4), "z": noise}
    for label, values in files.items():
        data = nifti_bytes(values.astype("<f4"), srow=affine, sform_code=1)
        (source / f"sub-{label}_bold.nii").write_bytes(data)
    fmristream.convert(
        str(source), str(folder / "dataset"), options=ConvertOptions(mask="none", split="none", space="MNI")
    )
    return str(folder / "dataset")


def test_parts_of_a_split_by_subject_share_nothing(url):
    dataset = fmristream.open(url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fmristream.audit(dataset.where("split == 'train'"), dataset.where("split != 'train'"))
    assert report.leaks == ()
    assert (report.train_runs + report.test_runs, report.without_fingerprint) == (6, 0)


def test_the_same_run_on_both_sides_is_refused_even_in_another_place(url, tmp_path):
    again = str(tmp_path / "again")
    fmristream.convert(COHORT, again, options=ConvertOptions(split="none", mask="none"))
    with pytest.raises(SplitError, match=r"6 of the same run"):
        fmristream.audit(url, again)
    some = fmristream.open(again).where("subject == '0002'")
    report = find_leaks(url, some, fingerprints=False)
    assert [leak.kind for leak in report.leaks] == ["same run", "same label"]
    assert report.leaks[0].train == some.runs[0].name


def test_a_side_without_runs_is_no_clean_split(url):
    with pytest.raises(UsageError, match="test side holds no run"):
        fmristream.audit(url, fmristream.open(url).where("age > 900"))


def test_a_subject_on_both_sides_is_refused(tmp_path):
    url = str(tmp_path / "dataset")
    two_runs = "synth://?subjects=3&runs=2&shape=8x8x8&frames=30&seed=3"
    fmristream.convert(two_runs, url, options=ConvertOptions(split="none", mask="none"))
    dataset = fmristream.open(url)
    with pytest.raises(SplitError, match=r"3 of the same subject"):
        fmristream.audit(dataset.where("run == '1'"), dataset.where("run == '2'"), fingerprints=False)


def test_copies_under_other_names_are_suspected_and_unrelated_runs_are_not(url, copies_url):
    with pytest.warns(UserWarning, match="2 pairs of training and test runs look like copies"):
        report = fmristream.audit(url, copies_url)
    names = fmristream.open(url).runs.column("name")
    assert {(leak.train, leak.test) for leak in report.suspected} == {
        (names[0], "sub-x_bold"),
        (names[1], "sub-y_bold"),
    }
    assert all(leak.kind == "alike" and leak.time > 0.5 for leak in report.suspected)
    assert report.certain == ()


def test_clips_and_mixtures_are_audited_as_the_runs_that_they_stream(url):
    train, val = (fmristream.StreamingDataset(url, window=20, split=split, seed=1) for split in ("train", "val"))
    mixed = fmristream.Mixture([(train, 1), (val, 1)])
    assert find_leaks(train, val, fingerprints=False).leaks == ()
    found = find_leaks(mixed, val, fingerprints=False)
    assert {leak.kind for leak in found.certain} == {"same run", "same subject"}
    assert found.train_runs == len(train.runs) + len(val.runs)


def test_two_lists_give_the_pairs_that_one_list_gives(url, copies_url):
    from fmristream.report.duplicates import sketches_of

    first, second = (
        sketches_of(dataset, dataset.runs)[1] for dataset in (fmristream.open(url), fmristream.open(copies_url))
    )
    both = {
        (one, other - len(first), round(found.time, 6))
        for one, other, found in near_duplicates([*first, *second])
        if one < len(first) <= other
    }
    between = {(one, other, round(found.time, 6)) for one, other, found in duplicates_between(first, second)}
    assert between == both
    assert len(between) == 2
