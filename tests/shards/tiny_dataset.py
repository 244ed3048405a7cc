"""A dataset of three small runs, written by hand: no converter between the tests and the format."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fmristream.catalog.run import Run
from fmristream.catalog.tables import encode_arrays, encode_participants, encode_runs, encode_skipped
from fmristream.errors import ObjectExistsError
from fmristream.shards import frames as frames_module
from fmristream.shards.digest import content_digest, objects_digest, sha256
from fmristream.shards.generation import Generation, commit
from fmristream.shards.hashing import NEW_BULK_DIGEST, bulk_record
from fmristream.shards.index import encode_block
from fmristream.shards.run_writer import RunWriter, WrittenRun
from fmristream.shards.spaces import Space, space_document, write_space
from fmristream.signal.grid import Grid
from fmristream.signal.quantize import LOSSY_CODECS, Quantizer, RangeMeasure
from fmristream.storage import Store, open_store

AFFINE = (-2.0, 0.0, 0.0, 10.0, 0.0, 2.0, 0.0, -12.5, 0.0, 0.0, 2.5, -7.0, 0.0, 0.0, 0.0, 1.0)
PARAMETERS = {"codec": "lossless", "layout": "voxels"}
PARTICIPANTS: list[dict[str, Any]] = [
    {"subject": "01", "age": 31.0, "sex": "F"},
    {"subject": "02", "age": None, "sex": "M"},
]
SKIPPED = [("sub-04_bold", "not a NIfTI file")]


@dataclass(frozen=True, kw_only=True, eq=False)
class TinyRun:
    """A run to be written: whole volumes, (t, x, y, z) in the stored dtype."""

    name: str
    subject: str
    split: str
    volumes: np.ndarray
    mask: np.ndarray
    slope: float = 1.0
    inter: float = 0.0
    tr_s: float | None = 0.72
    own_mask: np.ndarray | None = None
    codec: str = "lossless"

    @property
    def space(self) -> Space:
        return Space(grid=Grid(shape=self.mask.shape, affine=AFFINE), mask=self.mask)

    @property
    def values(self) -> np.ndarray:
        """(t, v), in the order of storage."""
        return np.ascontiguousarray(self.volumes[:, self.mask])

    @property
    def scaled(self) -> np.ndarray:
        """What `Dataset.read` must give: float32, 0 outside the mask."""
        scaled = (self.volumes.astype(np.float64) * self.slope + self.inter).astype(np.float32)
        return np.where(self.mask, scaled, np.float32(0))


def bold_like(shape: tuple[int, ...], *, frames: int, dtype: str, seed: int) -> np.ndarray:
    """(t, x, y, z): an image of its own level in every voxel, and noise of a few percent."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(60, 180, shape)
    return (image + rng.normal(0, 4, (frames, *shape))).astype(dtype)


def tiny_runs() -> tuple[TinyRun, ...]:
    """int16 with a mask of its own, uint8 over its full range in the same space, float32 with NaN in another."""
    shape = (5, 4, 3)
    rng = np.random.default_rng(11)
    mask = rng.random(shape) < 0.7
    full_range = rng.integers(0, 256, (7, *shape), dtype=np.uint8)
    floats = bold_like((3, 3, 2), frames=21, dtype="<f4", seed=3)
    floats[4, 1, 1, 1] = np.nan
    floats[:, 0, 0, 0] = 0
    return (
        TinyRun(
            name="sub-01_bold", subject="01", split="train", mask=mask, slope=0.5, inter=-10.0, own_mask=rng.random(shape) < 0.5,
            volumes=bold_like(shape, frames=23, dtype="<i2", seed=1),
        ),
        TinyRun(name="sub-02_bold", subject="02", split="val", mask=mask, volumes=full_range, tr_s=None),
        TinyRun(name="sub-03_bold", subject="03", split="test", mask=np.ones((3, 3, 2), dtype=bool), volumes=floats),
    )  # fmt: skip


def write_run(store: Store, run: TinyRun, *, bulk_digest: str = NEW_BULK_DIGEST) -> WrittenRun:
    """The objects of one run."""
    with RunWriter(
        store, run.space, frames=len(run.volumes), dtype=run.volumes.dtype, slope=run.slope, inter=run.inter, affine=AFFINE,
        tr_s=run.tr_s, bulk_digest=bulk_digest, is_raw=run.codec == "raw", quantizer=quantizer_of(run),
    ) as writer:  # fmt: skip
        for values in run.values:
            writer.add(values)
        return writer.finish(own_mask=None if run.own_mask is None else run.own_mask[run.mask])


