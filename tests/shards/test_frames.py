"""Shards written by hand are zarr-python's, byte for byte; so are the small arrays beside them."""

import hashlib
import json

import numpy as np
import pytest
import zarr
from blake3 import blake3

from fmristream.errors import SourceError
from fmristream.shards import frames as frames_module
from fmristream.shards.frames import MAX_CHUNK_BYTES, FramesWriter, frames_per_shard
from fmristream.shards.hashing import NEW_BULK_DIGEST
from fmristream.shards.index import ranges_of
from fmristream.shards.zarr_metadata import frames_metadata
from fmristream.storage import open_store
from tests.shards.tiny_dataset import TinyRun, small_shards, tiny_runs, write_run

DTYPES = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f4", "<f8")


def some_frames(dtype: str, frames: int, voxels: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    if dtype[1] == "f":
        return rng.normal(100, 3, (frames, voxels)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, (frames, voxels), dtype=dtype, endpoint=True)


def write_frames(store, folder: str, values: np.ndarray) -> tuple[list[int], tuple, int]:
    with FramesWriter(
        store, folder, frames=len(values), voxels=values.shape[1], dtype=values.dtype, bulk_digest=NEW_BULK_DIGEST
    ) as writer:
        for row in values:
            writer.frame[:] = row
            writer.append()
        return *writer.finish(), writer.frames_per_shard


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("frames", "voxels"), [(11, 37), (1, 3), (8, 40)])
def test_shards_are_byte_for_byte_those_of_zarr_python(dtype, frames, voxels, tmp_path, monkeypatch):
    values = some_frames(dtype, frames, voxels)
    monkeypatch.setattr(frames_module, "SHARD_BYTES", 4 * (voxels + -voxels % 8) * values.itemsize)
    store = open_store(str(tmp_path))
    _, files, per_shard = write_frames(store, "ours", values)
    assert per_shard == min(4, frames)
    assert len(files) == -(-frames // per_shard)
    (tmp_path / "theirs").mkdir()
    metadata = frames_metadata(frames=frames, voxels=voxels, dtype=dtype, frames_per_shard=per_shard)
    (tmp_path / "theirs" / "zarr.json").write_bytes(metadata)
    with zarr.config.set({"array.write_empty_chunks": True}):
        theirs = zarr.open_array(str(tmp_path / "theirs"), mode="r+")
        theirs[:] = values
    for file in files:
        assert (tmp_path / "ours" / file.name).read_bytes() == (tmp_path / "theirs" / file.name).read_bytes()


@pytest.mark.parametrize("run", tiny_runs(), ids=lambda run: run.name)
def test_whole_runs_are_byte_for_byte_what_zarr_python_makes_of_them(run: TinyRun, tmp_path, monkeypatch):
    small_shards(monkeypatch.setattr)
    store = open_store(str(tmp_path))
    written = write_run(store, run)
    for array in written.arrays:
        if array.encoding in ("group", "blob"):
            continue
        ours = zarr.open_array(str(tmp_path / array.object), mode="r")
        other = tmp_path / "theirs" / array.name
        other.mkdir(parents=True)
        (other / "zarr.json").write_bytes((tmp_path / array.object / "zarr.json").read_bytes())
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_array(str(other), mode="r+")[:] = ours[:]
        for file in array.files:
            assert (other / file.name).read_bytes() == (tmp_path / array.object / file.name).read_bytes()


@pytest.mark.parametrize(("name", "function"), [("sha256", hashlib.sha256), ("blake3", blake3)])
def test_files_are_listed_with_their_size_and_digest(name, function, tmp_path, monkeypatch):
    small_shards(monkeypatch.setattr)
    store = open_store(str(tmp_path))
    listed = {}
    for array in write_run(store, tiny_runs()[0], bulk_digest=name).arrays:
        for file in array.files:
            listed[f"{array.object}/{file.name}" if file.name else array.object] = file
    assert sorted(listed) == sorted(store.list("runs") + store.list("stats")), "nothing is stored that no table names"
    for key, file in listed.items():
        data = store.read(key)
        assert (file.bytes, file.digest) == (len(data), function(data).hexdigest())


def test_lengths_locate_every_chunk_and_the_shard_index_agrees(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "SHARD_BYTES", 3 * 40 * 2)
    store = open_store(str(tmp_path))
    lengths, files, per_shard = write_frames(store, "a", some_frames("<i2", 10, 37))
    for number, file in enumerate(files):
        data = store.read(f"a/{file.name}")
        entries = np.frombuffer(data[-(16 * per_shard + 4) : -4], dtype="<u8").reshape(per_shard, 2)
        inside = range(number * per_shard, min(10, (number + 1) * per_shard))
        for entry, frame in zip(entries, inside, strict=False):
            (located,) = ranges_of(np.array(lengths), start=frame, stop=frame + 1, frames_per_shard=per_shard)
            assert (located.shard, located.start, located.stop) == (number, entry[0], entry[0] + entry[1])
        assert (entries[len(inside) :] == 2**64 - 1).all()


@pytest.mark.parametrize(
    ("frames", "voxels", "itemsize", "expected"),
    [(100, 8, 2, 100), (10_000, 235_375, 2, 1140), (5, 2**28, 2, 1), (1200, 902_629, 4, 148)],
)
def test_the_length_of_a_shard_follows_from_the_header(frames, voxels, itemsize, expected):
    assert frames_per_shard(frames=frames, voxels=voxels, itemsize=itemsize) == expected


def test_a_frame_that_no_chunk_can_hold_is_refused():
    frames_per_shard(frames=1, voxels=(MAX_CHUNK_BYTES // 64) * 8, itemsize=8)
    with pytest.raises(SourceError, match="smaller --mask"):
        frames_per_shard(frames=1, voxels=2**31, itemsize=1)


def test_a_run_that_is_abandoned_leaves_nothing(tmp_path, monkeypatch):
    small_shards(monkeypatch.setattr)
    store = open_store(str(tmp_path))
    run = tiny_runs()[0]

    def start_and_fail() -> None:
        from fmristream.shards.run_writer import RunWriter
        from tests.shards.tiny_dataset import AFFINE

        with RunWriter(
            store,
            run.space,
            frames=23,
            dtype=np.dtype("<i2"),
            slope=1.0,
            inter=0.0,
            affine=AFFINE,
            tr_s=1.0,
            bulk_digest=NEW_BULK_DIGEST,
        ) as new:
            for values in run.values[:20]:
                new.add(values)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_and_fail()
    assert store.list("runs") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_conversions_of_one_run_never_share_an_object(tmp_path):
    store = open_store(str(tmp_path))
    one, other = (write_run(store, tiny_runs()[0]) for _ in range(2))
    assert one.object != other.object
    assert one.digest == other.digest


def test_object_names_tell_nothing_of_the_subject(tmp_path):
    store = open_store(str(tmp_path))
    write_run(store, tiny_runs()[0])
    for key in store.list("runs") + store.list("stats"):
        assert "sub" not in key
        assert b"sub-01" not in store.read(key)


def test_zarr_metadata_says_only_what_the_format_says(tmp_path):
    document = json.loads(frames_metadata(frames=10, voxels=37, dtype="<i2", frames_per_shard=4))
    (sharding,) = document["codecs"]
    assert document["shape"] == [10, 37]
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [4, 40]
    assert document["fill_value"] == -32768
    assert document["dimension_names"] == ["time", "voxel"]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [1, 40]
    assert sharding["configuration"]["index_location"] == "end"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
