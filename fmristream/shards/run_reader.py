"""The arrays of one run, read by byte range and checked: index block, frames, reference, moments."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run, StoredArray
from fmristream.errors import CorruptDataError, FormatError, UsageError
from fmristream.shards import (
    CODES,
    MAX_PREFIX_BYTES,
    QUANTIZATION,
    QUANTIZED_ENCODING,
    RAW_ENCODING,
    VOLUME_ENCODING,
    VOLUMES,
    codec,
)
from fmristream.shards.hashing import bulk_hexdigest
from fmristream.shards.index import ChunkIndex, decode_index
from fmristream.signal.grid import volume_of
from fmristream.storage import Store

T = TypeVar("T")

# Arrays that may hold the frames of a run, with their encodings.
FRAMES_ARRAYS = (
    ("residual", "difference"),
    ("bold", "direct"),
    ("bold", RAW_ENCODING),
    (CODES, QUANTIZED_ENCODING),
    (VOLUMES, VOLUME_ENCODING),
)


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks that lie one after the other in one object: its bytes [start, stop) hold consecutive frames.

    Attributes:
        key: the object.
        start: first byte.
        stop: the byte after the last one.
        first: the first frame.
        lengths: of each chunk in bytes.
    """

    key: str
    start: int
    stop: int
    first: int
    lengths: tuple[int, ...]


