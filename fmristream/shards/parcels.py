"""Spaces of the kind "parcels": which voxels of another space make up which parcel of an atlas. A small Zarr group each."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import StoredFile
from fmristream.errors import CorruptDataError, FormatError
from fmristream.shards import codec
from fmristream.shards.digest import sha256, sha256_json
from fmristream.shards.spaces import FOLDER, put_or_find
from fmristream.signal.parcellate import Weights
from fmristream.storage import Store

KIND = "parcels"
# Hex digits of the atlas's digest in names of arrays: opaque, and apart for any number of atlases somebody uses at once.
_NAME_DIGITS = 8
# The largest atlases have some thousand parcels; a table from elsewhere may claim any number.
_MAX_ELEMENTS = 2**31

_ARRAYS = {"label": "<i8", "coverage": "<f4", "indptr": "<i8", "voxel": "<i8", "weight": "<f4"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParcelSpace:
    """Parcels of an atlas on the voxels of a space.

    Attributes:
        atlas: hex digest of the atlas: of its grid, labels and weights, not of its file.
        atlas_kind: `labels` or `probabilities`.
        of: digest of the space whose voxels these are.
        labels: (p,) numbers of the parcels in the atlas.
        names: of the parcels, "" where none is known.
        weights: which voxels, and how much each counts.
    """

    atlas: str
    atlas_kind: str
    of: str
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    weights: Weights

    @property
    def digest(self) -> str:
        """Hex digest of its document."""
        return sha256_json(parcel_document(self))


def array_name(atlas: str) -> str:
    """Name of a run's array of the parcels of an atlas."""
    return f"parcels-{atlas[:_NAME_DIGITS]}"


def robust_name(atlas: str) -> str:
    """Name of the array of their medians and interquartile ranges."""
    return f"{array_name(atlas)}-robust"


def parcel_document(space: ParcelSpace) -> dict[str, Any]:
    """What a generation records of such a space beside its digest."""
    return {
        "atlas": space.atlas,
        "atlas_kind": space.atlas_kind,
        "kind": KIND,
        "of": space.of,
        "parcels": len(space.labels),
        "sha256": {
            "names": sha256_json(list(space.names)),
            **{name: sha256(values.tobytes()) for name, values in _values(space).items()},
        },
        "weights": len(space.weights.voxels),
    }


def write_parcels(store: Store, space: ParcelSpace) -> tuple[StoredFile, ...]:
    """Store such a space under its digest, or find it there; returns its objects, named relative to the dataset."""
    from fmristream.shards.zarr_metadata import group_metadata, plain_metadata

    folder = f"{FOLDER}/{space.digest}"
    document = parcel_document(space)
    objects = {f"{folder}/zarr.json": group_metadata({"fmristream": {**document, "names": list(space.names)}})}
    for name, values in _values(space).items():
        chunk = _padded(values)
        names = ("weight" if name in ("voxel", "weight") else "parcel",)
        objects[f"{folder}/{name}/zarr.json"] = plain_metadata(
            shape=values.shape, chunks=chunk.shape, dtype=values.dtype.str, names=names
        )
        objects[f"{folder}/{name}/c/0"] = codec.encode(chunk)
    files = tuple(put_or_find(store, key, data) for key, data in objects.items())
    if [file.digest for file in files] != [sha256(data) for data in objects.values()]:
        read_parcels(store, digest=space.digest, document=document)  # what was found says the same, or raises
    return files


def read_parcels(store: Store, *, digest: str, document: Any) -> ParcelSpace:
    """Load such a space as a generation names it, checked against its digest.

    Raises:
        CorruptDataError: it is not what the digest was taken of.
        FormatError: it is a space of another kind.
    """
    if document["kind"] != KIND:
        raise FormatError(f"{store.name}: space {digest[:12]} is of kind {document['kind']!r}, expected {KIND!r}")
    parcels, count = int(document["parcels"]), int(document["weights"])
    sizes = {"label": parcels, "coverage": parcels, "indptr": parcels + 1, "voxel": count, "weight": count}
    if not (0 < parcels < _MAX_ELEMENTS and 0 <= count < _MAX_ELEMENTS):
        raise CorruptDataError(f"{store.name}: space {digest[:12]} claims {parcels} parcels and {count} weights")
    found = {name: _read(store, f"{FOLDER}/{digest}/{name}/c/0", sizes[name], dtype) for name, dtype in _ARRAYS.items()}
    space = ParcelSpace(
        atlas=str(document["atlas"]),
        atlas_kind=str(document["atlas_kind"]),
        of=str(document["of"]),
        labels=found["label"],
        names=_names(store, f"{FOLDER}/{digest}/zarr.json"),
        weights=Weights(
            indptr=found["indptr"], voxels=found["voxel"], weights=found["weight"], coverage=found["coverage"]
        ),
    )
    if space.digest != digest or len(space.names) != parcels or not _fits(space.weights):
        raise CorruptDataError(
            f"{store.name}/{FOLDER}/{digest}: the parcels are not those that were committed; restore them from a copy"
        )
    return space


def _names(store: Store, key: str) -> tuple[str, ...]:
    try:
        return tuple(str(name) for name in json.loads(store.read(key))["attributes"]["fmristream"]["names"])
    except (ValueError, LookupError, TypeError) as error:
        raise CorruptDataError(f"{store.name}/{key}: does not name parcels; restore it from a copy") from error


def _fits(weights: Weights) -> bool:
    """Whether a loop over the weights stays within them; that voxels lie in the run is for who has it."""
    steps = np.diff(weights.indptr)
    return bool(
        weights.indptr[0] == 0
        and (steps >= 0).all()
        and weights.indptr[-1] == len(weights.voxels)
        and (weights.voxels >= 0).all()
    )


def _values(space: ParcelSpace) -> dict[str, NDArray[Any]]:
    weights = space.weights
    values = (space.labels, weights.coverage, weights.indptr, weights.voxels, weights.weights)
    pairs = zip(_ARRAYS.items(), values, strict=True)
    return {name: np.ascontiguousarray(value, dtype=dtype) for (name, dtype), value in pairs}


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    chunk = np.full(codec.padded_length(max(1, len(values))), codec.fill_value(values.dtype), dtype=values.dtype)
    chunk[: len(values)] = values
    return chunk


def _read(store: Store, key: str, size: int, dtype: str) -> NDArray[Any]:
    padded = np.empty(codec.padded_length(max(1, size)), dtype=dtype)
    codec.decode_into(store.read(key), padded, what=f"{store.name}/{key}")
    return padded[:size].copy()
