"""Objects that are whole but contradict each other: found by comparing what they say."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fmristream.report.verify import verify
from fmristream.shards import codec
from tests.report.datasets import recommit, two_runs, with_values


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return two_runs(tmp_path)[1]


def faults(dataset: Path) -> str:
    return "\n".join(f"{fault.object}: {fault.what}" for fault in verify(str(dataset)).faults)


def test_a_dataset_that_was_committed_again_unchanged_is_sound(dataset):
    recommit(dataset)
    assert verify(str(dataset)).is_sound


def test_an_index_that_does_not_fit_the_shard_is_a_fault(dataset):
    def shift(data: bytes) -> bytes:
        lengths = np.frombuffer(data[: 7 * 4], dtype="<u4").copy()
        lengths[2] += 1
        lengths[3] -= 1
        block = lengths.tobytes()
        return block + codec.checksum(block) + data[len(block) + 4 :]

    recommit(dataset, index=shift)
    report = verify(str(dataset))
    [fault] = report.faults
    assert fault.run == "sub-1_bold"
    assert "from frame 2 on" in fault.what


def test_an_index_block_with_a_wrong_checksum_is_a_fault(dataset):
    recommit(dataset, index=lambda data: bytes([data[0] ^ 1]) + data[1:])
    assert "index block is damaged" in faults(dataset)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda footer: bytes([footer[-21] ^ 1]) + footer[1:], "index"),
        (lambda footer: footer[:-1] + bytes([footer[-1] ^ 1]), "checksum of the shard's own index"),
    ],
)
def test_a_shard_whose_own_index_is_wrong_is_a_fault(dataset, change, text):
    footer_bytes = 7 * 16 + 4

    def damage(array):
        if array.name != "residual":
            return array
        data = (dataset / array.object / "c/0/0").read_bytes()
        return with_values(array, dataset, "c/0/0", data[:-footer_bytes] + change(data[-footer_bytes:]))

    recommit(dataset, array=damage)
    assert text in faults(dataset)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("residual", ("shape",), [8, 120]),
        ("residual", ("data_type",), "uint16"),
        ("residual", ("fill_value",), 0),
        ("residual", ("chunk_grid", "configuration", "chunk_shape"), [3, 120]),
        ("residual", ("codecs", 0, "configuration", "index_location"), "start"),
        ("reference", ("shape",), [119]),
        ("moments", ("codecs", 2, "name"), "crc32"),
        ("", ("attributes", "fmristream", "slope"), 2.0),
        ("", ("attributes", "fmristream", "affine"), [1.0] * 16),
        ("", ("attributes", "fmristream", "encoding"), "direct"),
        ("", ("attributes", "fmristream", "run_digest"), "0" * 64),
        ("", ("attributes", "fmristream", "valid_range"), [0, 1]),
        ("", ("attributes",), {}),
        ("reference", (), []),
    ],
)
def test_a_zarr_json_that_says_something_else_than_the_tables_is_a_fault(dataset, name, place, value):
    def lie(array):
        if array.name != name or "residual" not in {p.name for p in (dataset / array.object.split(".zarr")[0]).parent.glob(
            array.object.split("/")[1] + "/*"
        )}:  # fmt: skip
            return array
        document = json.loads((dataset / array.object / "zarr.json").read_bytes())
        spot = document
        for step in place[:-1]:
            spot = spot[step]
        if place:
            spot[place[-1]] = value
        else:
            document = value
        return with_values(array, dataset, "zarr.json", json.dumps(document).encode())

    recommit(dataset, array=lie)
    report = verify(str(dataset))
    assert [fault.object.rpartition("/")[2] for fault in report.faults] == ["zarr.json"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: dataclasses.replace(a, shape=(7, 119)) if a.name == "residual" else a, "shape"),
        (lambda a: dataclasses.replace(a, dtype="<u2") if a.name == "reference" else a, "dtype"),
        (lambda a: dataclasses.replace(a, name="other") if a.name == "moments" else a, "names no moments"),
        (lambda a: dataclasses.replace(a, space_digest="0" * 64) if a.name == "stats" else a, "space"),
        (
            lambda a: dataclasses.replace(a, files=a.files[1:]) if a.name == "residual" else a,
            "does not name this shard",
        ),
    ],
)
def test_an_arrays_table_that_does_not_fit_the_runs_is_a_fault(dataset, change, text):
    recommit(dataset, array=change)
    assert text in faults(dataset)


def test_a_row_that_does_not_fit_its_space_is_a_fault(dataset):
    recommit(dataset, run=lambda run: dataclasses.replace(run, shape=(4, 5, 6)))
    assert "its row says grid" in faults(dataset)
