"""The arrays of one run, read by byte range and checked: index block, frames, reference, moments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run, StoredArray
from fmristream.errors import CorruptDataError, FormatError, UsageError
from fmristream.shards import codec
from fmristream.shards.digest import sha256
from fmristream.shards.index import decode_block, ranges_of
from fmristream.storage import Store

T = TypeVar("T")


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

    @property
    def frames_array(self) -> StoredArray:
        """The array that holds the frames: `residual` or `bold`."""
        for name, encoding in (("residual", "difference"), ("bold", "direct")):
            array = self.arrays.get(name)
            if array is not None and array.encoding == encoding:
                return array
        known = ", ".join(f"{a.name} ({a.encoding})" for a in self.arrays.values())
        raise FormatError(
            f"{self._what}: no array in an encoding that this release reads ({known}); install a newer one"
        )

    @property
    def is_difference(self) -> bool:
        """Whether frames are stored as residuals against a reference."""
        return self.frames_array.encoding == "difference"

    @property
    def padded_voxels(self) -> int:
        """Elements of a frame as it is decoded: the voxels and the padding behind them."""
        return codec.padded_length(self.run.voxels)

    @_kept
    def lengths(self) -> NDArray[np.int64]:
        """(t,) length of every chunk in bytes."""
        array = self.frames_array
        stop = array.index_offset + array.index_bytes
        block = self.store.read_range(self.index_key, array.index_offset, stop)
        return decode_block(block, frames=self.run.frames, what=f"{self.store.name}/{self.index_key} ({self.run.name})")

    @_kept
    def reference(self) -> NDArray[Any]:
        """(v,) in the stored dtype: what residuals are relative to."""
        if not self.is_difference:
            raise UsageError(
                f"{self._what}: floats are stored directly, there is no reference; read the frames as they are"
            )
        return self._vector("reference")

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

    def read_chunks(self, start: int, stop: int, out: NDArray[Any]) -> NDArray[Any]:
        """Decode frames [start, stop) as stored (residuals or values) into `out`, (t, padded_voxels), and return it.

        One byte range per shard that the window touches. Every chunk's checksum is verified.

        Raises:
            CorruptDataError: stored bytes have changed.
            ObjectMissingError: a shard is gone.
        """
        array = self.frames_array
        row = 0
        for part in ranges_of(self.lengths, start=start, stop=stop, frames_per_shard=array.frames_per_shard):
            key = f"{array.object}/c/{part.shard}/0"
            data = memoryview(self.store.read_range(key, part.start, part.stop))
            at = 0
            for length in part.lengths:
                what = f"{self.store.name}/{key}, frame {start + row} of {self.run.name}"
                codec.decode_into(data[at : at + length], out[row], what=what)
                at += length
                row += 1
        return out

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
        values = self.read_chunks(start, stop, out)[:, : self.run.voxels]
        if self.is_difference:
            with np.errstate(over="ignore"):  # wrap-around is how residuals of a full-range source add up
                values += self.reference
        return values

    @property
    def _what(self) -> str:
        return f"{self.store.name}: run {self.run.name}"

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
        data = self.store.read(key)
        found = sha256(data)
        if not any(file.name == name and found.startswith(file.sha256) for file in array.files):
            raise CorruptDataError(
                f"{self.store.name}/{key}: not the object that was committed for {self.run.name}; restore it from a copy"
            )
        return data
