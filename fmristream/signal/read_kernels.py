"""The loops of the read path: what decoding left in the second-level cache becomes a row of a batch in one pass.

Rows are float32, or the bits of float16 in uint16 arrays: numba has no half precision, LLVM has, and rounds as numpy does.
"""

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")

# Voxels that are worked on at a time: their scale serves several frames out of the first-level cache.
BLOCK = 2048


def _has_half() -> bool:
    """Whether code for this processor may round to float16 by an instruction; elsewhere LLVM calls what is not there."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    features = numba.config.CPU_FEATURES
    if features is None and numba.config.CPU_NAME is None:
        return bool(binding.get_host_cpu_features().get("f16c"))
    return "+f16c" in (features or "")


HAS_HALF = _has_half()


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@_jit
def _half_by_integers(value: Any) -> Any:
    """The same in integer arithmetic, for processors without the instruction."""
    bits = _bits(value)
    sign = np.uint32(bits & np.uint32(0x80000000))
    size = np.uint32(bits ^ sign)
    if size > np.uint32(0x7F800000):  # NaN
        half = np.uint32(0x7E00)
    elif size >= np.uint32(0x47800000):  # 2^16 and more
        half = np.uint32(0x7C00)
    elif size < np.uint32(0x38800000):  # below 2^-14: adding 0.5 makes the processor round at float16's last place
        half = np.uint32(_bits(np.float32(abs(value) + np.float32(0.5))) - np.uint32(0x3F000000))
    else:
        odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
        half = np.uint32((size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    return np.uint16(half | (sign >> np.uint32(16)))


@intrinsic
def _as_stored(typing_context: Any, out: Any, value: Any) -> Any:
    """The float32 value as an element of `out`: itself, or the bits of its nearest float16 (ties to even)."""
    is_half = out.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1]
        if not is_half:
            return value
        if not HAS_HALF:
            return context.compile_internal(builder, _half_by_integers.py_func, types.uint16(types.float32), (value,))
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))

    return (types.uint16 if is_half else types.float32)(out, types.float32), generate


@_jit
def to_half(values: Any, out: Any) -> None:
    """out[v] = the bits of values[v] (float32) as float16, equal to numpy's astype in every bit of what is not NaN."""
    for v in range(out.size):
        out[v] = _as_stored(out, np.float32(values[v]))


@_jit
def normalized(out: Any, value: Any, delta: Any, inverse: Any) -> Any:
    """(value - delta) x inverse as an element of `out`; not finite -> 0. For kernels: in their loops it becomes vector code."""
    z = np.float32((value - delta) * inverse)
    return _as_stored(out, z if np.isfinite(z) else np.float32(0))


@_jit
def normalize_voxels(frames: Any, delta: Any, inverse: Any, out: Any) -> None:
    """out[t, v] = (frames[t, v] - delta[v]) x inverse[v]; not finite -> 0.

    Args:
        frames: (t, v or more) contiguous, signed residuals or floats.
        delta: (v,) float32.
        inverse: (v,) float32.
        out: (t, v) float32, or uint16 for the bits of float16.
    """
    for start in range(0, delta.size, BLOCK):
        stop = min(start + BLOCK, delta.size)
        deltas, inverses = delta[start:stop], inverse[start:stop]
        for t in range(out.shape[0]):
            here, there = frames[t, start:stop], out[t, start:stop]
            for j in range(deltas.size):
                there[j] = normalized(there, here[j], deltas[j], inverses[j])


@_jit
def normalize_integers(values: Any, reference: Any, delta: Any, inverse: Any, out: Any) -> None:
    """The same of one frame (v,) of 8- or 16-bit values as the source stored them, reference not yet subtracted."""
    for v in range(delta.size):
        difference = np.float32(np.int32(np.int32(values[v]) - np.int32(reference[v])))
        out[v] = normalized(out, difference, delta[v], inverse[v])


@_jit
def normalize_codes(codes: Any, step: Any, offset: Any, delta: Any, inverse: Any, escape: int, out: Any) -> Any:
    """The same of one frame of codes, by way of exactly the values that `kernels.dequantize` gives.

    Args:
        codes: (v or more,) int8 or int16.
        step: (v,) float32.
        offset: (v,) float32, the dtype of values.
        delta: (v,) float32.
        inverse: (v,) float32.
        escape: the code whose value stands elsewhere; what is written for it is for `normalize_escapes` to replace.
        out: (v,) float32 or uint16.

    Returns:
        How many codes are escapes.
    """
    escapes: Any = 0
    for start in range(0, delta.size, BLOCK):
        stop = min(start + BLOCK, delta.size)
        here, there = codes[start:stop], out[start:stop]
        steps, offsets, deltas, inverses = step[start:stop], offset[start:stop], delta[start:stop], inverse[start:stop]
        count = np.int32(0)
        for j in range(deltas.size):
            count = np.int32(count + np.int32(np.int32(here[j]) == np.int32(escape)))
        escapes += count
        for j in range(deltas.size):
            value = np.float32(np.float64(here[j]) * np.float64(steps[j]) + np.float64(offsets[j]))
            there[j] = normalized(there, value, deltas[j], inverses[j])
    return escapes


@_jit
def normalize_escapes(
    codes: Any, positions: Any, values: Any, delta: Any, inverse: Any, escape: int, out: Any
) -> bool:  # fmt: skip
    """Put normalised values where codes are escapes; False where a position's code is none."""
    fits = True
    for n in range(positions.size):
        v = positions[n]
        fits = fits and codes[v] == escape
        out[v] = normalized(out, values[n], delta[v], inverse[v])
    return fits


@_jit
def place(row: Any, stretches: Any, fill: Any, out: Any) -> None:
    """Put a packed row on the grid, its background included, in one pass from the grid's first voxel to its last.

    To write the background each time costs no more than to write around it: 2.0 against 2.2 ms for 20 frames of float16.

    Args:
        row: (v,).
        stretches: (n, 3) uint32: first voxel, its place in the grid, how many follow each other in both; rising places.
        fill: one element of the row's dtype.
        out: (x*y*z,) of the row's dtype.
    """
    end = np.int64(0)
    for n in range(stretches.shape[0]):
        # From unsigned: an index that might be negative costs three times as much.
        voxel, place, length = np.int64(stretches[n, 0]), np.int64(stretches[n, 1]), np.int64(stretches[n, 2])
        out[end:place] = fill
        for k in range(length):
            out[place + k] = row[voxel + k]
        end = place + length
    out[end:] = fill
