"""Whole spans of chunks in one call that holds no lock of Python: read, checked, decoded, normalised, placed.

What does the reading, the checksum and the decoding are the functions that Python's own path calls by way of its modules
(`shards.codec.entry_points`), called here by address: every return to Python between two of them costs a wait as soon as
two threads read. Whatever is not in order ends the call; Python's path then says what it was.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from fmristream.signal.read_kernels import BLOCK, normalize_voxels, normalized, place

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")

CRC_BYTES = 4
_HEADER_BYTES = 16

# What `calls` holds, in this order.
_PREAD, _CRC, _DECOMPRESS = 0, 1, 2


def _as_argument(builder: Any, word: Any, kind: Any) -> Any:
    if isinstance(kind, ir.PointerType):
        return builder.inttoptr(word, kind)
    return word if kind.width == 64 else builder.trunc(word, kind)


def _caller(result: Any, arguments: tuple[Any, ...]) -> Any:
    """An intrinsic that calls a C function: (address, *integers) -> integer; pointers are integers."""

    def typed(typing_context: Any, address: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            words = [builder.extract_value(given[1], place) for place in range(len(arguments))]
            passed = [_as_argument(builder, word, kind) for word, kind in zip(words, arguments, strict=True)]
            function = builder.inttoptr(given[0], ir.FunctionType(result, arguments).as_pointer())
            value = builder.call(function, passed)
            return value if result.width == 64 else builder.sext(value, ir.IntType(64))

        return types.int64(types.int64, numba.types.UniTuple(types.int64, len(arguments))), generate

    return intrinsic(typed)


_BYTE = ir.IntType(8).as_pointer()
_LONG, _INT = ir.IntType(64), ir.IntType(32)
_call_pread = _caller(_LONG, (_INT, _BYTE, _LONG, _LONG))
_call_crc = _caller(_INT, (_BYTE, _LONG))
_call_decompress = _caller(_INT, (_BYTE, _BYTE, _LONG, _INT))


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_jit
def _address(array: Any) -> Any:
    return np.int64(array.ctypes.data)


@_jit
def _word(data: Any, at: Any) -> Any:
    """Four little-endian bytes, wherever they lie."""
    return np.uint32(
        np.uint32(data[at])
        | (np.uint32(data[at + 1]) << np.uint32(8))
        | (np.uint32(data[at + 2]) << np.uint32(16))
        | (np.uint32(data[at + 3]) << np.uint32(24))
    )


@_jit
def _has_checksum(calls: Any, data: Any, start: Any, stop: Any) -> Any:
    """Whether the last four bytes of [start, stop) are the crc32c of those before them."""
    found = _call_crc(calls[_CRC], (_address(data) + start, stop - CRC_BYTES - start))
    return np.uint32(found & 0xFFFFFFFF) == _word(data, stop - CRC_BYTES)


@_jit
def _decode(calls: Any, data: Any, start: Any, stop: Any, out: Any) -> Any:
    """One blosc chunk with its checksum, bytes [start, stop), into an array of its exact size; False where it is not that."""
    length = stop - CRC_BYTES - start
    if length < _HEADER_BYTES or not _has_checksum(calls, data, start, stop):
        return False
    size = np.int64(out.size) * np.int64(out.itemsize)
    if np.int64(_word(data, start + 4)) != size or np.int64(_word(data, start + 12)) != length:
        return False
    # numcodecs makes the same call: one thread, nothing shared with others.
    return _call_decompress(calls[_DECOMPRESS], (_address(data) + start, _address(out), size, np.int64(1))) == size


@_jit
def _fetched(calls: Any, descriptor: Any, offset: Any, data: Any, length: Any) -> Any:
    """Fill the beginning of `data` with bytes of a file; False where that takes another call or is an error."""
    return _call_pread(calls[_PREAD], (np.int64(descriptor), _address(data), length, offset)) == length


@_jit
def fill_from_residuals(
    calls: Any, descriptor: int, start: int, data: Any, lengths: Any, stored: Any,
    delta: Any, inverse: Any, rows: Any, out: Any, stretches: Any, fill: Any,
) -> Any:  # fmt: skip
    """Compressed residuals or floats, `read_kernels.normalize_voxels` of them; returns how many rows are done.

    Args:
        calls: (3,) int64 addresses of pread, crc32c_value, blosc_decompress_ctx.
        descriptor: of the file that holds the chunks; negative where `data` does.
        start: where the first chunk begins, in the file or in `data`.
        data: uint8: the chunks, or memory for as many as `stored` has rows.
        lengths: (t,) int64 of the chunks.
        stored: (g, padded) signed or float, worked on g at a time.
        delta: (v,) float32.
        inverse: (v,) float32.
        rows: (g, v) of out's dtype, used where `stretches` are given.
        out: (t, v), or (t, x*y*z) where `stretches` are given; float32, or uint16 for float16.
        stretches: (n, 3) uint32, see `read_kernels.place`; none: packed.
        fill: one element of out's dtype.
    """
    is_placed = stretches.shape[0] > 0
    offset = np.int64(start)
    for first in range(0, lengths.size, stored.shape[0]):
        count = min(stored.shape[0], lengths.size - first)
        total = np.int64(0)
        for k in range(count):
            total += lengths[first + k]
        at = offset
        if descriptor >= 0:
            if not _fetched(calls, descriptor, offset, data, total):
                return first
            at = np.int64(0)
        for k in range(count):
            if not _decode(calls, data, at, at + lengths[first + k], stored[k]):
                return first
            at += lengths[first + k]
        if is_placed:
            normalize_voxels(stored[:count], delta, inverse, rows[:count])
            for k in range(count):
                place(rows[k], stretches, fill, out[first + k])
        else:
            normalize_voxels(stored[:count], delta, inverse, out[first : first + count])
        offset += total
    return lengths.size


@_jit
def _normalize_code_group(
    codes: Any, step: Any, offset: Any, delta: Any, inverse: Any, escape: int, out: Any, escapes: Any
) -> None:
    """(g, v) codes by way of the values that `kernels.dequantize` gives; counts the escapes of each frame."""
    for k in range(out.shape[0]):
        escapes[k] = 0
    for first in range(0, delta.size, BLOCK):
        last = min(first + BLOCK, delta.size)
        steps, offsets, deltas, inverses = step[first:last], offset[first:last], delta[first:last], inverse[first:last]
        for k in range(out.shape[0]):
            here, into = codes[k, first:last], out[k, first:last]
            number = np.int32(0)
            for j in range(deltas.size):
                number = np.int32(number + np.int32(np.int32(here[j]) == np.int32(escape)))
            escapes[k] += number
            for j in range(deltas.size):
                value = np.float32(np.float64(here[j]) * np.float64(steps[j]) + np.float64(offsets[j]))
                into[j] = normalized(into, value, deltas[j], inverses[j])


@_jit
def _put_escapes(data: Any, begin: Any, count: Any, codes: Any, delta: Any, inverse: Any, escape: int, row: Any) -> Any:
    """Normalised values where codes are escapes: `count` positions, then as many float32, from byte `begin` on."""
    for n in range(count):
        voxel = np.int64(_word(data, begin + 4 * n))
        if voxel >= delta.size or codes[voxel] != escape:
            return False
        row[voxel] = normalized(row, _as_float(_word(data, begin + 4 * (count + n))), delta[voxel], inverse[voxel])
    return True


@_jit
def fill_from_codes(
    calls: Any, descriptor: int, start: int, data: Any, lengths: Any, checks: Any, stored: Any,
    step: Any, offset: Any, delta: Any, inverse: Any, escape: int,
    rows: Any, out: Any, stretches: Any, fill: Any,
) -> Any:  # fmt: skip
    """The same of codes of float32 values, with what stands behind each chunk: values that codes cannot say.

    Args:
        calls: see `fill_from_residuals`; so are those not named here.
        descriptor: see calls.
        start: see calls.
        data: see calls.
        lengths: see calls.
        checks: (t,) int64, the last four bytes of each chunk as the index has them.
        stored: (g, padded) int8 or int16.
        step: (v,) float32.
        offset: (v,) float32.
        delta: see calls.
        inverse: see calls.
        escape: the code whose value stands elsewhere.
        rows: see calls.
        out: see calls.
        stretches: see calls.
        fill: see calls.
    """
    is_placed = stretches.shape[0] > 0
    group = stored.shape[0]
    escapes, begins, counts = np.empty(group, np.int64), np.empty(group, np.int64), np.empty(group, np.int64)
    place_in_file = np.int64(start)
    for first in range(0, lengths.size, group):
        count = min(group, lengths.size - first)
        total = np.int64(0)
        for k in range(count):
            total += lengths[first + k]
        at = place_in_file
        if descriptor >= 0:
            if not _fetched(calls, descriptor, place_in_file, data, total):
                return first
            at = np.int64(0)
        for k in range(count):
            end = at + lengths[first + k]
            tail = end - 2 * CRC_BYTES
            counts[k] = np.int64(_word(data, tail)) if tail > at else np.int64(-1)
            begins[k] = tail - 8 * counts[k]
            # The tail's own checksum goes over the chunk's checksum, positions, values and their number.
            if (
                counts[k] < 0
                or begins[k] <= at + CRC_BYTES
                or np.int64(_word(data, end - CRC_BYTES)) != checks[first + k]
                or not _has_checksum(calls, data, begins[k] - CRC_BYTES, end)
                or not _decode(calls, data, at, begins[k], stored[k])
            ):
                return first
            at = end
        into = rows[:count] if is_placed else out[first : first + count]
        _normalize_code_group(stored[:count], step, offset, delta, inverse, escape, into, escapes)
        for k in range(count):
            if escapes[k] != counts[k] or not _put_escapes(
                data, begins[k], counts[k], stored[k], delta, inverse, escape, into[k]
            ):
                return first
            if is_placed:
                place(into[k], stretches, fill, out[first + k])
        place_in_file += total
    return lengths.size


@_jit
def fill_from_raw(
    calls: Any, start: int, data: Any, length: int, checks: Any, known: Any, like: Any, reference: Any,
    delta: Any, inverse: Any, rows: Any, out: Any, stretches: Any, fill: Any,
) -> Any:  # fmt: skip
    """The same of chunks that were not compressed, where they lie.

    Args:
        calls: see `fill_from_residuals`; so are those not named here.
        start: where the first chunk begins in `data`.
        data: uint8.
        length: of each chunk, its checksum included.
        checks: (t,) int64, the last four bytes of each chunk as the index has them.
        known: (t,) bool, read and written: whose checksum was found right before.
        like: (g, 0) of the dtype of values: g are worked on at a time.
        reference: (v,) of the dtype of values, subtracted from integers; empty for floats.
        delta: see calls.
        inverse: see calls.
        rows: see calls.
        out: see calls.
        stretches: see calls.
        fill: see calls.
    """
    is_placed = stretches.shape[0] > 0
    group = like.shape[0]
    for first in range(0, checks.size, group):
        count = min(group, checks.size - first)
        for k in range(count):
            at = np.int64(start) + (first + k) * length
            if np.int64(_word(data, at + length - CRC_BYTES)) != checks[first + k]:
                return first
            if not known[first + k] and not _has_checksum(calls, data, at, at + length):
                return first
            known[first + k] = True
        into = rows[:count] if is_placed else out[first : first + count]
        _normalize_raw_group(data, np.int64(start) + first * length, length, like, reference, delta, inverse, into)
        if is_placed:
            for k in range(count):
                place(into[k], stretches, fill, out[first + k])
    return checks.size


@_jit
def _normalize_raw_group(
    data: Any, start: Any, length: Any, like: Any, reference: Any, delta: Any, inverse: Any, out: Any
) -> None:
    for first in range(0, delta.size, BLOCK):
        last = min(first + BLOCK, delta.size)
        deltas, inverses = delta[first:last], inverse[first:last]
        for k in range(out.shape[0]):
            address = _address(data) + start + k * length + first * like.itemsize
            values = carray(_pointer(address), (last - first,), like.dtype)
            into = out[k, first:last]
            if reference.size > 0:
                references = reference[first:last]
                for j in range(deltas.size):
                    difference = np.float32(np.int32(np.int32(values[j]) - np.int32(references[j])))
                    into[j] = normalized(into, difference, deltas[j], inverses[j])
            else:
                for j in range(deltas.size):
                    into[j] = normalized(into, np.float32(values[j]), deltas[j], inverses[j])
