"""What is written beside a run is removed again when the run comes to nothing, and read back as it was."""

import numpy as np
import pytest

from fmristream.catalog.tables import decode_columns, encode_columns
from fmristream.errors import CorruptDataError
from fmristream.shards.hashing import NEW_BULK_DIGEST
from fmristream.shards.parcels import ParcelSpace, parcel_document, read_parcels, write_parcels
from fmristream.shards.side import SideWriter, Table
from fmristream.signal.parcellate import Weights
from fmristream.storage import open_store

FOLDERS = ("runs", "spaces", "sketches", "confounds", "events", "recordings")


def parcels(**changes) -> ParcelSpace:
    weights = Weights(
        indptr=np.array([0, 2, 2, 3]),
        voxels=np.array([1, 4, 0]),
        weights=np.array([1, 0.5, 0.25], "f4"),
        coverage=np.array([1, 0, 0.5], "f4"),
    )
    fields = {"atlas": "ab" * 32, "atlas_kind": "probabilities", "of": "cd" * 32, "labels": np.array([1, 2, 3])}
    return ParcelSpace(**{**fields, "names": ("a", "", "é"), "weights": weights} | changes)


def objects(store) -> list[str]:
    return [key for folder in FOLDERS for key in store.list(folder)]


def write_all(side: SideWriter) -> None:
    side.put_parcels(parcels(), np.ones((4, 3), "f4"), np.zeros((2, 3), "f4"))
    side.put_sketch(b"sketch")
    side.put_table("physio-a", Table(columns={"a": np.array([1.0, np.nan])}, facts={"sampling_hz": 0.1}))


def test_leaving_by_an_exception_removes_everything(memory_url):
    store = open_store(memory_url)
    side = SideWriter(store, "runs/x.zarr", "0" * 64, bulk_digest=NEW_BULK_DIGEST)
    with side:
        write_all(side)
    assert len(objects(store)) == 6
    side.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert objects(store) == []


def test_every_object_has_a_row_and_no_name_tells_anything(memory_url):
    store = open_store(memory_url)
    with SideWriter(store, "runs/x.zarr", "0" * 64, bulk_digest=NEW_BULK_DIGEST) as side:
        write_all(side)
    rows = {file.key_in(array.object) for array in side.arrays for file in array.files}
    assert rows == set(objects(store))
    assert {array.name for array in side.arrays} == {
        "parcels-abababab", "parcels-abababab-robust", "sketch", "physio-a",
    }  # fmt: skip
    assert not [key for key in rows if "physio" in key]


def test_columns_come_back_bit_for_bit():
    columns = {"x": np.array([1 / 3, -0.0, np.nan, 5e-324]), "word": ["a", None, "é", ""], "none": [None] * 4}
    found, facts = decode_columns(encode_columns(columns, {"start_s": 0.1}))
    assert found["x"].tobytes() == columns["x"].tobytes()
    assert (found["word"], found["none"]) == (columns["word"], columns["none"])
    assert facts == {"start_s": 0.1}
    with pytest.raises(CorruptDataError):
        decode_columns(b"PAR1 no table")


def test_parcels_come_back_and_are_found_where_they_are(memory_url):
    store, space = open_store(memory_url), parcels()
    assert write_parcels(store, space) == write_parcels(store, space)
    found = read_parcels(store, digest=space.digest, document=parcel_document(space))
    assert found.names == space.names
    assert found.digest == space.digest
    for name in ("indptr", "voxels", "weights", "coverage"):
        assert np.array_equal(getattr(found.weights, name), getattr(space.weights, name))


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ("a", "b", "c")},
        {"labels": np.array([1, 2, 4])},
        {"weights": Weights(indptr=np.array([0, 2, 2, 3]), voxels=np.array([1, 4, 9]), weights=np.ones(3, "f4"),
                            coverage=np.ones(3, "f4"))},
    ],
)  # fmt: skip
def test_another_space_in_its_place_is_told(memory_url, changes):
    store, space, other = open_store(memory_url), parcels(), parcels(**changes)
    assert other.digest != space.digest
    write_parcels(store, other)
    for key in store.list("spaces"):
        store.put_new(key.replace(other.digest, space.digest), store.read(key))
    with pytest.raises(CorruptDataError):
        read_parcels(store, digest=space.digest, document=parcel_document(space))


@pytest.mark.parametrize("indptr", [[0, 2, 1, 3], [0, 2, 2, 4], [1, 2, 2, 3]])
def test_weights_that_lead_out_of_their_arrays_are_refused(memory_url, indptr):
    good = parcels().weights
    wrong = Weights(indptr=np.array(indptr), voxels=good.voxels, weights=good.weights, coverage=good.coverage)
    store, space = open_store(memory_url), parcels(weights=wrong)
    write_parcels(store, space)
    with pytest.raises(CorruptDataError):
        read_parcels(store, digest=space.digest, document=parcel_document(space))
