"""Chunks of a run, decoded while they are in the second-level cache, and the rows of a batch that they become."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.shards import codec
from fmristream.shards.run_reader import RunReader
from fmristream.signal import read_kernels
from fmristream.signal.prepared import Prepared

# Of decoded frames that are worked on at a time: with their scale and what becomes of them they fill a second-level cache.
GROUP_BYTES = 3 * 2**19
_LONGEST_GROUP = 8

MAX_HALF = float(np.finfo(np.float16).max)

_PACKED = np.empty((0, 3), dtype=np.uint32)


class Scratch:
    """Buffers of one thread, reused from window to window: fresh memory costs more than decoding does."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, np.dtype[Any]], NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array whose contents are whatever was there."""
        key = name, np.dtype(dtype)
        size = math.prod(shape)
        held = self._buffers.get(key)
        if held is None or held.size < size:
            held = self._buffers[key] = np.empty(size, dtype=dtype)
        return held[:size].reshape(shape)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a clip goes.

    Attributes:
        values: (c, t, v) packed or (c, t, x*y*z) placed; float32, float16, or int16 for residuals as they are stored.
        stretches: (n, 3), see `signal.grid.stretches_of`; None where packed.
    """

    values: NDArray[Any]
    stretches: NDArray[np.uint32] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive chunks, all of them in memory or all in one file.

    Attributes:
        lengths: of each chunk in bytes.
        first: frame of the first one.
        row: of the target that the first one is for.
        data: memory that holds them, from byte `start` on; None where the file does.
        start: of the first chunk, in `data` or in the file.
        descriptor: of the file; negative where they are in memory.
    """

    lengths: tuple[int, ...]
    first: int
    row: int
    data: memoryview | None
    start: int
    descriptor: int = -1


class Chunks:
    """Chunks of a run, decoded."""

    def __init__(self, reader: RunReader, scratch: Scratch, known: NDArray[np.bool_] | None) -> None:
        self.reader = reader
        self.scratch = scratch
        self.dtype = reader.run.numpy_dtype
        self.voxels = reader.run.voxels
        self.known = known
        shape = reader.run.shape[::-1] if reader.is_volume else (reader.padded_voxels,)
        self.spare = scratch.array("spare", shape, reader.codes_dtype if reader.is_quantized else self.dtype)

    def checks(self, piece: Piece) -> NDArray[np.int64]:
        """The last four bytes of chunks, as the index has them."""
        checks = self.reader.index.checks
        assert checks is not None, "encodings whose lengths do not tell chunks apart have them"
        return checks[piece.first : piece.first + len(piece.lengths)]

    def group(self) -> int:
        """How many frames fit into the cache."""
        return max(1, min(_LONGEST_GROUP, GROUP_BYTES // (self.reader.padded_voxels * self.dtype.itemsize)))

    def decode(self, data: memoryview, frame: int, out: NDArray[Any]) -> None:
        """One chunk into (padded_voxels,): a residual or, for floats, values."""
        if self.known is None:
            self.reader.decode_chunk(data, frame, out, self.spare)
            return
        np.copyto(out[: self.voxels], self.raw(data, frame))
        if self.reader.is_difference:
            with np.errstate(over="ignore"):
                out[: self.voxels] -= self.reader.reference

    def raw(self, data: memoryview, frame: int) -> NDArray[Any]:
        """(v,) values of an uncompressed chunk where they lie; its checksum is computed where that was not done yet."""
        what = self.reader.require_chunk(data, frame)
        is_known = self.known is not None and bool(self.known[frame])
        values = codec.raw_view(data, self.dtype, self.reader.padded_voxels, what=what, is_known=is_known)
        if self.known is not None and not is_known:
            self.known[frame] = True
        return values[: self.voxels]


class Rows:
    """Rows of the target: handed out to be written, and placed where they are to be."""

    def __init__(self, prepared: Prepared, target: Target, scratch: Scratch) -> None:
        self.is_half = target.values.dtype == np.float16
        # numba has no float16: its bits are written.
        self._values = target.values.view(np.uint16) if self.is_half else target.values
        self._stretches = target.stretches
        self._scratch = scratch
        self._fill = prepared.fill.astype(target.values.dtype).view(self._values.dtype)
        self.channels = len(self._values)

    def whole(self, row: int, count: int, voxels: int, group: int) -> tuple[Any, ...]:
        """What kernels of whole spans want: rows to work in, rows of the target, stretches, the background."""
        spare = self._scratch.array("row", (group, voxels), self._values.dtype)
        stretches = _PACKED if self._stretches is None else self._stretches
        return spare, self._values[0, row : row + count], stretches, self._fill[0]

    def lend(self, row: int, count: int, voxels: int) -> NDArray[Any]:
        """(c, count, v) to write to: float32, or uint16 for float16."""
        if self._stretches is None:
            return self._values[:, row : row + count]
        return self._scratch.array("row", (self.channels, count, voxels), self._values.dtype)

    def done(self, row: int, written: NDArray[Any]) -> None:
        """What `lend` gave has been written."""
        if self._stretches is None:
            return
        for channel in range(self.channels):
            for number in range(written.shape[1]):
                read_kernels.place(
                    written[channel, number], self._stretches, self._fill[channel], self._values[channel, row + number]
                )

    def put(self, row: int, values: NDArray[np.float32]) -> None:
        """Write (c, count, v) float32.

        Raises:
            UsageError: a value does not fit float16.
        """
        if self.is_half and values.size and (largest := max(-float(values.min()), float(values.max()))) > MAX_HALF:
            raise UsageError(
                f"a value of {largest:.3g} does not fit float16, which ends at {MAX_HALF:,.0f}; use dtype='float32', or a "
                "recipe that normalises"
            )
        written = self.lend(row, values.shape[1], values.shape[2])
        for channel in range(self.channels):
            for number in range(values.shape[1]):
                if self.is_half:
                    read_kernels.to_half(values[channel, number], written[channel, number])
                else:
                    written[channel, number] = values[channel, number]
        self.done(row, written)
