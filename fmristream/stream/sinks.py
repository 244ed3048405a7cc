"""Who takes the chunks of a clip under a recipe: by kernels where it is a scale for each voxel, else through Python."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.clip import Clip
from fmristream.shards import codec
from fmristream.shards.run_reader import RunReader, misfit
from fmristream.signal import chunk_kernels, read_kernels
from fmristream.signal.prepared import Prepared
from fmristream.stream.rows import Chunks, Piece, Rows, Scratch, Target


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
    chunks = Chunks(reader, scratch, known)
    if target.values.dtype == np.int16:
        return _Residuals(chunks, prepared, target)
    rows = Rows(prepared, target, scratch)
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


class _OneByOne:
    """Takes chunks from Python only."""

    rows = 1

    def take_all(self, piece: Piece) -> int:
        return 0

    def finish(self) -> None:
        pass


class _Voxelwise:
    """A scale for each voxel, applied by kernels that round on the way: nothing is written twice."""

    def __init__(self, chunks: Chunks, rows: Rows, delta: NDArray[np.float32], inverse: NDArray[np.float32]) -> None:
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

    def __init__(self, chunks: Chunks, rows: Rows, prepared: Prepared, scratch: Scratch) -> None:
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

    def __init__(self, chunks: Chunks, rows: Rows, prepared: Prepared, clip: Clip, scratch: Scratch) -> None:
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

    def __init__(self, chunks: Chunks, prepared: Prepared, target: Target) -> None:
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
