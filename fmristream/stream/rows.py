"""Decoded frames into rows of a batch, while they are in the second-level cache: normalised, rounded, placed."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.clip import Clip
from fmristream.shards import codec
from fmristream.shards.run_reader import RunReader, misfit
from fmristream.signal import chunk_kernels, read_kernels
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


class Sink(Protocol):
    """Takes the chunks of one clip, in whatever order."""

    def take_all(self, piece: Piece) -> int:
        """Take chunks without Python between them; returns how many were taken: none where it cannot, or where they differ.

        What was not taken is for `take`, which says what is wrong with it.
        """
        ...

    @property
    def rows(self) -> int:
        """How many consecutive chunks it takes at a time."""
        ...

    def take(self, data: memoryview, lengths: tuple[int, ...], *, first: int, row: int) -> None:
        """Chunks in memory that lie one after the other: of frames from `first` on, for rows of the target from `row` on."""
        ...

    def finish(self) -> None:
        """Called once, after the last chunk."""
        ...


def sink_of(
    reader: RunReader, prepared: Prepared, clip: Clip, target: Target, scratch: Scratch, known: NDArray[np.bool_] | None
) -> Sink:
    """Who takes the chunks of a clip under a recipe.

    Args:
        reader: the run.
        prepared: the recipe made ready for it.
        clip: which frames.
        target: where they go.
        scratch: of this thread.
        known: (t,) which chunks of an uncompressed run have had their checksum found right, read and written; None to look
            at all.

    Raises:
        UsageError: residuals are asked for and the recipe is not affine.
    """
    chunks = _Chunks(reader, scratch, known)
    if target.values.dtype == np.int16:
        return _Residuals(chunks, prepared, target)
    rows = _Rows(prepared, target, scratch)
    scale = voxelwise_scale(reader, prepared)
    if scale is not None:
        return _Voxelwise(chunks, rows, *scale)
    if prepared.is_framewise and prepared.needs_frames:
        return _Framewise(chunks, rows, prepared, scratch)
    return _Whole(chunks, rows, prepared, clip, scratch)


def voxelwise_scale(
    reader: RunReader, prepared: Prepared
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:  # fmt: skip
    """(delta, inverse SD), each (v,), where the recipe is (residual or float - delta) x inverse and kernels know how.

    A recipe says so by an attribute `voxelwise`; without it, it is called frame by frame.
    """
    scale: tuple[Any, Any] | None = getattr(prepared, "voxelwise", None)
    dtype = reader.run.numpy_dtype
    is_small = dtype == np.dtype("<f4") or (dtype.kind in "iu" and dtype.itemsize <= 2)
    if scale is None or not is_small or scale[0].dtype != np.float32:
        return None
    return scale


class _Chunks:
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


class _OneByOne:
    """Takes chunks from Python only."""

    rows = 1

    def take_all(self, piece: Piece) -> int:
        return 0

    def finish(self) -> None:
        pass


class _Rows:
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


class _Voxelwise:
    """A scale for each voxel, applied by kernels that round on the way: nothing is written twice."""

    def __init__(self, chunks: _Chunks, rows: _Rows, delta: NDArray[np.float32], inverse: NDArray[np.float32]) -> None:
        self._chunks = chunks
        self._rows = rows
        self._delta = delta
        self._inverse = inverse
        reader = chunks.reader
        self.rows = 1 if reader.is_raw or reader.is_quantized else chunks.group()

    def take_all(self, piece: Piece) -> int:
        reader, calls = self._chunks.reader, codec.entry_points()
        if calls is None or reader.is_volume or not read_kernels.HAS_HALF:
            return 0
        group = min(self._chunks.group(), len(piece.lengths))
        into = self._rows.whole(piece.row, len(piece.lengths), self._chunks.voxels, group)
        if piece.data is not None:
            data = np.frombuffer(piece.data, dtype=np.uint8)
        elif reader.is_raw:
            return 0
        else:
            room = max(sum(piece.lengths[at : at + group]) for at in range(0, len(piece.lengths), group))
            data = self._chunks.scratch.array("bytes", (room,), np.uint8)
        if reader.is_raw:
            return self._fill_from_raw(calls, piece, data, group, into)
        start, lengths = piece.start, np.array(piece.lengths, dtype=np.int64)
        if reader.is_quantized:
            return self._fill_from_codes(calls, piece, data, lengths, group, into)
        stored = self._chunks.scratch.array("stored", (group, reader.padded_voxels), self._chunks.dtype)
        return int(
            chunk_kernels.fill_from_residuals(
                calls, piece.descriptor, start, data, lengths, _signed(stored), self._delta, self._inverse, *into
            )
        )

    def _fill_from_codes(
        self, calls: Any, piece: Piece, data: Any, lengths: Any, group: int, into: tuple[Any, ...]
    ) -> int:
        reader, checks = self._chunks.reader, self._chunks.checks(piece)
        codes = self._chunks.scratch.array("stored", (group, reader.padded_voxels), reader.codes_dtype)
        step, offset = reader.quantization
        return int(chunk_kernels.fill_from_codes(
            calls, piece.descriptor, piece.start, data, lengths, checks, codes, step, offset, self._delta,
            self._inverse, int(np.iinfo(codes.dtype).min), *into,
        ))  # fmt: skip

    def _fill_from_raw(self, calls: Any, piece: Piece, data: Any, group: int, into: tuple[Any, ...]) -> int:
        chunks, reader = self._chunks, self._chunks.reader
        length = reader.padded_voxels * chunks.dtype.itemsize + codec.CRC_BYTES
        if any(found != length for found in piece.lengths) or piece.start % chunks.dtype.itemsize:
            return 0
        reference = reader.reference if reader.is_difference else np.empty(0, dtype=chunks.dtype)
        frames = slice(piece.first, piece.first + len(piece.lengths))
        known = np.zeros(len(piece.lengths), np.bool_) if chunks.known is None else chunks.known[frames]
        return int(chunk_kernels.fill_from_raw(
            calls, piece.start, data, length, chunks.checks(piece), known, np.empty((group, 0), chunks.dtype),
            reference, self._delta, self._inverse, *into,
        ))  # fmt: skip

    def take(self, data: memoryview, lengths: tuple[int, ...], *, first: int, row: int) -> None:
        reader = self._chunks.reader
        out = self._rows.lend(row, len(lengths), self._chunks.voxels)
        if reader.is_quantized:
            self._take_codes(data, first, out[0, 0])
        elif reader.is_raw and reader.is_difference:
            values = self._chunks.raw(data, first)
            read_kernels.normalize_integers(values, reader.reference, self._delta, self._inverse, out[0, 0])
        elif reader.is_raw:
            read_kernels.normalize_voxels(self._chunks.raw(data, first)[None], self._delta, self._inverse, out[0])
        else:
            self._take_group(data, lengths, first, out[0])
        self._rows.done(row, out)

    def finish(self) -> None:
        pass

    def _take_group(self, data: memoryview, lengths: tuple[int, ...], first: int, out: NDArray[Any]) -> None:
        chunks = self._chunks
        stored = chunks.scratch.array("stored", (len(lengths), chunks.reader.padded_voxels), chunks.dtype)
        at = 0
        for number, length in enumerate(lengths):
            chunks.decode(data[at : at + length], first + number, stored[number])
            at += length
        read_kernels.normalize_voxels(_signed(stored), self._delta, self._inverse, out)

    def _take_codes(self, data: memoryview, frame: int, out: NDArray[Any]) -> None:
        reader, codes = self._chunks.reader, self._chunks.spare
        what = reader.require_chunk(data, frame)
        positions, values = reader.read_codes(data, codes, what)
        step, offset = reader.quantization
        escape = int(np.iinfo(codes.dtype).min)
        count = read_kernels.normalize_codes(codes, step, offset, self._delta, self._inverse, escape, out)
        if count != len(positions):
            raise misfit(what)
        if count and not read_kernels.normalize_escapes(
            codes, positions, values, self._delta, self._inverse, escape, out
        ):
            raise misfit(what)


def _signed(stored: NDArray[Any]) -> NDArray[Any]:
    """Residuals of unsigned sources wrap below zero; seen as signed they are the differences."""
    return stored.view(f"i{stored.itemsize}") if stored.dtype.kind == "u" else stored


class _Framewise(_OneByOne):
    """Any recipe that takes frames one by one."""

    def __init__(self, chunks: _Chunks, rows: _Rows, prepared: Prepared, scratch: Scratch) -> None:
        self._chunks = chunks
        self._rows = rows
        self._prepared = prepared
        self._stored = scratch.array("stored", (1, chunks.reader.padded_voxels), chunks.dtype)
        self._width = prepared.width
        self._wide = scratch.array("wide", (prepared.channels, 1, self._width), np.float32) if rows.is_half else None

    def take(self, data: memoryview, lengths: tuple[int, ...], *, first: int, row: int) -> None:
        self._chunks.decode(data, first, self._stored[0])
        stored = self._stored[:, : self._chunks.voxels]
        if self._wide is not None:
            self._prepared(stored, range(first, first + 1), self._wide)
            self._rows.put(row, self._wide)
            return
        out = self._rows.lend(row, 1, self._width)
        self._prepared(stored, range(first, first + 1), out)
        self._rows.done(row, out)


class _Whole(_OneByOne):
    """Any recipe that wants the whole clip."""

    def __init__(self, chunks: _Chunks, rows: _Rows, prepared: Prepared, clip: Clip, scratch: Scratch) -> None:
        self._chunks = chunks
        self._rows = rows
        self._prepared = prepared
        self._clip = clip
        # Where what is stored beside the frames is all it takes, nobody looks at them.
        elements = chunks.reader.padded_voxels if prepared.needs_frames else 0
        self._stored = scratch.array("clip", (clip.length, elements), chunks.dtype)
        self._wide = scratch.array("wide", (prepared.channels, clip.length, prepared.width), np.float32)

    def take(self, data: memoryview, lengths: tuple[int, ...], *, first: int, row: int) -> None:
        self._chunks.decode(data, first, self._stored[row])

    def finish(self) -> None:
        self._prepared(self._stored[:, : self._chunks.voxels], self._clip.frames, self._wide)
        self._rows.put(0, self._wide)


class _Residuals(_OneByOne):
    """Residuals as they are stored, for a device to scale."""

    def __init__(self, chunks: _Chunks, prepared: Prepared, target: Target) -> None:
        dtype, name = chunks.dtype, chunks.reader.run.name
        if getattr(prepared, "affine", None) is None or dtype.kind not in "iu" or dtype.itemsize > 2:
            raise UsageError(
                f"run {name}: dtype='int16' hands out residuals, which takes 8- or 16-bit integers ({dtype} is stored) and a "
                "recipe that is one scale and offset for each voxel; use dtype='float16' or another recipe"
            )
        if target.stretches is not None:
            raise UsageError(f"run {name}: residuals are not placed; use output='packed' or dtype='float16'")
        self._chunks = chunks
        self._target = target
        self._stored = chunks.scratch.array("stored", (1, chunks.reader.padded_voxels), dtype)

    def take(self, data: memoryview, lengths: tuple[int, ...], *, first: int, row: int) -> None:
        stored = self._stored[0]
        self._chunks.decode(data, first, stored)
        signed = stored.view(f"i{stored.itemsize}")  # true differences: none wraps where the recipe is affine
        self._target.values[0, row] = signed[: self._chunks.voxels]
