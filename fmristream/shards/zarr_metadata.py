"""The zarr.json documents, written by zarr itself, and a run handed out as zarr sees it. The only importer of zarr."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from fmristream.shards.codec import BLOCK_BYTES, LEVEL, fill_value, padded_length
from fmristream.storage.urls import local_path, scheme_of


@lru_cache(maxsize=256)
def frames_metadata(*, frames: int, voxels: int, dtype: str, frames_per_shard: int, is_raw: bool = False) -> bytes:
    """zarr.json of a (t, v) array: one frame a chunk, `frames_per_shard` chunks a shard, shard index at the end.

    `is_raw`: chunks are not compressed.
    """
    padded = padded_length(voxels)
    return _array_metadata(
        shape=(frames, voxels),
        chunks=(1, padded),
        shards=(frames_per_shard, padded),
        dtype=dtype,
        names=("time", "voxel"),
        is_raw=is_raw,
    )


@lru_cache(maxsize=256)
def volumes_metadata(*, shape: tuple[int, ...], dtype: str, frames_per_shard: int) -> bytes:
    """zarr.json of a (t, z, y, x) array: one whole frame a chunk, sharded as frames of voxels are."""
    return _array_metadata(
        shape=shape,
        chunks=(1, *shape[1:]),
        shards=(frames_per_shard, *shape[1:]),
        dtype=dtype,
        names=("t", "z", "y", "x"),
    )


@lru_cache(maxsize=256)
def plain_metadata(*, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, names: tuple[str, ...]) -> bytes:
    """zarr.json of an array that is one compressed, checksummed chunk."""
    return _array_metadata(shape=shape, chunks=chunks, shards=None, dtype=dtype, names=names)


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """zarr.json of a group with attributes."""
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3, attributes=attributes)
    return _taken_from(store)


def open_group(url: str) -> zarr.Group:
    """The Zarr group at a URL, read-only."""
    if scheme_of(url) == "file":
        return zarr.open_group(LocalStore(local_path(url), read_only=True), mode="r", zarr_format=3)
    return zarr.open_group(FsspecStore.from_url(url, read_only=True), mode="r", zarr_format=3)


def _array_metadata(
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    dtype: str,
    names: tuple[str, ...],
    is_raw: bool = False,
) -> bytes:
    kind = np.dtype(dtype)
    blosc = BloscCodec(typesize=kind.itemsize, cname="lz4", clevel=LEVEL, shuffle="bitshuffle", blocksize=BLOCK_BYTES)
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=shape,
        dtype=kind,
        chunks=chunks,
        shards=shards,
        filters=None,
        serializer=BytesCodec(endian=None if kind.itemsize == 1 else "little"),
        compressors=[Crc32cCodec()] if is_raw else [blosc, Crc32cCodec()],
        fill_value=fill_value(kind),
        dimension_names=names,
        zarr_format=3,
    )
    return _taken_from(store)


def _taken_from(store: MemoryStore) -> bytes:
    document = store._store_dict["zarr.json"].to_bytes()
    # zarr's own text, in a layout that does not depend on its version.
    return json.dumps(json.loads(document), indent=1, sort_keys=True).encode()
