"""Spaces of grayordinates: stored as what they are, read back as that, or refused."""

import json
from typing import Any

import numpy as np
import pytest

from fmristream.errors import CorruptDataError, FormatError, ObjectMissingError
from fmristream.shards.digest import canonical_json
from fmristream.shards.grayordinates import BrainModel, BrainModels
from fmristream.shards.spaces import read_space, space_document, write_space
from fmristream.signal.grid import Grid
from fmristream.storage import open_store

SPACE = BrainModels(
    models=(
        BrainModel(structure="CIFTI_STRUCTURE_CORTEX_LEFT", count=3, surface_vertices=10),
        BrainModel(structure="CIFTI_STRUCTURE_THALAMUS_LEFT", count=2),
    ),
    indices=np.array([[0, -1, -1], [9, -1, -1], [4, -1, -1], [1, 0, 2], [0, 0, 0]], "<i4"),
    volume=Grid(
        shape=(2, 1, 3), affine=(2.0, 0.0, 0.0, -1.5, 0.0, 2.0, 0.0, 0.1, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 1.0)
    ),
)
ON_SURFACE = BrainModels(models=SPACE.models[:1], indices=SPACE.indices[:3])


def recorded(space: BrainModels) -> Any:
    """What a generation says of it, read back from its JSON."""
    return json.loads(canonical_json(space_document(space)))


@pytest.mark.parametrize("space", [SPACE, ON_SURFACE])
def test_a_space_reads_back_equal(memory_url, space):
    store = open_store(memory_url)
    files = write_space(store, space)
    assert write_space(store, space) == files
    found = read_space(store, digest=space.digest, document=recorded(space))
    assert isinstance(found, BrainModels)
    assert (found.models, found.volume, found.digest) == (space.models, space.volume, space.digest)
    assert np.array_equal(found.indices, space.indices)
    assert found.indices.dtype == np.dtype("<i4")
    assert [(part.start, part.stop) for _, part in found.slices()] == [(0, 3), (3, 5)][: len(space.models)]


@pytest.mark.parametrize(
    "change",
    [
        {"models": [{"count": 3, "structure": "CIFTI_STRUCTURE_CORTEX_LEFT", "type": "surface", "vertices": 11}]},
        {"models": []},
        {"volume": None},
        {"voxels": 4},
    ],
)
def test_what_a_generation_says_must_be_what_the_digest_was_taken_of(memory_url, change):
    store = open_store(memory_url)
    write_space(store, SPACE)
    with pytest.raises(CorruptDataError):
        read_space(store, digest=SPACE.digest, document=recorded(SPACE) | change)


def test_counts_that_do_not_add_up_are_damage_even_under_a_digest_of_their_own(memory_url):
    store = open_store(memory_url)
    forged = BrainModels(models=SPACE.models[:1], indices=SPACE.indices, volume=SPACE.volume)
    write_space(store, SPACE)
    for name in ("zarr.json", "indices/zarr.json", "indices/c/0/0"):
        store.put_new(f"spaces/{forged.digest}/{name}", store.read(f"spaces/{SPACE.digest}/{name}"))
    with pytest.raises(CorruptDataError, match="grayordinates"):
        read_space(store, digest=forged.digest, document=recorded(forged))


def test_a_lost_list_and_an_unknown_kind_are_errors(memory_url):
    store = open_store(memory_url)
    with pytest.raises(ObjectMissingError):
        read_space(store, digest=SPACE.digest, document=recorded(SPACE))
    with pytest.raises(FormatError, match="install a newer fmristream"):
        read_space(store, digest=SPACE.digest, document=recorded(SPACE) | {"kind": "parcels"})
