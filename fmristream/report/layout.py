"""Whether tables, index blocks, shards and zarr.json of a run say the same thing."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run, StoredArray
from fmristream.errors import CorruptDataError, FormatError, ObjectMissingError
from fmristream.report.findings import Findings
from fmristream.report.threads import Counter, in_threads
from fmristream.shards import CODES, QUANTIZATION, RAW_ENCODING, VOLUME_ENCODING, VOLUMES, codec
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import run_header
from fmristream.shards.frames import ABSENT
from fmristream.shards.hashing import bulk_record
from fmristream.shards.run_reader import RunReader
from fmristream.shards.side import TABLE_ENCODING

ENTRY_BYTES = 16


def check_layouts(dataset: Dataset, damaged: set[str], counter: Counter) -> Findings:
    """Check every run; objects that are known to be damaged are not looked into again."""
    found = Findings()

    def check(run: Run) -> Findings:
        result = check_layout(dataset, run, damaged)
        counter.add(1)
        return result

    for result in in_threads(check, dataset.runs, counter):
        found.merge(result)
    return found


def check_layout(dataset: Dataset, run: Run, damaged: set[str]) -> Findings:
    """Check one run."""
    found = Findings()
    try:
        _check_rows(dataset, run, found)
        if found.faults:
            return found
        reader = dataset.reader(run)
        for array in reader.arrays.values():
            if array.encoding not in ("blob", TABLE_ENCODING) and f"{array.object}/zarr.json" not in damaged:
                _check_metadata(reader, array, found)
        if reader.index_key not in damaged:
            _check_shards(reader, damaged, found)
    except (CorruptDataError, FormatError) as error:
        found.fault(str(error), run=run.name)
    except ObjectMissingError as error:
        if not any(key in str(error) for key in damaged):
            found.fault(str(error), run=run.name)
    return found


def _check_rows(dataset: Dataset, run: Run, found: Findings) -> None:
    """The runs table against the arrays table and the generation's spaces."""
    _, arrays = dataset.arrays_of(run)
    is_whole, is_integer = VOLUMES in arrays, run.numpy_dtype.kind in "iu"
    is_quantized = CODES in arrays and not is_whole
    is_raw = "bold" in arrays and arrays["bold"].encoding == RAW_ENCODING
    frames = VOLUMES if is_whole else CODES if is_quantized else "residual" if is_integer and not is_raw else "bold"
    needed = {"", frames, "moments", "stats"}
    needed |= ({"reference"} if is_integer else set()) | ({"nifti"} if is_whole else set())
    needed |= {QUANTIZATION} if is_quantized else set()
    if missing := needed - set(arrays):
        named = ", ".join(sorted(name or "the group" for name in missing))
        found.fault(f"the arrays table names no {named}", run=run.name)
        return
    expected: dict[str, tuple[int, ...]] = {"reference": (run.voxels,), "moments": (2, run.voxels)}
    expected |= {"stats": (2, run.voxels), "mask": (run.voxels,), QUANTIZATION: (2, run.voxels)}
    expected[frames] = (run.frames, *(run.shape[::-1] if is_whole else (run.voxels,)))
    for name, shape in expected.items():
        if name in arrays and arrays[name].shape != shape:
            found.fault(f"array {name} has shape {arrays[name].shape}, the run needs {shape}", run=run.name)
    for name in ({frames, "reference", QUANTIZATION} & set(arrays)) - {CODES}:
        if arrays[name].dtype != run.dtype:
            found.fault(f"array {name} has dtype {arrays[name].dtype}, the run {run.dtype}", run=run.name)
    spaces = dataset.generation.document["spaces"]
    space = spaces.get(run.space_digest)
    # Parcels are in a space of their own, which is made of the voxels of the run's.
    others = {array.space_digest for array in arrays.values()} - {run.space_digest}
    if space is None or any(spaces.get(other, {}).get("of") != run.space_digest for other in others):
        found.fault(f"its arrays are not all in the space {run.space_digest[:12]} of its row", run=run.name)
    elif (tuple(space["shape"]), space["voxels"]) != (run.shape, run.voxels):
        found.fault(
            f"its row says grid {run.shape} with {run.voxels} voxels, its space {tuple(space['shape'])} with {space['voxels']}",
            run=run.name,
        )


def _check_metadata(reader: RunReader, array: StoredArray, found: Findings) -> None:
    key = f"{array.object}/zarr.json"
    try:
        document = json.loads(reader.store.read(key))
        if array.encoding == "group":
            expected = _group_attributes(reader)
            told = {name: document["attributes"]["fmristream"].get(name) for name in expected}
        else:
            told, expected = _facts(document), _facts(json.loads(_written(reader, array)))
    except (ValueError, LookupError, TypeError, AttributeError):  # its digest is right: somebody else wrote it so
        found.fault("does not describe a Zarr array or group of this format", run=reader.run.name, key=key)
        return
    for name, value in expected.items():
        if told[name] != value:
            found.fault(f"says {name} {told[name]}, the tables {value}", run=reader.run.name, key=key)


