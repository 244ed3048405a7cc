"""Tar shards through a webdataset pipeline and our functions: the stream's own values, and nothing unpickled."""

import io
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import fmristream
from fmristream.errors import CorruptDataError, FormatError, UsageError
from fmristream.report import tar_plan
from fmristream.report.tar_options import TarOptions
from fmristream.report.webdataset import write_webdataset
from fmristream.stream import tars
from fmristream.stream.tars import read_npy, tar_part

OPTIONS = TarOptions(
    window=4, samples_per_shard=5, normalize="global-zscore", with_subjects=True, targets=("age", "sex")
)


def pipeline(part: tars.TarPart, batch_size: int = 3):
    import webdataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to be closed by the garbage collector
        source = webdataset.WebDataset(list(part.urls), shardshuffle=False)
        yield from source.map(part.decode).batched(batch_size, collation_fn=part.collate)


@pytest.mark.parametrize(
    ("changes", "normalize"),
    [
        ({}, "global-zscore"),
        ({"arrays": "placed", "grid": (8, 11, 6)}, "global-zscore"),
        ({"normalize": "raw"}, "none"),
        ({"normalize": "raw", "arrays": "placed"}, "none"),
        ({"dtype": "float16"}, "global-zscore"),
    ],
)
def test_batches_of_a_pipeline_are_the_windows_of_the_stream(cohort_url, tmp_path, changes, normalize):
    write_webdataset(fmristream.open(cohort_url), str(tmp_path / "out"), options=replace(OPTIONS, **changes))
    part = tar_part(str(tmp_path / "out"), "train")
    clips = fmristream.StreamingDataset(
        cohort_url, window=4, split="train", normalize=normalize, grid=changes.get("grid"), targets=("age", "sex")
    )
    items = {(item["run"], item["start"]): item for item in (clips[number] for number in range(len(clips)))}
    seen = set()
    for batch in pipeline(part):
        moved = batch.to("cpu")
        for row, which in enumerate(zip(batch.run, batch.start.tolist(), strict=True)):
            seen.add(which)
            expected = torch.from_numpy(items[which]["bold"])
            assert torch.equal(moved.bold[row], expected.to(moved.bold.dtype))
            assert batch.subject[row] == items[which]["subject"]
            assert batch.targets["age"][row] == items[which]["targets"]["age"]
        assert "sex" not in batch.targets  # words; codes are the stream's
    assert seen == set(items)
    assert part.samples == len(items)


def test_a_part_goes_into_worker_processes(cohort_url, tmp_path):
    write_webdataset(fmristream.open(cohort_url), str(tmp_path / "out"), options=OPTIONS)
    part = tar_part(str(tmp_path / "out"), "val")
    again = pickle.loads(pickle.dumps(part))
    assert again.urls == part.urls
    assert torch.equal(next(pipeline(again)).packed, next(pipeline(part)).packed)


def test_format_and_version_are_those_that_are_written():
    assert (tars.FORMAT, tars.VERSION) == (tar_plan.FORMAT, tar_plan.VERSION)


def npy_of(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["i2", "f4", "f2", "?"])
def test_arrays_are_read_as_numpy_reads_them(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = read_npy(npy_of(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


class Canary:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    "data",
    [
        npy_of(np.array([Canary()], dtype=object)),
        npy_of(np.zeros((3, 4), order="F")),
        npy_of(np.zeros(4))[:-1],
        npy_of(np.zeros(4)) + b"x",
        b"PK",
    ],
)
def test_what_is_no_plain_array_is_refused(data):
    with pytest.raises(ValueError, match=r".+"):
        read_npy(data)


def test_other_folders_and_parts_are_refused(cohort_url, tmp_path):
    write_webdataset(fmristream.open(cohort_url), str(tmp_path / "out"), options=OPTIONS)
    with pytest.raises(UsageError, match="no part 'all'; there are test, train, val"):
        tar_part(str(tmp_path / "out"), "all")
    part = tar_part(str(tmp_path / "out"), "val")
    with pytest.raises(CorruptDataError, match=r"no bold\.npy and json"):
        part.decode({"__key__": "k", "json": b"{}"})
    with pytest.raises(CorruptDataError, match="another folder's"):
        part.decode({"json": b"{}", "bold.npy": npy_of(np.zeros((4, 3), "f4"))})
    mask = tmp_path / "out" / "val" / "mask.npy"
    mask.write_bytes(npy_of(np.zeros((9, 10, 7), bool)))
    with pytest.raises(CorruptDataError, match="not the mask"):
        tar_part(str(tmp_path / "out"), "val")
    (tmp_path / "out" / "index.json").write_text("{}")
    with pytest.raises(FormatError, match="not of fmristream"):
        tar_part(str(tmp_path / "out"), "val")