def quantizer_of(run: TinyRun) -> Quantizer | None:
    """Of a lossy codec: what the first pass finds."""
    codec = LOSSY_CODECS.get(run.codec)
    if codec is None:
        return None
    measure = RangeMeasure(frames=len(run.values), dtype=run.values.dtype)
    for values in run.values:
        measure.add(values)
    scale = measure.finish(codec)
    return Quantizer(codec=codec, scale=scale, dtype=run.values.dtype, slope=run.slope, inter=run.inter)


def run_row(run: TinyRun, written: WrittenRun) -> Run:
    """The row of the runs table."""
    names = ("residual_wraps", "valid_min", "valid_max", "nonfinite", "foreground_count", "foreground_mean",
             "foreground_sd", "foreground_min", "foreground_max")  # fmt: skip
    return Run(
        name=run.name, subject=run.subject, space="MNI", split=run.split, group=run.subject, frames=len(run.volumes),
        tr_s=run.tr_s, shape=run.space.grid.shape, voxels=run.space.voxels, space_digest=run.space.digest, affine=AFFINE,
        dtype=(written.quantization or {"decoded_dtype": run.volumes.dtype.str})["decoded_dtype"],
        slope=run.slope, inter=run.inter, digest=written.digest, object=written.object,
        objects_digest=objects_digest(written.arrays),
        outside=0, source_bytes=1000, source_crc="gz:0badcafe:1000",
        **{name: getattr(written.statistics, name) for name in names},
    )  # fmt: skip


def segment_of(
    store: Store, runs: Sequence[tuple[TinyRun, WrittenRun]], *, bulk_digest: str
) -> tuple[list[Run], dict[str, Any]]:
    """(rows, what a generation says of them): two tables and an index."""
    rows = [run_row(run, written) for run, written in runs]
    blocks: list[bytes] = []
    arrays = []
    for row, (_, written) in enumerate(runs):
        offset = sum(map(len, blocks))
        blocks.append(encode_block(written.lengths))
        for array in written.arrays:
            located = (
                replace(array, index_offset=offset, index_bytes=len(blocks[-1])) if array.frames_per_shard else array
            )
            arrays.append((row, located))
    index = b"".join(blocks)
    return rows, {
        "arrays": put_table(store, encode_arrays(arrays, bulk_digest=bulk_digest), len(rows)),
        "index": put(store, f"index/{sha256(index)}", index),
        "runs": put_table(store, encode_runs(rows), len(rows)),
    }


def put_table(store: Store, data: bytes, rows: int) -> dict[str, Any]:
    return {**put(store, f"tables/{sha256(data)}.parquet", data), "rows": rows}


def put(store: Store, key: str, data: bytes) -> dict[str, Any]:
    with suppress(ObjectExistsError):
        store.put_new(key, data)
    return {"bytes": len(data), "key": key, "sha256": sha256(data)}


def generation_content(
    store: Store, *segments: Sequence[TinyRun], bulk_digest: str = NEW_BULK_DIGEST
) -> dict[str, Any]:
    """Write runs, spaces and tables; what is left is to commit them."""
    rows: list[Run] = []
    listed = []
    spaces: dict[str, Any] = {}
    for runs in segments:
        for run in runs:
            objects = [{"bytes": f.bytes, "name": f.name, "sha256": f.digest} for f in write_space(store, run.space)]
            spaces[run.space.digest] = {**space_document(run.space), "objects": objects}
        more, segment = segment_of(
            store, [(run, write_run(store, run, bulk_digest=bulk_digest)) for run in runs], bulk_digest=bulk_digest
        )
        rows += more
        listed.append(segment)
    return {
        **bulk_record(bulk_digest),
        "content_digest": content_digest(sorted(row.identity for row in rows), parameters=PARAMETERS),
        "parameters": PARAMETERS,
        "participants": put_table(store, encode_participants(PARTICIPANTS), len(PARTICIPANTS)),
        "segments": listed,
        "skipped": put_table(store, encode_skipped(SKIPPED), len(SKIPPED)),
        "spaces": spaces,
        "split": {"kind": "file"},
    }


def write_dataset(
    url: str,
    *segments: Sequence[TinyRun],
    number: int = 1,
    parent: str | None = None,
    write_id: str = "tiny",
    bulk_digest: str = NEW_BULK_DIGEST,
) -> Generation:
    """A committed dataset; without segments, the three tiny runs in one."""
    store = open_store(url)
    content = generation_content(store, *(segments or (tiny_runs(),)), bulk_digest=bulk_digest)
    return commit(store, number=number, parent=parent, write_id=write_id, content=content)


def small_shards(set_constant: Callable[[object, str, int], None], size: int = 300) -> None:
    """Make shards of a few frames, so that small runs have several: pass `monkeypatch.setattr`."""
    set_constant(frames_module, "SHARD_BYTES", size)