def _group_attributes(reader: RunReader) -> dict[str, Any]:
    run = reader.run
    header = run_header(
        frames=run.frames, shape=run.shape, dtype=run.dtype, slope=run.slope, inter=run.inter, affine=run.affine,
        tr_s=run.tr_s,
    )  # fmt: skip
    ends = [run.valid_min, run.valid_max]
    return {
        **header,
        **bulk_record(reader.bulk_digest),
        "encoding": reader.frames_array.encoding,
        "run_digest": run.digest,
        "space": run.space_digest,
        "valid_range": ends if np.isfinite(ends).all() else None,
    }


def _written(reader: RunReader, array: StoredArray) -> bytes:
    """The zarr.json that an array of this row would be given."""
    from fmristream.shards.zarr_metadata import frames_metadata, plain_metadata, volumes_metadata

    if array.encoding == VOLUME_ENCODING:
        return volumes_metadata(shape=array.shape, dtype=array.dtype, frames_per_shard=array.frames_per_shard)
    if array.frames_per_shard:
        return frames_metadata(
            frames=reader.run.frames,
            voxels=reader.run.voxels,
            dtype=array.dtype,
            frames_per_shard=array.frames_per_shard,
            is_raw=array.encoding == RAW_ENCODING,
        )
    chunks = (*array.shape[:-1], codec.padded_length(array.shape[-1]))
    return plain_metadata(shape=array.shape, chunks=chunks, dtype=array.dtype, names=("",) * len(chunks))


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how an array is read, whichever release of zarr wrote it down."""
    codecs = document["codecs"]
    sharding = codecs[0]["configuration"] if codecs[0]["name"] == "sharding_indexed" else {}
    return {
        "zarr_format": document["zarr_format"],
        "shape": document["shape"],
        "data_type": document["data_type"],
        "chunk_grid": document["chunk_grid"]["configuration"]["chunk_shape"],
        "inner chunks": sharding.get("chunk_shape"),
        "place of the shard index": sharding.get("index_location"),
        "codecs": [one["name"] for one in sharding.get("codecs", codecs)],
        "codecs of the shard index": [one["name"] for one in sharding.get("index_codecs", ())],
        "fill_value": document["fill_value"],
    }


def _check_shards(reader: RunReader, damaged: set[str], found: Findings) -> None:
    """The chunk table at each shard's end against the dataset's index block."""
    array, per_shard = reader.frames_array, reader.frames_array.frames_per_shard
    sizes = {file.name: file.bytes for file in array.files}
    for number, expected in enumerate(_expected_entries(reader.lengths, per_shard)):
        name = f"c/{number}" + "/0" * (len(array.shape) - 1)
        key = f"{array.object}/{name}"
        if key in damaged:
            continue
        size = sizes.get(name)
        footer_bytes = per_shard * ENTRY_BYTES + codec.CRC_BYTES
        if size is None or size < footer_bytes:
            found.fault("the arrays table does not name this shard, or not its size", run=reader.run.name, key=key)
            continue
        footer = reader.store.read_range(key, size - footer_bytes, size)
        table = footer[: -codec.CRC_BYTES]
        entries = np.frombuffer(table, dtype="<u8").reshape(per_shard, 2)
        if codec.checksum(table) != footer[-codec.CRC_BYTES :]:
            found.fault("the checksum of the shard's own index differs", run=reader.run.name, key=key)
        elif (differs := _differing(entries, expected, reader)).any() or _end_of(expected) + len(footer) != size:
            frame = number * per_shard + int(np.argmax(differs))
            found.fault(
                f"the dataset's index does not fit the shard's own, or its size, from frame {frame} on",
                run=reader.run.name,
                key=key,
            )
        found.chunks += int((entries[:, 0] != ABSENT).sum())


def _expected_entries(lengths: NDArray[np.int64], per_shard: int) -> Iterable[NDArray[np.uint64]]:
    """(offset, length) of each chunk of each shard; absent ones behind the last frame."""
    for first in range(0, len(lengths), per_shard):
        within = lengths[first : first + per_shard]
        entries = np.full((per_shard, 2), ABSENT, dtype=np.uint64)
        entries[: len(within), 0] = np.cumsum(within) - within
        entries[: len(within), 1] = within
        yield entries


def _differing(entries: NDArray[np.uint64], expected: NDArray[np.uint64], reader: RunReader) -> NDArray[np.bool_]:
    """(F,) where a shard's own index says something else."""
    if not reader.is_quantized:
        return np.asarray((entries != expected).any(axis=1))
    # The dataset's index counts what stands behind the codes as well, at least its size and checksum.
    is_there = entries[:, 0] != ABSENT
    too_long = is_there & (entries[:, 1] + np.uint64(2 * codec.CRC_BYTES) > expected[:, 1])
    return np.asarray((entries[:, 0] != expected[:, 0]) | too_long)


def _end_of(entries: NDArray[np.uint64]) -> int:
    """Where the last chunk ends, and the shard's own index begins."""
    present = entries[entries[:, 0] != ABSENT]
    return int(present[-1].sum())
