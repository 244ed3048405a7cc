"""Pictures: there, of one size, showing something, whatever the run."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from fmristream.errors import MissingExtraError, StorageError, UsageError
from fmristream.report.pictures import DPI, PAGE_INCHES
from fmristream.report.preview import file_names, preview
from fmristream.shards.dataset import open_dataset
from tests.report.datasets import brain_like, converted, two_runs, write_runs


def pixels(path: str | Path) -> "np.ndarray":
    from matplotlib.image import imread

    return imread(path)


def pictured(tmp_path: Path, values: "np.ndarray", **lies) -> "np.ndarray":
    source = write_runs(tmp_path / "source", {"run.nii": values}, **lies)
    converted(source, tmp_path / "d")
    [picture] = preview(open_dataset(str(tmp_path / "d")), str(tmp_path / "out"))
    assert picture.run == "run"
    return pixels(picture.path)


def test_every_run_gets_a_page_that_shows_something(tmp_path):
    _, url = two_runs(tmp_path)
    told = []
    dataset = open_dataset(str(url))
    pictures = list(preview(dataset, str(tmp_path / "out"), progress=lambda done, runs: told.append((done, runs))))
    assert [Path(picture.path).name for picture in pictures] == ["sub-1_bold.png", "sub-2_bold.png"]
    assert told == [(1, 2), (2, 2)]
    pages = [pixels(picture.path) for picture in pictures]
    for page in pages:
        assert page.shape[:2] == (int(PAGE_INCHES[1] * DPI), int(PAGE_INCHES[0] * DPI))
        assert len(np.unique(page.reshape(-1, page.shape[2]), axis=0)) > 100
    assert not np.array_equal(*pages)


@pytest.mark.parametrize(
    "values",
    [
        brain_like((8, 9, 7, 1)),
        brain_like((12, 10, 1, 8)),
        brain_like((1, 10, 12, 8)),
        brain_like((12, 10, 3, 2)),
        brain_like((1, 1, 1, 5)),
        np.zeros((6, 6, 6, 4), "<i2"),
        np.full((6, 6, 6, 4), 3, "<u1"),
        np.full((6, 6, 6, 4), np.nan, "<f4"),
        np.full((6, 6, 6, 1), np.inf, "<f8"),
    ],
    ids=[
        "one frame", "one slice", "one sagittal slice", "a slab", "one voxel", "zeros", "constant", "nan",
        "infinite",
    ],
)  # fmt: skip
def test_odd_runs_are_pictured_too(tmp_path, values):
    assert pictured(tmp_path, values, xyzt_units=0).std() > 0


def test_the_left_of_the_brain_is_on_the_left_whatever_the_order_of_the_file(tmp_path):
    values = brain_like((20, 20, 20, 6))
    values[10:] += 4000  # the right half of a file in RAS order
    pages = [
        pictured(tmp_path / name, turned, srow=((sign * 3.0, 0, 0, 0), (0, 3.0, 0, 0), (0, 0, 3.0, 0)))
        for name, turned, sign in (("RAS", values, 1), ("LAS", values[::-1], -1))
    ]
    # The slices are equal; the line of facts above says RAS and LAS, the carpet beside has other voxels.
    height, width = pages[0].shape[:2]
    np.testing.assert_array_equal(*(page[height // 10 :, : int(0.45 * width)] for page in pages))


def test_only_the_runs_that_were_asked_for_are_drawn(tmp_path):
    _, url = two_runs(tmp_path)
    dataset = open_dataset(str(url))
    assert [picture.run for picture in preview(dataset, str(tmp_path / "out"), runs=["sub-2_bold"])] == ["sub-2_bold"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sub-2_bold.png"]
    with pytest.raises(UsageError, match="no run is called 'sub-3'"):
        list(preview(dataset, str(tmp_path / "out"), runs=["sub-3"]))


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    _, url = two_runs(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fmristream\[neuro\]'"):
        list(preview(open_dataset(str(url)), str(tmp_path / "out")))


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    _, url = two_runs(tmp_path)
    (tmp_path / "out").write_bytes(b"a file is in the way")
    with pytest.raises(StorageError, match=r"sub-1_bold\.png: the picture cannot be written"):
        list(preview(open_dataset(str(url)), str(tmp_path / "out")))


def test_file_names_are_flat_unique_and_stay_in_the_folder(tmp_path):
    names = ["a/b.nii", "a_b.nii", "A/b.nii", "..", "/etc/passwd", "名前", "x" * 300, "$math$"]
    source = write_runs(tmp_path / "source", {"run.nii": brain_like()})
    converted(source, tmp_path / "d")
    [run] = open_dataset(str(tmp_path / "d")).runs
    found = file_names([dataclasses.replace(run, name=name) for name in names])
    assert len({name.lower() for name in found.values()}) == len(names)
    for name in found.values():
        assert "/" not in name
        assert name[0] != "."
        assert len(name.encode()) <= 255
