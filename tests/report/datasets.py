"""Small datasets to be asked about, and ways to damage them."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmristream.catalog.run import Run, StoredArray
from fmristream.catalog.tables import encode_arrays, encode_runs
from fmristream.ingest.convert import convert
from fmristream.ingest.options import ConvertOptions, ConvertReport
from fmristream.shards.dataset import Dataset, open_dataset
from fmristream.shards.digest import content_digest, digest_of_objects, sha256
from fmristream.shards.generation import commit
from fmristream.shards.hashing import bulk_hexdigest
from tests.ingest.nifti_files import bold_like, gzip_members, nifti_bytes

SHAPE = (5, 4, 6, 7)
WHOLE = ConvertOptions(mask="none", split="none")

Row = tuple[int, StoredArray]


def brain_like(shape: tuple[int, ...] = SHAPE, *, seed: int = 0) -> "np.ndarray[Any, Any]":
    """int16 values with a mean, noise, and voxels that are always 0 or never change."""
    generator = np.random.default_rng(seed)
    values = 1000 + generator.normal(0, 20, size=shape)
    values[0, : shape[1] // 2 + 1] = 0
    values[1:2, 0] = 77
    return np.asfortranarray(values.astype("<i2"))


def write_runs(folder: Path, runs: dict[str, "np.ndarray[Any, Any]"], **lies: Any) -> Path:
    """NIfTI files by name; `.gz` compresses."""
    for name, values in runs.items():
        data = nifti_bytes(values, **lies)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip_members(data) if name.endswith(".gz") else data)
    return folder


def two_runs(tmp_path: Path, options: ConvertOptions = WHOLE) -> tuple[Path, Path]:
    """A source folder with an int16 and a float32 run of two subjects, and the dataset made of it."""
    runs = {"sub-1_bold.nii.gz": brain_like(), "sub-2_bold.nii": bold_like(SHAPE, "f4")}
    source = write_runs(tmp_path / "source", runs)
    converted(source, tmp_path / "dataset", options)
    return source, tmp_path / "dataset"


def converted(source: Path | str, url: Path | str, options: ConvertOptions = WHOLE) -> ConvertReport:
    return convert(str(source), str(url), options=options)


def files_of(dataset: Path) -> list[Path]:
    """Every object that belongs to a dataset on disk."""
    return sorted(path for path in dataset.rglob("*") if path.is_file() and path.parent.name != "tmp")


def flip_bit(path: Path) -> Callable[[], object]:
    """Flip one bit in the middle; the result puts it back."""
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    path.write_bytes(damaged)
    return lambda: path.write_bytes(data)


def recommit(
    url: Path | str,
    *,
    run: Callable[[Run], Run] = lambda run: run,
    array: Callable[[StoredArray], StoredArray] = lambda array: array,
    index: Callable[[bytes], bytes] = lambda data: data,
    document: Callable[[dict[str, Any]], None] = lambda document: None,
) -> Dataset:
    """Commit a generation that says something else, with every digest right: what a faulty writer might do."""
    present = open_dataset(str(url))
    names = [row.name for row in present.runs]
    rows = list(_rows(present, names, array))
    runs = [
        dataclasses.replace(run(row), objects_digest=_objects(present, rows, n)) for n, row in enumerate(present.runs)
    ]
    content = dict(present.generation.document)
    segment = dict(content["segments"][0])
    segment["runs"] = _put(present, encode_runs(runs), len(runs))
    segment["arrays"] = _put(present, encode_arrays(rows, bulk_digest=present.bulk_digest), len(runs))
    data = index(present.store.read(segment["index"]["key"]))
    segment["index"] = _put(present, data, 0)
    content |= {
        "segments": [segment],
        "content_digest": content_digest(sorted(row.identity for row in runs), parameters=present.parameters),
    }
    document(content)
    number = present.generation.number + 1
    commit(present.store, number=number, parent=present.generation_digest, write_id=f"{number}", content=content)
    return open_dataset(str(url))


def with_values(array: StoredArray, url: Path, name: str, data: bytes) -> StoredArray:
    """The array with one of its objects replaced on disk, and its row to fit."""
    path = url / array.object / name if name else url / array.object
    path.write_bytes(data)
    digest = open_dataset(str(url)).bulk_digest
    files = tuple(
        dataclasses.replace(file, bytes=len(data), digest=bulk_hexdigest(data, digest)) if file.name == name else file
        for file in array.files
    )
    return dataclasses.replace(array, files=files)


def _rows(present: Dataset, names: list[str], change: Callable[[StoredArray], StoredArray]) -> Iterator[Row]:
    for row, name in enumerate(names):
        for array in present.arrays_of(name)[1].values():
            yield row, change(array)


def _objects(present: Dataset, rows: list[Row], number: int) -> str:
    """The digest over a run's objects as they lie there now, read anew: tables hold the beginnings of theirs only."""
    objects = []
    for row, array in rows:
        for file in array.files if row == number else ():
            data = present.store.read(file.key_in(array.object))
            objects.append((file.key_in(array.object), len(data), bulk_hexdigest(data, present.bulk_digest)))
    return digest_of_objects(objects)


def _put(dataset: Dataset, data: bytes, rows: int) -> dict[str, Any]:
    digest = sha256(data)
    key = f"tables/{digest}.changed"
    if digest not in {Path(name).stem for name in dataset.store.list("tables")}:
        dataset.store.put_new(key, data)
    else:
        key = next(name for name in dataset.store.list("tables") if Path(name).stem == digest)
    return {"bytes": len(data), "key": key, "rows": rows, "sha256": digest}
