"""A dataset in numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from fmristream.errors import CorruptDataError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.info import describe, describe_runs
from fmristream.shards.dataset import open_dataset
from tests.report.datasets import brain_like, converted, files_of, flip_bit, two_runs, write_runs


def test_numbers_come_from_tables_and_agree_with_what_is_on_disk(tmp_path):
    _, url = two_runs(tmp_path)
    info = describe(open_dataset(str(url)))
    assert (info.runs, info.subjects, info.frames) == (2, 2, 14)
    assert info.dtypes == {"int16": 1, "float32": 1}
    assert info.tr_s == (2.0,)
    assert info.duration_s == 28.0
    assert info.spaces == {"MNI": 2}
    assert info.decoded_bytes == 7 * 120 * (2 + 4)
    assert info.source_bytes == sum(path.stat().st_size for path in (tmp_path / "source").iterdir())
    stored = [path for path in files_of(url) if path.name != "dataset.json" and path.parent.name != "generations"]
    assert (info.objects, info.stored_bytes) == (len(stored), sum(path.stat().st_size for path in stored))
    [grid] = info.grids
    assert (grid.shape, grid.voxels, grid.runs, grid.share) == ((5, 4, 6), 120, 2, 1.0)
    assert grid.orientation == "LAS"
    assert grid.voxel_size_mm == pytest.approx((2.503, 3.010, 4.031), abs=0.001)


def test_splits_are_counted_in_subjects_runs_and_frames(tmp_path):
    converted("synth://?subjects=10&runs=2&shape=6x6x6&frames=4", tmp_path / "d", ConvertOptions(split="exact"))
    info = describe(open_dataset(str(tmp_path / "d")))
    assert [(s.part, s.subjects, s.runs, s.frames) for s in info.splits] == [
        ("train", 7, 14, 56), ("val", 2, 4, 16), ("test", 1, 2, 8),
    ]  # fmt: skip
    assert info.split["kind"] == "exact"
    assert info.participants == 10


def test_what_to_know_before_training_is_a_warning(tmp_path):
    noisy = brain_like().astype("<f4")
    noisy[2, 2, 2, 2] = np.nan
    runs = {"sub-1_bold.nii": noisy, "sub-2_bold.nii": np.zeros((5, 4, 6, 3), "<i2")}
    source = write_runs(tmp_path / "source", runs, sform_code=1, xyzt_units=0)
    (source / "sub-3_bold.nii").write_bytes(b"no image")
    converted(source, tmp_path / "d")
    info = describe(open_dataset(str(tmp_path / "d")))
    text = "\n".join(info.warnings)
    assert "space native (2 subjects)" in text
    assert "2 of 2 runs have no repetition time: sub-1_bold, sub-2_bold" in text
    assert "1 of 2 runs hold values that are NaN or infinite: sub-1_bold" in text
    assert "1 of 2 runs have no spread" in text
    assert info.quarantined == 1
    assert (info.tr_s, info.duration_s, info.runs_without_tr) == ((), None, 2)


def test_rows_name_every_run_with_its_bytes(tmp_path):
    _, url = two_runs(tmp_path)
    dataset = open_dataset(str(url))
    rows = describe_runs(dataset)
    assert [row.name for row in rows] == ["sub-1_bold", "sub-2_bold"]
    objects = {path for path in files_of(url) if {"runs", "stats", "sketches"} & set(path.parts)}
    assert sum(row.stored_bytes for row in rows) == sum(path.stat().st_size for path in objects)
    assert rows[0].mean == pytest.approx(dataset.runs[0].foreground_mean)


def test_a_run_without_foreground_has_no_mean(tmp_path):
    source = write_runs(tmp_path / "source", {"run.nii": np.zeros((4, 4, 4, 3), "<i2")})
    converted(source, tmp_path / "d")
    [row] = describe_runs(open_dataset(str(tmp_path / "d")))
    assert row.mean is None
    assert row.sd is None


def test_numbers_are_json(tmp_path):
    _, url = two_runs(tmp_path)
    info = describe(open_dataset(str(url)))
    assert json.loads(json.dumps(info.as_dict(), allow_nan=False))["runs"] == 2


def test_a_damaged_table_is_an_error_and_not_an_answer(tmp_path):
    _, url = two_runs(tmp_path)
    for table in Path(url, "tables").iterdir():
        flip_bit(table)
    with pytest.raises(CorruptDataError):
        describe(open_dataset(str(url)))
