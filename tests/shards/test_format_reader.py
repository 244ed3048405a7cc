"""A reader written from FORMAT.md alone, with no fmristream code, reads by byte ranges what ours reads.

Only the tests at the end import fmristream, to make the data and to compare.
"""

import hashlib
import io
import json
import re
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from numcodecs.blosc import Blosc

DTYPES = {"|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"}


class Folder:
    """Objects by key, whole or by byte range; counts the ranges."""

    def __init__(self, root: Path) -> None:
        self.root, self.ranges = root, 0

    def path(self, key: str) -> Path:
        assert re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", key), key
        assert not {".", ".."} & set(key.split("/")), key
        return self.root / key

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        self.ranges += stop is not None
        with open(self.path(key), "rb") as file:
            file.seek(start)
            data = file.read(-1 if stop is None else stop - start)
        assert stop is None or len(data) == stop - start, f"{key} is cut short"
        return data


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Section 10.
BULK = {"sha256": hashlib.sha256, "blake3": blake3}


def newest(folder: Folder) -> dict:
    """Section 2."""
    hint = json.loads(folder.read("dataset.json"))
    assert hint.pop("check") == sha256(canonical(hint))[:16]
    number = hint["generation"]
    while folder.path(f"generations/{number + 1}.json").exists():
        number += 1
    data = folder.read(f"generations/{number}.json")
    document = json.loads(data)
    assert canonical(document) == data
    assert document.pop("digest") == sha256(canonical(document))
    assert (document["generation"], document["version"]) == (number, 1)
    assert set(document["requires"]) <= {"blake3"}
    assert document.get("bulk_digest", "sha256") in BULK
    return document


def table(folder: Folder, entry: dict) -> list[dict]:
    data = folder.read(entry["key"])
    assert sha256(data) == entry["sha256"]
    return pq.read_table(io.BytesIO(data)).to_pylist()


def find(folder: Folder, document: dict, name: str) -> tuple[dict, dict[str, dict], str]:
    """(row of the run, its arrays by name, key of the index object). Sections 2 and 3."""
    for segment in document["segments"]:
        for row, run in enumerate(table(folder, segment["runs"])):
            if run["name"] == name:
                arrays = {a["name"]: a for a in table(folder, segment["arrays"]) if a["run_row"] == row}
                return run, arrays, segment["index"]["key"]
    raise KeyError(name)


def decode(chunk: bytes, dtype: str, count: int) -> np.ndarray:
    """Section 5: checksum, sizes, blosc; padding is the caller's."""
    assert dtype in DTYPES
    frame, check = chunk[:-4], chunk[-4:]
    assert int(google_crc32c.value(frame)).to_bytes(4, "little") == check, "checksum differs"
    decoded, _, stored = np.frombuffer(frame, "<u4", count=3, offset=4)
    assert (decoded, stored) == (count * np.dtype(dtype).itemsize, len(frame))
    return np.frombuffer(Blosc().decode(frame), dtype=dtype, count=count)


