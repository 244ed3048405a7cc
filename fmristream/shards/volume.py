"""Layout `volume`: a run as OME-Zarr 0.5 with whole frames and, as NIfTI-Zarr has it, the bytes of its NIfTI header.

A frame of `0` is (z, y, x) in C order, which is the order of a NIfTI file: writing the header and the frames one after
the other gives the file again. Everything beside the frames (reference, moments, mask, stats) is over the voxels of the
space, as in the layout `voxels`.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import StoredArray, StoredFile
from fmristream.shards import FORMAT_VERSION, VOLUME_ENCODING, VOLUMES
from fmristream.shards.digest import RunDigest, run_header
from fmristream.shards.frames import FramesWriter
from fmristream.shards.hashing import bulk_record
from fmristream.shards.run_objects import RunObjects
from fmristream.shards.run_writer import WrittenRun
from fmristream.shards.spaces import Space
from fmristream.signal.grid import in_byte_order, volume_of, voxel_sizes_mm
from fmristream.signal.measure import REFERENCE_FRAMES, RunMeasure, Statistics, moments_of, reference_of
from fmristream.storage import Store

OME_VERSION = "0.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiPrefix:
    """Bytes that a NIfTI file has before its first voxel, as they are stored, and what became of them."""

    data: bytes
    big_endian: bool  # header and voxels of the file that they begin
    mode: str  # "keep": the source's own, every byte; "scrub": without what may tell who was scanned
    removed: tuple[str, ...] = ()  # names of the fields that held something and are gone


class VolumeRunWriter:
    """Takes (v,) frames of a whole grid, as `RunWriter` does, and writes them as volumes with their NIfTI header.

    Memory: the first 16 frames until the reference is known, then one frame and three vectors of statistics.

    Args:
        store: the dataset.
        space: the whole grid; its mask is 1 everywhere.
        frames: how many will come.
        dtype: little-endian stored dtype.
        slope: scaled value = stored x slope + inter.
        inter: see slope.
        affine: the run's own, 16 numbers row by row.
        tr_s: repetition time in seconds, None if unknown.
        bulk_digest: which digest values and objects get.
        prefix: what an exported file begins with.
    """

    def __init__(
        self,
        store: Store,
        space: Space,
        *,
        frames: int,
        dtype: "np.dtype[Any]",
        slope: float,
        inter: float,
        affine: tuple[float, ...],
        tr_s: float | None,
        bulk_digest: str,
        prefix: NiftiPrefix,
    ) -> None:
        assert space.mask.all(), "volumes are stored whole"
        # A random name: it tells nothing of the subject, and no other attempt can have it.
        self.object = f"runs/{secrets.token_hex(8)}-{secrets.token_hex(4)}.ome.zarr"
        self._space, self._dtype, self._prefix, self._bulk_digest = space, dtype, prefix, bulk_digest
        self._header = run_header(
            frames=frames, shape=space.grid.shape, dtype=dtype.str, slope=slope, inter=inter, affine=affine, tr_s=tr_s
        )
        self._digest = RunDigest(header=self._header, space_digest=space.digest, bulk_digest=bulk_digest)
        self._stream = hashlib.sha256(prefix.data)  # of the file that export will write
        self._objects = RunObjects(store, self.object, space.digest, bulk_digest)
        voxels = space.voxels
        self._writer = FramesWriter(
            store,
            f"{self.object}/{VOLUMES}",
            frames=frames,
            voxels=voxels,
            dtype=dtype,
            bulk_digest=bulk_digest,
            chunk_shape=space.grid.shape[::-1],
        )
        self.values: NDArray[Any] = np.empty(voxels, dtype=dtype)  # fill this with the next frame, then call append()
        # Of one frame; statistics are taken of differences, which are stored in the other layout only.
        self._residual = None if dtype.kind == "f" else np.empty(voxels, dtype=dtype)
        self._held: list[NDArray[Any]] = []
        self._hold = min(REFERENCE_FRAMES, frames)
        self._reference: NDArray[Any] | None = None
        self._measure: RunMeasure | None = None
        self._finished = False

    def add(self, values: NDArray[Any]) -> None:
        """Write the next frame, (v,); the array may be reused afterwards."""
        self.values[:] = values
        self.append()

    def append(self) -> None:
        """Write what stands in `values` as the next frame."""
        self._digest.add(self.values.data)
        self._write(self.values)
        if self._measure is not None:
            self._measure.add(self.values, self._residual)
            return
        self._held.append(self.values.copy())
        if len(self._held) == self._hold:
            self._reference = reference_of(self._held)
            self._measure = RunMeasure(
                self._reference, dtype=self._dtype, slope=self._header["slope"], inter=self._header["inter"]
            )
            for held in self._held:
                self._measure.add(held, self._residual)
            self._held.clear()

    def finish(
        self,
        *,
        own_mask: NDArray[np.bool_] | None = None,
        sidecar: Mapping[str, Any] | None = None,
        resampled: Mapping[str, Any] | None = None,
    ) -> WrittenRun:
        """Publish everything that belongs to the run; it becomes part of the dataset when a generation names it.

        Args:
            own_mask: (v,) which of the stored voxels lie in the run's own brain mask, where it has one.
            sidecar: what may be stored of its BIDS sidecar.
            resampled: what the source was, where these are not its values.
        """
        assert self._measure is not None
        assert self._reference is not None
        statistics = self._measure.finish()
        lengths, shards = self._writer.finish()
        put = self._objects.put_array
        arrays = [self._frames_array(shards)]
        if self._dtype.kind != "f":
            arrays.append(put("reference", self._reference, names=("voxel",)))
        arrays.append(put("moments", moments_of(statistics, dtype=self._dtype), names=("moment", "voxel")))
        if own_mask is not None:
            arrays.append(put("mask", own_mask.astype(np.uint8), names=("voxel",)))
        arrays.append(put("nifti", np.frombuffer(self._prefix.data, dtype=np.uint8), names=("byte",)))
        with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, and their z-scores 0
            arrays.append(self._objects.put_stats(np.stack([statistics.delta, statistics.sd]).astype("<f4")))
        digest = self._digest.hexdigest()
        attributes = self._attributes(digest, statistics, sidecar or {}, resampled)
        arrays.append(self._objects.put_group(attributes, dtype=self._dtype))
        self._objects.publish()
        self._finished = True
        return WrittenRun(
            object=self.object,
            digest=digest,
            statistics=statistics,
            arrays=tuple(arrays),
            lengths=tuple(lengths),
            removed=self._prefix.removed,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.__exit__(*exc)
        if not self._finished:
            self._objects.delete(also=self._writer.published)

    def _write(self, values: NDArray[Any]) -> None:
        shape = self._space.grid.shape
        frame = self._writer.frame
        frame.reshape(shape[::-1])[...] = volume_of(values, shape)
        self._stream.update(in_byte_order(frame, big_endian=self._prefix.big_endian).data)
        self._writer.append()

    def _frames_array(self, shards: tuple[StoredFile, ...]) -> StoredArray:
        from fmristream.shards.zarr_metadata import volumes_metadata

        frames, per_shard = self._header["frames"], self._writer.frames_per_shard
        shape = (frames, *self._space.grid.shape[::-1])
        metadata = volumes_metadata(shape=shape, dtype=self._dtype.str, frames_per_shard=per_shard)
        return self._objects.row(
            VOLUMES,
            self._dtype,
            encoding=VOLUME_ENCODING,
            shape=shape,
            files=(*shards, self._objects.put(f"{VOLUMES}/zarr.json", metadata, relative_to=VOLUMES)),
            frames_per_shard=per_shard,
        )

    def _attributes(
        self, digest: str, statistics: Statistics, sidecar: Mapping[str, Any], resampled: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        own = {
            **self._header,
            **bulk_record(self._bulk_digest),
            "encoding": VOLUME_ENCODING,
            "nifti": {
                "big_endian": self._prefix.big_endian,
                "headers": self._prefix.mode,
                "removed": list(self._prefix.removed),
                "stream_sha256": self._stream.hexdigest(),
            },
            "run_digest": digest,
            **({} if resampled is None else {"resampled": dict(resampled)}),
            **({"sidecar": dict(sidecar)} if sidecar else {}),
            "space": self._space.digest,
            "valid_range": _range(statistics, self._dtype),
            "version": FORMAT_VERSION,
        }
        return {
            "fmristream": own,
            "ome": ome_attributes(affine=tuple(self._header["affine"]), tr_s=self._header["tr_s"]),
        }


def ome_attributes(*, affine: tuple[float, ...], tr_s: float | None) -> dict[str, Any]:
    """OME-Zarr's account of `0`: axes, units, size of a voxel and of a step in time.

    OME-Zarr 0.5 can say no rotation and no flip. The place of the first voxel is said only where the axes of the grid
    are those of the world; else the origin is left at 0, and `affine` beside says where things are.
    """
    matrix = np.array(affine).reshape(4, 4)
    sizes = [size if size > 0 else 1.0 for size in voxel_sizes_mm(matrix)]
    is_plain = np.array_equal(matrix[:3, :3], np.diag(sizes))
    origin = matrix[:3, 3].tolist() if is_plain else [0.0, 0.0, 0.0]
    time: dict[str, Any] = {"name": "t", "type": "time"}
    axes = [time if tr_s is None else {**time, "unit": "second"}]
    axes += [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    transformations = [
        {"type": "scale", "scale": [1.0 if tr_s is None else tr_s, *sizes[::-1]]},
        {"type": "translation", "translation": [0.0, *origin[::-1]]},
    ]
    datasets = [{"path": VOLUMES, "coordinateTransformations": transformations}]
    return {"version": OME_VERSION, "multiscales": [{"name": "bold", "axes": axes, "datasets": datasets}]}


def _range(statistics: Statistics, dtype: "np.dtype[Any]") -> list[float | int] | None:
    """Smallest and largest finite stored value; None where there is none."""
    if statistics.valid_min > statistics.valid_max:
        return None
    ends = (statistics.valid_min, statistics.valid_max)
    return [float(end) for end in ends] if dtype.kind == "f" else [int(end) for end in ends]
