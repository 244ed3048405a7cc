"""`--deep`: everything decoded again, whatever the dtype, and what the tables say of it."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from fmristream.report.verify import verify
from fmristream.shards import codec
from fmristream.shards.dataset import open_dataset
from tests.ingest.nifti_files import DATATYPES, bold_like
from tests.report.datasets import SHAPE, brain_like, converted, recommit, two_runs, with_values, write_runs

SCALES = {"none": {}, "some": {"scl_slope": 0.5, "scl_inter": -3.0}}


@pytest.mark.parametrize("dtype", DATATYPES)
@pytest.mark.parametrize("order", "<>")
def test_every_dtype_and_byte_order_is_sound_down_to_the_bits_of_nan(tmp_path, dtype, order):
    values = bold_like(SHAPE, dtype)
    for scale, fields in SCALES.items():
        source = write_runs(tmp_path / scale, {"run.nii.gz": values}, order=order, **fields)
        url = str(tmp_path / f"{scale}-dataset")
        converted(source, url)
        report = verify(url, deep=True, against=str(source))
        assert report.is_sound, report.faults
        assert report.voxels_compared == values.size
        assert (report.frames_decoded, report.frames_cross_read) == (7, 3)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 4, 4, 3), "<i2"),
        np.full((4, 4, 4, 3), 7, "<u1"),
        np.full((4, 4, 4, 3), np.nan, "<f4"),
        brain_like((4, 4, 4, 1)),
        brain_like((6, 5, 1, 9)),
        brain_like((4, 4, 4, 40)),
    ],
    ids=["zeros", "constant", "nan", "one frame", "one slice", "longer than the reference"],
)
def test_degenerate_runs_are_sound(tmp_path, values):
    source = write_runs(tmp_path / "source", {"run.nii": values})
    converted(source, tmp_path / "dataset")
    report = verify(str(tmp_path / "dataset"), deep=True, against=str(source))
    assert report.is_sound, report.faults


def test_runs_of_several_shards_are_sound(tmp_path, monkeypatch):
    # A shard's size is a constant; a small one makes a short run take several.
    monkeypatch.setattr("fmristream.shards.frames.SHARD_BYTES", 3 * 2 * 120)
    source = write_runs(tmp_path / "source", {"run.nii": brain_like()})
    converted(source, tmp_path / "dataset")
    assert len(list((tmp_path / "dataset").rglob("residual/c/*/0"))) == 3
    report = verify(str(tmp_path / "dataset"), deep=True, against=str(source))
    assert report.is_sound, report.faults
    assert report.chunks == 7


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return two_runs(tmp_path)[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("digest", "0" * 64),
        ("residual_wraps", True),
        ("valid_min", -1.0),
        ("valid_max", 5.0),
        ("nonfinite", 3),
        ("foreground_count", 1),
        ("foreground_mean", 1000.0001),
        ("foreground_sd", 20.0001),
        ("foreground_min", 0.5),
        ("foreground_max", math.nan),
    ],
)
def test_a_row_that_says_what_its_values_do_not_is_a_fault(dataset, field, value):
    recommit(dataset, run=lambda run: dataclasses.replace(run, **{field: value}) if run.name == "sub-1_bold" else run)
    shallow = [fault.what for fault in verify(str(dataset)).faults]
    found = [fault.what for fault in verify(str(dataset), deep=True).faults if fault.what not in shallow]
    assert len(found) == 1
    assert field.removeprefix("residual_") in found[0]


@pytest.mark.parametrize("name", ["moments", "stats"])
def test_statistics_that_are_not_those_of_the_values_are_a_fault(dataset, name):
    def change(array):
        if array.name != name:
            return array
        padded = np.zeros((2, 120), dtype=array.dtype)
        return with_values(array, dataset, "c/0/0" if name == "moments" else "", codec.encode(padded))

    recommit(dataset, array=change)
    assert verify(str(dataset)).is_sound
    found = verify(str(dataset), deep=True).faults
    assert {(fault.run, fault.what) for fault in found} == {
        (run, f"the stored {name} are not those of its stored values") for run in ("sub-1_bold", "sub-2_bold")
    }


def test_a_damaged_chunk_is_named_by_frame_and_the_other_runs_are_still_decoded(dataset):
    shard = next(dataset.rglob("residual/c/0/0"))
    data = bytearray(shard.read_bytes())
    data[40] ^= 4
    shard.write_bytes(data)
    report = verify(str(dataset), deep=True)
    assert any("frame 0 of sub-1_bold" in fault.what for fault in report.faults)
    assert {fault.run for fault in report.faults} == {"sub-1_bold"}
    assert report.frames_decoded == 7


def test_metadata_that_zarr_cannot_take_are_a_fault_of_their_run(dataset):
    metadata = sorted(dataset.rglob("moments/zarr.json"))[0]
    metadata.write_bytes(metadata.read_bytes().replace(b"blocksize", b"blocksi{e"))
    report = verify(str(dataset), deep=True)
    assert any("zarr-python cannot read it" in fault.what for fault in report.faults)
    assert len({fault.run for fault in report.faults if fault.run}) == 1
    assert report.frames_decoded == 14


def test_what_is_verified_is_what_plain_numpy_computes(tmp_path):
    # The checks use the writer's own sums: here they are held against sums that share nothing with them.
    values = brain_like((5, 4, 6, 30))
    source = write_runs(tmp_path / "source", {"run.nii": values}, scl_slope=0.5, scl_inter=10.0)
    converted(source, tmp_path / "dataset")
    [run] = open_dataset(str(tmp_path / "dataset")).runs
    scaled = values.astype(np.float64) * 0.5 + 10
    inside = scaled[scaled != 0]
    assert run.foreground_count == inside.size
    assert run.foreground_mean == pytest.approx(inside.mean(), rel=1e-12)
    assert run.foreground_sd == pytest.approx(inside.std(ddof=1), rel=1e-12)
    assert (run.foreground_min, run.foreground_max) == (inside.min(), inside.max())
    dataset = open_dataset(str(tmp_path / "dataset"))
    delta, sd = dataset.reader(run).exact_moments
    mean = delta + dataset.reader(run).reference
    flat = values.reshape(-1, 30).astype(np.float64)  # C order of (x, y, z)
    np.testing.assert_allclose(mean, flat.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(sd, flat.std(axis=1), rtol=1e-6)