def padded(voxels: int) -> int:
    return 8 * -(-voxels // 8)


def vector(folder: Folder, array: dict) -> np.ndarray:
    """An array of one chunk, without its padding."""
    *lead, voxels = array["shape"]
    key = (
        array["object"]
        if array["encoding"] == "blob"
        else "/".join([array["object"], "c", *["0"] * len(array["shape"])])
    )
    shape = (*lead, padded(voxels))
    return decode(folder.read(key), array["dtype"], int(np.prod(shape))).reshape(shape)[..., :voxels]


def stored_frames(folder: Folder, found: tuple, start: int, stop: int) -> np.ndarray:
    """(t, v) as the source stored them. Sections 4 to 6."""
    run, arrays, index_key = found
    array = next(arrays[name] for name in ("residual", "bold", "codes") if name in arrays)
    if array["encoding"] in ("raw", "quantized"):
        return other_frames(folder, found, start, stop)
    assert array["encoding"] == ("difference" if "residual" in arrays else "direct")
    block = folder.read(index_key, array["index_offset"], array["index_offset"] + array["index_bytes"])
    assert int(google_crc32c.value(block[:-4])).to_bytes(4, "little") == block[-4:]
    lengths = np.frombuffer(block[:-4], "<u4").astype(int)
    assert len(lengths) == run["frames"]
    out, per_shard = [], array["frames_per_shard"]
    for shard in range(start // per_shard, (stop - 1) // per_shard + 1):
        first = shard * per_shard
        ends = np.concatenate([[0], np.cumsum(lengths[first : first + per_shard])])
        low, high = max(start, first) - first, min(stop, first + per_shard) - first
        data = folder.read(f"{array['object']}/c/{shard}/0", ends[low], ends[high])
        for i in range(low, high):
            chunk = data[ends[i] - ends[low] : ends[i + 1] - ends[low]]
            out.append(decode(chunk, run["dtype"], padded(run["voxels"]))[: run["voxels"]])
    frames = np.stack(out)
    return frames + vector(folder, arrays["reference"]) if "residual" in arrays else frames


def other_frames(folder: Folder, found: tuple, start: int, stop: int) -> np.ndarray:
    """Section 16: frame by frame."""
    run, arrays, index_key = found
    array = arrays.get("bold") or arrays["codes"]
    block = folder.read(index_key, array["index_offset"], array["index_offset"] + array["index_bytes"])
    assert crc32c(block[:-4]) == block[-4:]
    words = np.frombuffer(block[:-4], "<u4").astype(int)
    count, dtype, per_shard = padded(run["voxels"]), np.dtype(run["dtype"]), array["frames_per_shard"]
    is_raw = array["encoding"] == "raw"
    assert len(words) == run["frames"] * (1 if is_raw else 2)
    lengths = np.full(len(words), count * dtype.itemsize + 4) if is_raw else words[: run["frames"]]
    out = []
    for frame in range(start, stop):
        first = frame // per_shard * per_shard
        begin = lengths[first:frame].sum()
        data = folder.read(f"{array['object']}/c/{frame // per_shard}/0", begin, begin + lengths[frame])
        assert int.from_bytes(data[-4:], "little") == words[frame if is_raw else run["frames"] + frame]
        decode_one = raw_frame if is_raw else quantized_frame
        out.append(decode_one(folder, data, run, arrays))
    return np.stack(out)


def crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(bytes(data))).to_bytes(4, "little")


def raw_frame(folder: Folder, data: bytes, run: dict, arrays: dict) -> np.ndarray:
    assert crc32c(data[:-4]) == data[-4:]
    return np.frombuffer(data[:-4], run["dtype"])[: run["voxels"]]


def quantized_frame(folder: Folder, data: bytes, run: dict, arrays: dict) -> np.ndarray:
    kind, dtype = np.dtype(arrays["codes"]["dtype"]), np.dtype(run["dtype"])
    count = int.from_bytes(data[-8:-4], "little")
    begin = len(data) - 8 - count * (4 + dtype.itemsize)
    assert crc32c(data[begin - 4 : -4]) == data[-4:]
    positions = np.frombuffer(data[begin:], "<u4", count=count)
    values = np.frombuffer(data[begin + 4 * count :], dtype, count=count)
    codes = decode(data[:begin], kind.str, padded(run["voxels"]))[: run["voxels"]]
    step, offset = vector(folder, arrays["quantization"]).astype(np.float64)
    stored = (codes * step + offset).astype(dtype)
    assert np.flatnonzero(codes == np.iinfo(kind).min).tolist() == positions.tolist()
    stored[positions] = values
    return stored


def volumes(folder: Folder, document: dict, run: dict, stored: np.ndarray) -> np.ndarray:
    """(t, x, y, z) scaled. Section 7."""
    digest = run["space_digest"].hex()
    space = document["spaces"][digest]
    assert space["kind"] == "grid"
    mask = decode(folder.read(f"spaces/{digest}/mask/c/0/0/0"), "|u1", int(np.prod(space["shape"]))).astype(bool)
    assert sha256(np.packbits(mask).tobytes()) == space["mask_sha256"]
    assert sha256(canonical({key: space[key] for key in ("affine", "kind", "mask_sha256", "shape")})) == digest
    out = np.zeros((len(stored), mask.size), dtype=np.float32)
    out[:, mask] = stored.astype(np.float64) * run["slope"] + run["inter"]
    return out.reshape(-1, *space["shape"])


@pytest.mark.parametrize("bulk", BULK)
@pytest.mark.parametrize(
    ("name", "start", "stop", "shards"), [("sub-01_bold", 2, 8, 3), ("sub-02_bold", 0, 7, 2), ("sub-03_bold", 4, 5, 1)]
)
def test_the_reader_written_from_the_document_reads_what_ours_reads(
    name, start, stop, shards, bulk, tmp_path, monkeypatch
):
    from fmristream.shards.dataset import open_dataset
    from tests.shards.tiny_dataset import small_shards, tiny_runs, write_dataset

    small_shards(monkeypatch.setattr)
    write_dataset(str(tmp_path), tiny_runs()[1:], tiny_runs()[:1], bulk_digest=bulk)
    folder = Folder(tmp_path)
    document = newest(folder)
    assert document.get("bulk_digest", "sha256") == bulk
    found = find(folder, document, name)
    stored = stored_frames(folder, found, start, stop)
    assert folder.ranges == 1 + shards, "one range for the index block and one a shard"
    ours = open_dataset(str(tmp_path))
    np.testing.assert_array_equal(stored, ours.reader(name).read_stored(start, stop))
    np.testing.assert_array_equal(volumes(folder, document, found[0], stored), ours.read(name, start, stop))
    np.testing.assert_array_equal(vector(folder, found[1]["moments"]), ours.reader(name).moments)
    np.testing.assert_array_equal(vector(folder, found[1]["stats"]), ours.reader(name).exact_moments)
    assert found[0]["digest"].hex() == run_digest(bulk, found[0], stored_frames(folder, found, 0, found[0]["frames"]))
    assert found[0]["objects_digest"].hex() == objects_digest(bulk, folder, found[1].values())
    assert document["content_digest"] == content_digest(folder, document)


@pytest.mark.parametrize("codec", ["raw", "int8", "int16"])
@pytest.mark.parametrize("name", ["sub-01_bold", "sub-03_bold"])
def test_it_reads_the_other_codecs_as_well(codec, name, tmp_path, monkeypatch):
    from dataclasses import replace

    from fmristream.shards.dataset import open_dataset
    from tests.shards.tiny_dataset import small_shards, tiny_runs, write_dataset

    small_shards(monkeypatch.setattr)
    write_dataset(str(tmp_path), [replace(run, codec=codec) for run in tiny_runs()])
    folder = Folder(tmp_path)
    found = find(folder, newest(folder), name)
    stored = stored_frames(folder, found, 0, found[0]["frames"])
    assert stored.tobytes() == open_dataset(str(tmp_path)).reader(name).read_stored(0, found[0]["frames"]).tobytes()
    assert found[0]["digest"].hex() == run_digest("blake3", found[0], stored)


def run_digest(bulk: str, run: dict, stored: np.ndarray) -> str:
    """Section 10."""
    header = {key: run[key] for key in ("affine", "dtype", "frames", "inter", "shape", "slope", "tr_s")}
    return BULK[bulk](canonical({"header": header, "space": run["space_digest"].hex()}) + stored.tobytes()).hexdigest()


def objects_digest(bulk: str, folder: Folder, arrays) -> str:
    rows = []
    for array in arrays:
        for file in array["files"]:
            key = f"{array['object']}/{file['name']}" if file["name"] else array["object"]
            data = folder.read(key)
            digest = BULK[bulk](data)
            assert digest.digest().startswith(file[f"{bulk}_prefix"])
            rows.append([key, len(data), digest.hexdigest()])
    return sha256(canonical(sorted(rows)))


def content_digest(folder: Folder, document: dict) -> str:
    labels = ("subject", "session", "task", "acq", "run", "echo", "space")
    runs = [run for segment in document["segments"] for run in table(folder, segment["runs"])]
    rows = sorted([*(run[label] for label in labels), run["digest"].hex(), run["split"], run["group"]] for run in runs)
    return sha256(canonical({"format": 1, "parameters": document["parameters"], "runs": rows}))
