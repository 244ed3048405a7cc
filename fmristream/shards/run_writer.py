"""One run written once: its Zarr group, its statistics, its digest. Frames go in, a row for the tables comes out."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import StoredArray, StoredFile
from fmristream.shards import CODES, FORMAT_VERSION, QUANTIZATION, QUANTIZED_ENCODING, RAW_ENCODING
from fmristream.shards.digest import RunDigest, run_header
from fmristream.shards.frames import FramesWriter
from fmristream.shards.hashing import bulk_record
from fmristream.shards.index import words_of
from fmristream.shards.run_objects import RunObjects
from fmristream.shards.spaces import AnySpace
from fmristream.signal.measure import REFERENCE_FRAMES, RunMeasure, Statistics, moments_of, reference_of
from fmristream.signal.quantize import Quantizer, quantization_of
from fmristream.storage import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRun:
    """What a finished run left behind."""

    object: str
    digest: str
    statistics: Statistics
    arrays: tuple[StoredArray, ...]
    lengths: tuple[int, ...]  # what its index block holds, see `index.words_of`
    removed: tuple[str, ...] = ()  # header fields that held something and were not stored
    quantization: Mapping[str, Any] | None = None  # bound and measured error, where values were not stored exactly


class RunWriter:
    """Takes (v,) frames in the stored dtype and writes them; leaving the block before `finish` discards open objects.

    Memory: the first 16 frames until the reference is known, then one frame and three vectors of statistics.

    Args:
        store: the dataset.
        space: which voxels these are.
        frames: how many will come.
        dtype: little-endian stored dtype.
        slope: scaled value = stored x slope + inter.
        inter: see slope.
        affine: the run's own, 16 numbers row by row.
        tr_s: repetition time in seconds, None if unknown.
        bulk_digest: which digest values and objects get.
        is_raw: store values as they are, without compression.
        quantizer: store codes with a bounded error instead; `dtype` is that of the source.
    """

    def __init__(
        self,
        store: Store,
        space: AnySpace,
        *,
        frames: int,
        dtype: "np.dtype[Any]",
        slope: float,
        inter: float,
        affine: tuple[float, ...],
        tr_s: float | None,
        bulk_digest: str,
        is_raw: bool = False,
        quantizer: Quantizer | None = None,
    ) -> None:
        # A random name: it tells nothing of the subject, and no other attempt can have it.
        self.object = f"runs/{secrets.token_hex(8)}-{secrets.token_hex(4)}.zarr"
        self._store, self._space, self._quantizer = store, space, quantizer
        self._bulk_digest = bulk_digest
        self._dtype = dtype if quantizer is None else quantizer.decoded.dtype  # of what readers call stored values
        self._header = run_header(
            frames=frames,
            shape=space.frame_shape,
            dtype=self._dtype.str,
            slope=slope,
            inter=inter,
            affine=affine,
            tr_s=tr_s,
        )
        self._digest = RunDigest(header=self._header, space_digest=space.digest, bulk_digest=bulk_digest)
        self._has_reference = self._dtype.kind != "f"
        self._name, self._encoding = _kind(self._dtype, is_raw=is_raw, is_quantized=quantizer is not None)
        self._voxels = space.voxels
        self._writer = FramesWriter(
            store,
            f"{self.object}/{self._name}",
            frames=frames,
            voxels=self._voxels,
            dtype=dtype if quantizer is None else quantizer.codec.code_dtype,
            bulk_digest=bulk_digest,
            is_raw=is_raw,
        )
        # Fill this with the next frame, (v,), then call append(); what is stored as it is goes straight into the chunk.
        is_plain = self._encoding in ("direct", RAW_ENCODING)
        self.values: NDArray[Any] = self._writer.frame if is_plain else np.empty(self._voxels, dtype=dtype)
        # Statistics are taken of differences, also where these are not what is stored.
        self._residual: NDArray[Any] | None = None
        if self._has_reference:
            self._residual = np.empty(self._voxels, dtype=dtype) if is_plain else self._writer.frame
        self._held: list[NDArray[Any]] = []
        self._hold = min(REFERENCE_FRAMES, frames)
        self._reference: NDArray[Any] | None = None
        self._measure: RunMeasure | None = None
        self._objects = RunObjects(store, self.object, space.digest, bulk_digest)
        self._finished = False

    def add(self, values: NDArray[Any]) -> None:
        """Write the next frame, (v,); the array may be reused afterwards."""
        self.values[:] = values
        self.append()

    def append(self) -> None:
        """Write what stands in `values` as the next frame.

        Raises:
            SourceError: codes cannot hold a value within their bound.
        """
        if self._quantizer is not None:
            self._write_codes(self._quantizer)
            return
        if self._measure is not None:
            self._write()
            return
        self._held.append(self.values.copy())
        if len(self._held) == self._hold:
            self._measure = self._new_measure()
            for held in self._held:
                self.values[:] = held
                self._write()
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
        if self._has_reference:
            arrays.append(put("reference", self._reference, names=("voxel",)))
        if self._quantizer is not None:
            values = quantization_of(self._quantizer.scale)
            arrays.append(put(QUANTIZATION, values, names=("quantity", "voxel")))
        arrays.append(put("moments", moments_of(statistics, dtype=self._dtype), names=("moment", "voxel")))
        if own_mask is not None:
            arrays.append(put("mask", own_mask.astype(np.uint8), names=("voxel",)))
        with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, and their z-scores 0
            arrays.append(self._objects.put_stats(np.stack([statistics.delta, statistics.sd]).astype("<f4")))
        digest = self._digest.hexdigest()
        attributes = self._attributes(digest, statistics, sidecar or {}, resampled)
        arrays.append(self._objects.put_group({"fmristream": attributes}, dtype=self._dtype))
        self._objects.publish()
        self._finished = True
        return WrittenRun(
            object=self.object,
            digest=digest,
            statistics=statistics,
            arrays=tuple(arrays),
            lengths=tuple(words_of(self._encoding, lengths=lengths, checks=self._writer.checks)),
            quantization=None if self._quantizer is None else self._quantizer.record(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.__exit__(*exc)
        if not self._finished:
            self._objects.delete(also=self._writer.published)

    def _write(self) -> None:
        assert self._measure is not None
        self._measure.add(self.values, self._residual)
        self._digest.add(self.values.data)
        self._writer.append()

    def _write_codes(self, quantizer: Quantizer) -> None:
        """Digest and statistics are of what readers will get."""
        escapes = quantizer.encode(self.values, self._writer.frame)
        decoded = quantizer.decoded
        self._writer.append(escapes=escapes)
        self._digest.add(decoded.data)
        if self._measure is not None:
            self._measure.add(decoded, None)
            return
        self._held.append(decoded.copy())
        if len(self._held) == self._hold:
            self._measure = self._new_measure()
            for held in self._held:
                self._measure.add(held, None)
            self._held.clear()

    def _new_measure(self) -> RunMeasure:
        """Statistics about the reference of the frames that were held."""
        self._reference = reference_of(self._held)
        return RunMeasure(self._reference, dtype=self._dtype, slope=self._header["slope"], inter=self._header["inter"])

    def _frames_array(self, shards: tuple[StoredFile, ...]) -> StoredArray:
        from fmristream.shards.zarr_metadata import frames_metadata

        frames = self._header["frames"]
        dtype = self._writer.frame.dtype
        metadata = frames_metadata(
            frames=frames,
            voxels=self._voxels,
            dtype=dtype.str,
            frames_per_shard=self._writer.frames_per_shard,
            is_raw=self._encoding == RAW_ENCODING,
        )
        return self._objects.row(
            self._name,
            dtype,
            encoding=self._encoding,
            shape=(frames, self._voxels),
            files=(*shards, self._objects.put(f"{self._name}/zarr.json", metadata, relative_to=self._name)),
            frames_per_shard=self._writer.frames_per_shard,
        )

    def _attributes(
        self, digest: str, statistics: Statistics, sidecar: Mapping[str, Any], resampled: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        return {
            **self._header,
            **bulk_record(self._bulk_digest),
            "encoding": self._encoding,
            **({} if self._quantizer is None else {"quantization": self._quantizer.record()}),
            "run_digest": digest,
            **({} if resampled is None else {"resampled": dict(resampled)}),
            **({"sidecar": dict(sidecar)} if sidecar else {}),
            "space": self._space.digest,
            "valid_range": _range(statistics, self._dtype),
            "version": FORMAT_VERSION,
        }


def _kind(dtype: "np.dtype[Any]", *, is_raw: bool, is_quantized: bool) -> tuple[str, str]:
    """Name and encoding of the array that holds the frames."""
    if is_quantized:
        return CODES, QUANTIZED_ENCODING
    if is_raw:
        return "bold", RAW_ENCODING
    return ("bold", "direct") if dtype.kind == "f" else ("residual", "difference")


def _range(statistics: Statistics, dtype: "np.dtype[Any]") -> list[float | int] | None:
    """Smallest and largest finite stored value; None where there is none."""
    if statistics.valid_min > statistics.valid_max:
        return None
    ends = (statistics.valid_min, statistics.valid_max)
    return [float(end) for end in ends] if dtype.kind == "f" else [int(end) for end in ends]