class ChunkName:
    """What to call a chunk, made only where an error says it."""

    __slots__ = ("_frame", "_reader")

    def __init__(self, reader: "RunReader", frame: int) -> None:
        self._reader = reader
        self._frame = frame

    def __str__(self) -> str:
        reader = self._reader
        key = reader.shard_key(self._frame // reader.frames_array.frames_per_shard)
        return f"{reader.store.name}/{key}, frame {self._frame} of {reader.run.name}"


class _kept(Generic[T]):
    """A property that is computed once; not functools', which in Python 3.11 holds one lock for all instances."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        # Found in the instance from the second time on, before this descriptor is asked.
        value = instance.__dict__[self._name] = self._compute(instance)
        return value


@dataclass(frozen=True, eq=False)
class RunReader:
    """Reads one run; holds its index block and, once asked for, its per-voxel vectors.

    Safe to use from several threads: every method reads and returns, the cached vectors are computed equal by whoever
    comes first.
    """

    store: Store
    run: Run
    arrays: Mapping[str, StoredArray]
    index_key: str
    bulk_digest: str  # that the generation names

    @_kept
    def frames_array(self) -> StoredArray:
        """The array that holds the frames: `residual`, `bold`, `codes`, or `0` where they are whole volumes."""
        for name, encoding in FRAMES_ARRAYS:
            array = self.arrays.get(name)
            if array is not None and array.encoding == encoding:
                return array
        known = ", ".join(f"{a.name} ({a.encoding})" for a in self.arrays.values())
        raise FormatError(
            f"{self._what}: no array in an encoding that this release reads ({known}); install a newer one"
        )

    @_kept
    def is_difference(self) -> bool:
        """Whether `read_chunks` gives residuals against a reference: for integers, in either layout."""
        encoding = self.frames_array.encoding
        return encoding == "difference" or (
            encoding in (VOLUME_ENCODING, RAW_ENCODING) and self.run.numpy_dtype.kind != "f"
        )

    @property
    def is_volume(self) -> bool:
        """Whether frames are stored as whole volumes, unchanged."""
        return self.frames_array.encoding == VOLUME_ENCODING

    @property
    def is_raw(self) -> bool:
        """Whether frames are stored as they are, uncompressed."""
        return self.frames_array.encoding == RAW_ENCODING

    @property
    def is_quantized(self) -> bool:
        """Whether frames are codes with a scale for each voxel."""
        return self.frames_array.encoding == QUANTIZED_ENCODING

    @property
    def padded_voxels(self) -> int:
        """Elements of a frame as it is decoded: the voxels and the padding behind them."""
        return codec.padded_length(self.run.voxels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(t,) length of every chunk in bytes, and of what belongs to it."""
        return self.index.lengths

    @_kept
    def index(self) -> ChunkIndex:
        """Lengths, and checks where lengths do not tell chunks apart."""
        array = self.frames_array
        place = array.index_offset, array.index_offset + array.index_bytes
        try:
            return self._read_index(array, *place)
        except CorruptDataError:
            if not _forget(self.store, self.index_key, *place):
                raise
            return self._read_index(array, *place)

    def _read_index(self, array: StoredArray, start: int, stop: int) -> ChunkIndex:
        return decode_index(
            self.store.read_range(self.index_key, start, stop),
            encoding=array.encoding,
            frames=self.run.frames,
            chunk_bytes=self.padded_voxels * self.run.numpy_dtype.itemsize + codec.CRC_BYTES,
            what=f"{self.store.name}/{self.index_key} ({self.run.name})",
        )

    @_kept
    def reference(self) -> NDArray[Any]:
        """(v,) in the stored dtype: what residuals are relative to."""
        if not self.is_difference:
            raise UsageError(
                f"{self._what}: floats are stored directly, there is no reference; read the frames as they are"
            )
        return self._vector("reference")

    @_kept
    def quantization(self) -> NDArray[Any]:
        """(2, v) in the stored dtype: step and offset of the codes."""
        return self._vector(QUANTIZATION)

    @_kept
    def moments(self) -> NDArray[Any]:
        """(2, v) float16 or float32: temporal mean minus reference (mean for floats), temporal SD; stored units."""
        return self._vector("moments")

    @_kept
    def exact_moments(self) -> NDArray[Any]:
        """(2, v) float32: the same two in full precision, for parity and pictures."""
        array = self.arrays["stats"]
        padded = np.empty((2, self.padded_voxels), dtype=array.dtype)
        codec.decode_into(self._whole(array, ""), padded, what=f"{self.store.name}/{array.object}")
        return padded[:, : self.run.voxels]

    @_kept
    def own_mask(self) -> NDArray[np.bool_] | None:
        """(v,) which of the stored voxels lie in the run's own brain mask; None where it has none."""
        return self._vector("mask").astype(np.bool_) if "mask" in self.arrays else None

    @_kept
    def ends(self) -> NDArray[np.int64]:
        """(t + 1,) total bytes of all chunks before each frame; differences within a shard are offsets in its object."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.index.lengths)])

    def shard_key(self, shard: int) -> str:
        """The object that holds a shard of the frames."""
        array = self.frames_array
        return f"{array.object}/c/{shard}" + "/0" * (len(array.shape) - 1)

    def plan(self, frames: range) -> list[Span]:
        """Where the chunks of frames lie, and nothing between them; one span a shard where frames are consecutive."""
        per_shard = self.frames_array.frames_per_shard
        if frames.step != 1:
            return [span for frame in frames for span in self.plan(range(frame, frame + 1))]
        spans, start = [], frames.start
        while start < frames.stop:
            shard = start // per_shard
            stop = min(frames.stop, (shard + 1) * per_shard)
            offsets = self.ends[start : stop + 1] - self.ends[shard * per_shard]
            lengths = self.index.lengths[start:stop]
            spans.append(Span(self.shard_key(shard), int(offsets[0]), int(offsets[-1]), start, tuple(lengths.tolist())))
            start = stop
        return spans

    def read_chunks(self, start: int, stop: int, out: NDArray[Any]) -> NDArray[Any]:
        """Decode frames [start, stop) into `out`, (t, padded_voxels), and return it: residuals or, for floats, values.

        One byte range per shard that the window touches. Every chunk's checksum is verified. What stands in the padding
        is nothing to go by.

        Raises:
            CorruptDataError: stored bytes have changed.
            ObjectMissingError: a shard is gone.
        """
        spare = self.spare()
        for row, (data, frame) in enumerate(self._chunks(start, stop)):
            self.decode_chunk(data, frame, out[row], spare)
        return out

    def spare(self) -> NDArray[Any]:
        """An array for `decode_chunk` to work in: a chunk as it was coded, where that is not what comes out."""
        if self.is_quantized:
            return np.empty(self.padded_voxels, dtype=self.codes_dtype)
        return np.empty(self.run.shape[::-1] if self.is_volume else 0, dtype=self.run.dtype)

    def decode_chunk(self, data: memoryview, frame: int, out: NDArray[Any], spare: NDArray[Any]) -> None:
        """Decode one chunk into `out`, (padded_voxels,), checked: a residual or, for floats, values.

        Args:
            data: the chunk as it is stored.
            frame: which frame it is.
            out: what stands in its padding is nothing to go by.
            spare: what `spare` gave; one for each thread.

        Raises:
            CorruptDataError: stored bytes have changed, or are another frame's.
        """
        what = self.require_chunk(data, frame)
        if self.is_quantized:
            self._decode_codes(data, out, spare, what)
            return
        if self.is_raw:
            codec.decode_raw_into(data, out, what=what)
        elif self.is_volume:
            self._decode_volume(data, out, spare, what)
        else:
            codec.decode_into(data, out, what=what)
            return
        if self.is_difference:
            with np.errstate(over="ignore"):
                out[: self.run.voxels] -= self.reference

    def require_chunk(self, data: memoryview, frame: int) -> ChunkName:
        """What to call a frame's chunk, if the index says that this is it.

        Raises:
            CorruptDataError: it is another one.
        """
        what, checks = ChunkName(self, frame), self.index.checks
        if checks is not None and int.from_bytes(data[-codec.CRC_BYTES :], "little") != checks[frame]:
            raise CorruptDataError(
                f"{what}: not the chunk that was committed here, whatever it is; restore the object from a copy "
                "or convert the run again"
            )
        return what

    def read_volumes(self, start: int, stop: int) -> NDArray[Any]:
        """Frames [start, stop) of a run that is stored as volumes: (t, z, y, x) as the source stored them, unscaled.

        Raises:
            UsageError: the run is stored in another layout.
            CorruptDataError: stored bytes have changed.
            ObjectMissingError: a shard is gone.
        """
        if not self.is_volume:
            raise UsageError(f"{self._what}: its voxels are stored, not volumes; read the frames and place them")
        out = np.empty((stop - start, *self.run.shape[::-1]), dtype=self.run.dtype)
        for row, (data, frame) in enumerate(self._chunks(start, stop)):
            codec.decode_into(data, out[row], what=self.require_chunk(data, frame))
        return out

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What the run's Zarr group says of itself in `fmristream`.

        Raises:
            CorruptDataError: it is not the object that was committed.
        """
        try:
            return dict(json.loads(self._whole(self.arrays[""], "zarr.json"))["attributes"]["fmristream"])
        except (ValueError, LookupError, TypeError) as error:  # its digest is right: somebody else wrote it so
            raise CorruptDataError(f"{self._what}: its group does not say what a run's group says") from error

    @property
    def sidecar(self) -> Mapping[str, Any]:
        """What is stored of the run's BIDS sidecar; empty where it had none.

        Raises:
            CorruptDataError: it is not what was committed.
        """
        return dict(self.attributes.get("sidecar", {}))

    @property
    def nifti_prefix(self) -> bytes | None:
        """What an exported NIfTI file begins with: header, extensions, padding; None in layouts that keep no header.

        Raises:
            CorruptDataError: it is not what was committed.
        """
        array = self.arrays.get("nifti")
        if array is None:
            return None
        if len(array.shape) != 1 or not 0 < array.shape[0] <= MAX_PREFIX_BYTES:
            raise CorruptDataError(
                f"{self._what}: the arrays table says shape {array.shape} of the NIfTI header, expected 1 to "
                f"{MAX_PREFIX_BYTES} bytes; restore the table from a copy"
            )
        padded = np.empty(codec.padded_length(array.shape[0]), dtype=np.uint8)
        codec.decode_into(self._whole(array, "c/0"), padded, what=f"{self.store.name}/{array.object}/c/0")
        return padded[: array.shape[0]].tobytes()

    def read_stored(self, start: int, stop: int) -> NDArray[Any]:
        """Frames [start, stop) as the source stored them, (t, v): reference added in the stored dtype, unscaled.

        Raises:
            UsageError: the frames are not all there.
        """
        if not 0 <= start < stop <= self.run.frames:
            raise UsageError(
                f"{self._what}: frames {start} to {stop} were asked for, the run has 0 to {self.run.frames}; "
                "give 0 <= start < stop <= frames"
            )
        out = np.empty((stop - start, self.padded_voxels), dtype=self.run.dtype)
        if self.is_volume or self.is_raw:
            spare = self.spare()
            for row, (data, frame) in enumerate(self._chunks(start, stop)):
                what = self.require_chunk(data, frame)
                if self.is_raw:
                    codec.decode_raw_into(data, out[row], what=what)
                else:
                    self._decode_volume(data, out[row], spare, what)
            return out[:, : self.run.voxels]
        values = self.read_chunks(start, stop, out)[:, : self.run.voxels]
        if self.is_difference:
            with np.errstate(over="ignore"):  # wrap-around is how residuals of a full-range source add up
                values += self.reference
        return values

    @property
    def _what(self) -> str:
        return f"{self.store.name}: run {self.run.name}"

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[memoryview, int]]:
        """The encoded chunks of frames [start, stop), and which frame each is."""
        for span in self.plan(range(start, stop)):
            data = memoryview(self.store.read_range(span.key, span.start, span.stop))
            at = 0
            for number, length in enumerate(span.lengths):
                yield data[at : at + length], span.first + number
                at += length

    @property
    def codes_dtype(self) -> "np.dtype[Any]":
        """What codes are stored as.

        Raises:
            FormatError: this release does not know such codes.
        """
        dtype = np.dtype(self.frames_array.dtype)
        if dtype.kind != "i" or self.run.numpy_dtype.kind != "f":
            raise FormatError(
                f"{self._what}: codes of {dtype} for values of {self.run.numpy_dtype}; install a newer release"
            )
        return dtype

    def read_codes(
        self, data: memoryview, codes: NDArray[Any], what: object
    ) -> tuple[NDArray[np.uint32], NDArray[Any]]:
        """Write the codes of a chunk, (padded_voxels,); returns the voxels that they cannot say, and their values."""
        dtype = self.run.numpy_dtype
        chunk, positions, values = codec.split_escapes(data, dtype=dtype, voxels=self.run.voxels, what=what)
        codec.decode_into(chunk, codes, what=what)
        return positions, values

    def _decode_codes(self, data: memoryview, out: NDArray[Any], codes: NDArray[Any], what: object) -> None:
        # Imported here: whoever reads other runs needs no compiler for it.
        from fmristream.signal.quantize import dequantize

        voxels, escape = self.run.voxels, np.iinfo(codes.dtype).min
        positions, values = self.read_codes(data, codes, what)
        if int(np.count_nonzero(codes[:voxels] == escape)) != len(positions) or (codes[positions] != escape).any():
            raise misfit(what)
        dequantize(codes[:voxels], self.quantization, out[:voxels])
        out[positions] = values

    def _decode_volume(self, data: memoryview, out: NDArray[Any], volume: NDArray[Any], what: object) -> None:
        """A volume with its values in the order of the space's voxels."""
        if self.run.voxels != int(np.prod(self.run.shape)):
            raise CorruptDataError(
                f"{self._what}: stored as whole volumes of {self.run.shape}, but its row says {self.run.voxels} voxels; "
                "restore the tables from a copy"
            )
        codec.decode_into(data, volume, what=what)
        volume_of(out[: self.run.voxels], self.run.shape)[...] = volume

    def _vector(self, name: str) -> NDArray[Any]:
        array = self.arrays.get(name)
        if array is None:
            raise CorruptDataError(f"{self._what}: the arrays table names no {name!r}; restore the table from a copy")
        shape = (*array.shape[:-1], self.padded_voxels)
        padded = np.empty(shape, dtype=array.dtype)
        chunk = "/".join(["c", *("0" for _ in shape)])
        codec.decode_into(self._whole(array, chunk), padded, what=f"{self.store.name}/{array.object}/{chunk}")
        return np.ascontiguousarray(padded[..., : self.run.voxels])

    def _whole(self, array: StoredArray, name: str) -> bytes:
        """An object that is read whole, checked to be the one that was committed: another run's would decode as well."""
        key = f"{array.object}/{name}" if name else array.object
        for _ in range(2):
            data = self.store.read(key)
            found = bulk_hexdigest(data, self.bulk_digest)
            if any(file.name == name and found.startswith(file.digest) for file in array.files):
                return data
            if not _forget(self.store, key):
                break
        raise CorruptDataError(
            f"{self.store.name}/{key}: not the object that was committed for {self.run.name}; restore it from a copy"
        )


def _forget(store: Store, key: str, *place: int) -> bool:
    """Whether a store keeps copies, and has dropped this one: what came damaged was kept damaged."""
    forget = getattr(store, "forget", None)
    if forget is None:
        return False
    forget(key, *place)
    return True


def misfit(what: object) -> CorruptDataError:
    """Codes and escapes that contradict each other."""
    return CorruptDataError(f"{what}: codes and the values beside them do not fit; convert the run again")
