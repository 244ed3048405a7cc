"""What FORMAT.md says of parcels, tables and sketches is enough to read and to make them, without our code."""

import hashlib
import io
import json
import math
import struct

import numpy as np
import pyarrow.parquet as pq
import zarr

import fmristream
from fmristream.ingest.options import ConvertOptions
from tests.ingest.nifti_files import nifti_bytes
from tests.ingest.source_trees import DERIVATIVE, make

SHAPE, FRAMES = (14, 15, 13), 30
AFFINE = ((7.0, 0.3, 0, -41.0), (0, 6.0, 0, -52.0), (0, 0, 8.0, -33.0))


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def a_dataset(tmp_path):
    rng = np.random.default_rng(0)
    bold = rng.integers(0, 900, (*SHAPE, FRAMES)).astype("<i2")
    labels = np.zeros(SHAPE, "u1")
    labels[2:9, 3:9, 2:9], labels[9:, 3:9, 2:9] = 5, 2
    physio = "0.5\t1\n0.25\tn/a\n"
    tree = {
        "sub-01/func/sub-01_task-x_space-MNI_bold.nii": nifti_bytes(bold, srow=AFFINE),
        "sub-01/func/sub-01_task-x_physio.tsv.gz": physio,
        "sub-01/func/sub-01_task-x_physio.json": json.dumps(
            {"SamplingFrequency": 0.1, "StartTime": -3, "Columns": ["a", "b"]}
        ),
        "sub-01/func/sub-01_task-x_events.tsv": "onset\tduration\ttrial_type\n1\tn/a\tn/a\n2\t.5\tword\n",
    }
    atlas = (
        make(tmp_path / "atlas", {"a.nii": nifti_bytes(labels, srow=AFFINE), "a.txt": "5 five 0 0 0 0\n"}) + "/a.nii"
    )
    source = make(tmp_path / "in", DERIVATIVE | tree)
    options = ConvertOptions(mask="none", split="none", atlases=(atlas,))
    fmristream.convert(source, str(tmp_path / "out"), options=options)
    return fmristream.open(str(tmp_path / "out")), tmp_path / "out", np.moveaxis(bold, -1, 0), labels


def test_parcels_can_be_read_and_made_from_the_document_alone(tmp_path):
    dataset, root, bold, labels = a_dataset(tmp_path)
    spaces = dataset.generation.document["spaces"]
    [(digest, space)] = [(key, value) for key, value in spaces.items() if value["kind"] == "parcels"]
    group = zarr.open_group(root / "spaces" / digest, mode="r")
    arrays = {name: np.asarray(group[name][:]) for name in ("label", "coverage", "indptr", "voxel", "weight")}
    told = group.attrs["fmristream"]
    assert arrays["label"].tolist() == [2, 5]
    assert told.pop("names") == ["", "five"]
    members = {name: value for name, value in space.items() if name != "objects"}
    assert members == told
    assert digest == sha256(canonical(members))
    assert members["sha256"] == {name: sha256(values.tobytes()) for name, values in arrays.items()} | {
        "names": sha256(canonical(["", "five"]))
    }
    flat = labels.reshape(-1)
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] > 0]
    counts = np.cumsum([0, (flat == 2).sum(), (flat == 5).sum()]).astype("<i8")
    parts = (np.array([2, 5], "<i8"), counts, order.astype("<i8"), np.ones(len(order), "<f4"))
    affine = [float(value) for row in (*AFFINE, (0, 0, 0, 1)) for value in row]
    about = {"affine": [float(np.float32(value)) for value in affine], "kind": "labels", "shape": list(SHAPE)}
    assert members["atlas"] == sha256(canonical({**about, "sha256": [sha256(part.tobytes()) for part in parts]}))
    series = np.asarray(dataset.zarr(0)[f"parcels-{members['atlas'][:8]}"][:])
    robust = np.asarray(dataset.zarr(0)[f"parcels-{members['atlas'][:8]}-robust"][:])
    for k in range(2):
        voxels = arrays["voxel"][arrays["indptr"][k] : arrays["indptr"][k + 1]]
        np.testing.assert_allclose(series[:, k], bold.reshape(FRAMES, -1)[:, voxels].mean(axis=1), rtol=1e-6)
    low, middle, high = np.percentile(series.astype(float), (25, 50, 75), axis=0)
    np.testing.assert_allclose(robust, [middle, high - low], rtol=1e-6)


def test_tables_are_parquet_that_any_reader_has(tmp_path):
    dataset, root, _, _ = a_dataset(tmp_path)
    arrays = dataset.arrays_of(0)[1]
    events = pq.read_table(io.BytesIO((root / arrays["events"].object).read_bytes()))
    assert events.column("trial_type").to_pylist() == [None, "word"]
    assert np.array_equal(events.column("duration").to_pylist(), [np.nan, 0.5], equal_nan=True)
    physio = pq.read_table(io.BytesIO((root / arrays["physio"].object).read_bytes()))
    facts = {name.decode(): float.fromhex(value.decode()) for name, value in physio.schema.metadata.items()}
    assert facts == {"sampling_hz": 0.1, "start_s": -3.0}


def test_a_sketch_can_be_made_from_the_document_alone(tmp_path):
    dataset, root, bold, _ = a_dataset(tmp_path)
    data = (root / dataset.arrays_of(0)[1]["sketch"].object).read_bytes()
    magic, changes, courses, *first = struct.unpack_from("<4sHB3h", data)
    assert (magic, changes, courses) == (b"fsk1", FRAMES - 1, 32)
    matrix = dataset.space(0).grid.matrix()
    centres = np.indices(SHAPE).reshape(3, -1).T @ matrix[:3, :3].T + matrix[:3, 3]
    blocks, which = np.unique(np.floor(centres / 24), axis=0, return_inverse=True)
    sums = np.stack([np.bincount(which.reshape(-1), weights=frame.reshape(-1)) for frame in bold])
    z = np.diff(sums, axis=0)
    z -= np.median(z, axis=0)
    z = np.clip(z / (1.4826 * np.median(np.abs(z), axis=0)), -3, 3)
    volume = abs(np.linalg.det(matrix[:3, :3]))
    weights = np.minimum(1, np.bincount(which.reshape(-1)) * volume / 24**3)
    mixed = np.zeros((changes, courses))
    for column, block in enumerate(blocks):
        number = int.from_bytes(
            hashlib.sha256(b"fmristream-sketch-v1" + struct.pack("<3h", *map(int, block))).digest(), "big"
        )
        signs = [1 if number >> (255 - course) & 1 else -1 for course in range(courses)]
        mixed += np.outer(z[:, column] * weights[column], signs)
    row = math.ceil(changes / 8)
    for course in range(courses):
        at = struct.calcsize("<4sHB3h") + course * row
        bits = np.unpackbits(np.frombuffer(data[at : at + row], "u1"))[:changes]
        assert (bits != (mixed[:, course] > 0)).sum() == 0
    image = np.frombuffer(data[-512:], "u1").reshape(8, 8, 8)
    mean = sums.mean(axis=0) * volume
    for block, value in zip(blocks.astype(int), mean, strict=True):
        place = block - first
        if ((place >= 0) & (place < 8)).all():
            assert abs(int(image[tuple(place)]) - 255 * value / mean.max()) <= 1
