"""What the last axis of an array means: a grid and the mask of its stored voxels, or a list of grayordinates.

Each is a small Zarr group of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import StoredFile
from fmristream.errors import CorruptDataError, FormatError, ObjectExistsError
from fmristream.shards import codec, grayordinates
from fmristream.shards.digest import sha256, sha256_json
from fmristream.shards.grayordinates import INDEX_DTYPE, BrainModels, models_of
from fmristream.signal.grid import Grid, Shape3
from fmristream.storage import Store

FOLDER = "spaces"

# A mask holds 0 and 1; a lost one must not look like an empty one in other readers.
_MASK_DTYPE = np.dtype("uint8")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Space:
    """A grid and its mask. The voxels are the mask's, in C order of (x, y, z)."""

    grid: Grid
    mask: NDArray[np.bool_]  # (x, y, z)

    @property
    def voxels(self) -> int:
        """Number of stored voxels."""
        return int(self.mask.sum())

    @property
    def frame_shape(self) -> Shape3:
        """(x, y, z) of the grid: the shape of a run."""
        return self.grid.shape

    @property
    def digest(self) -> str:
        """Hex digest of kind, shape, affine and mask."""
        return sha256_json(_document(self))


AnySpace = Space | BrainModels


def write_space(store: Store, space: AnySpace) -> tuple[StoredFile, ...]:
    """Store a space under its digest, or find it there; returns its objects, named relative to the dataset."""
    from fmristream.shards.zarr_metadata import group_metadata

    folder = f"{FOLDER}/{space.digest}"
    objects = {
        f"{folder}/zarr.json": group_metadata({"fmristream": {**_document(space), "voxels": space.voxels}}),
        **_array_of(space, folder),
    }
    files = tuple(put_or_find(store, key, data) for key, data in objects.items())
    if [file.digest for file in files] != [sha256(data) for data in objects.values()]:
        read_space(store, digest=space.digest, document=_document(space))  # what was found says the same, or raises
    return files


def _array_of(space: AnySpace, folder: str) -> dict[str, bytes]:
    """The objects of the mask, or of the indices."""
    from fmristream.shards.zarr_metadata import plain_metadata

    if isinstance(space, BrainModels):
        shape: tuple[int, ...] = space.indices.shape
        return {
            f"{folder}/indices/zarr.json": plain_metadata(
                shape=shape, chunks=shape, dtype=INDEX_DTYPE.str, names=("grayordinate", "index")
            ),
            f"{folder}/indices/c/0/0": codec.encode(np.ascontiguousarray(space.indices, dtype=INDEX_DTYPE)),
        }
    shape = space.grid.shape
    return {
        f"{folder}/mask/zarr.json": plain_metadata(
            shape=shape, chunks=shape, dtype=_MASK_DTYPE.str, names=("x", "y", "z")
        ),
        f"{folder}/mask/c/0/0/0": codec.encode(np.ascontiguousarray(space.mask).astype(_MASK_DTYPE)),
    }


def read_space(store: Store, *, digest: str, document: Any) -> AnySpace:
    """Load a space that a generation names; what it holds is checked against its digest.

    Raises:
        CorruptDataError: the mask, or the list, is not the one that the digest was taken of.
        FormatError: a kind of space that this reader does not know.
    """
    if document["kind"] == grayordinates.KIND:
        return _read_models(store, digest=digest, document=document)
    if document["kind"] != "grid":
        raise FormatError(
            f"{store.name}: space {digest[:12]} is of kind {document['kind']!r}; install a newer fmristream"
        )
    shape = (int(document["shape"][0]), int(document["shape"][1]), int(document["shape"][2]))
    stored = np.empty(shape, dtype=_MASK_DTYPE)
    key = f"{FOLDER}/{digest}/mask/c/0/0/0"
    codec.decode_into(store.read(key), stored, what=f"{store.name}/{key}")
    space = Space(grid=Grid(shape=shape, affine=tuple(document["affine"])), mask=stored.astype(bool))
    if space.digest != digest:
        raise CorruptDataError(
            f"{store.name}/{key}: the mask is not the one that was committed; restore it from a copy"
        )
    return space


def _read_models(store: Store, *, digest: str, document: Any) -> BrainModels:
    indices = np.empty((int(document["voxels"]), 3), dtype=INDEX_DTYPE)
    key = f"{FOLDER}/{digest}/indices/c/0/0"
    codec.decode_into(store.read(key), indices, what=f"{store.name}/{key}")
    space = models_of(document, indices)
    if space.digest != digest or sum(model.count for model in space.models) != space.voxels:
        raise CorruptDataError(
            f"{store.name}/{key}: not the grayordinates that were committed; restore the object from a copy"
        )
    return space


def space_document(space: AnySpace) -> dict[str, Any]:
    """What a generation records of a space beside its digest."""
    return {**_document(space), "voxels": space.voxels}


def _document(space: AnySpace) -> dict[str, Any]:
    if isinstance(space, BrainModels):
        return grayordinates.document_of(space)
    return {
        "affine": [float(number) for number in space.grid.affine],
        "kind": "grid",
        "mask_sha256": sha256(np.packbits(np.ascontiguousarray(space.mask).reshape(-1)).tobytes()),
        "shape": list(space.grid.shape),
    }


def put_or_find(store: Store, key: str, data: bytes) -> StoredFile:
    """Store an object of a space, or say what stands under its name."""
    try:
        store.put_new(key, data)
    except ObjectExistsError:  # an earlier attempt, or another generation: equal by name, perhaps not byte for byte
        data = store.read(key)
    return StoredFile(name=key, bytes=len(data), digest=sha256(data))
