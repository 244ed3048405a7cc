"""One chunk in, one chunk out: blosc (lz4, bitshuffle) and a crc32c, exactly as zarr's codecs `bytes, blosc, crc32c` do it.

Or without blosc, as `bytes, crc32c` do it; and what stands behind a chunk of codes: the values that codes cannot say.
"""

import ctypes
import struct
from functools import cache
from importlib.util import find_spec
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, FormatError

# An explicit block size: blosc's own choice for one-frame chunks costs 23 % more bytes.
BLOCK_BYTES = 32 * 2**10
LEVEL = 5
CRC_BYTES = 4
_COUNT_BYTES = 4


def padded_length(voxels: int) -> int:
    """Elements of a chunk: a multiple of 8, because blosc leaves a ragged last block unshuffled (up to 39 % more bytes)."""
    return -(-voxels // 8) * 8


def fill_value(dtype: "np.dtype[Any]") -> Any:
    """What a foreign reader shows where data is lost, and what pads chunks: a value that no brain has."""
    if dtype.kind == "f":
        return dtype.type(np.nan)
    if dtype.kind == "i":
        return dtype.type(np.iinfo(dtype).min)
    return dtype.type(1 << (8 * dtype.itemsize - 1))


def encode(chunk: NDArray[Any]) -> bytes:
    """A contiguous chunk as blosc frame and checksum; one thread, so that equal chunks give equal bytes."""
    return b"".join(encode_parts(chunk))


def encode_parts(chunk: NDArray[Any]) -> tuple[bytes, bytes]:
    """The same, the two apart: to be written one after the other, without a copy."""
    _single_threaded()
    packed: bytes = blosc.compress(
        chunk, b"lz4", LEVEL, shuffle=blosc.BITSHUFFLE, blocksize=BLOCK_BYTES, typesize=chunk.dtype.itemsize
    )
    return packed, checksum(packed)


def raw_parts(chunk: NDArray[Any]) -> tuple[memoryview, bytes]:
    """A contiguous chunk as it is, and its checksum."""
    data = chunk.data.cast("B")
    return data, checksum(data)


def decode_into(data: bytes | memoryview, out: NDArray[Any], *, what: object) -> None:
    """Check and decode one chunk into a contiguous array of its exact size.

    Raises:
        CorruptDataError: checksum or size is not what was written; `what` names the chunk.
        FormatError: an array of something else than numbers, which a table from elsewhere may claim.
    """
    payload = _checked(data, out.dtype, what)
    _single_threaded()
    # blosc's header: version, lz version, flags, typesize, then decoded size, block size and encoded size as u32.
    size, _, stored = struct.unpack_from("<3I", payload, 4) if len(payload) >= 16 else (0, 0, 0)
    if size != out.nbytes or stored != len(payload):
        raise CorruptDataError(
            f"{what}: {stored} bytes that decode to {size}, expected {len(payload)} that decode to {out.nbytes}; "
            "the index does not fit the data"
        )
    try:
        blosc.decompress(payload, out)
    except RuntimeError as error:  # right checksum, wrong content: nothing that this format's writer wrote
        raise CorruptDataError(f"{what}: cannot be decoded ({error}); convert the run again") from error


def decode_raw_into(data: bytes | memoryview, out: NDArray[Any], *, what: object) -> None:
    """The same of a chunk that was stored as it is.

    Raises:
        CorruptDataError: checksum or size is not what was written; `what` names the chunk.
        FormatError: an array of something else than numbers.
    """
    np.copyto(out, raw_view(data, out.dtype, out.size, what=what).reshape(out.shape))


def raw_view(
    data: bytes | memoryview, dtype: "np.dtype[Any]", count: int, *, what: object, is_known: bool = False
) -> NDArray[Any]:
    """(count,) values of a chunk that was stored as it is, in the memory where it lies.

    Args:
        data: the chunk.
        dtype: of its values.
        count: how many there are.
        what: names the chunk, once it is a string: only an error asks for that.
        is_known: its checksum was found right before; then only its size is looked at.

    Raises:
        CorruptDataError: checksum or size is not what was written.
        FormatError: an array of something else than numbers.
    """
    payload = memoryview(data)[:-CRC_BYTES] if is_known else _checked(data, dtype, what)
    if len(payload) != count * dtype.itemsize:
        raise CorruptDataError(
            f"{what}: {len(payload)} bytes, expected {count * dtype.itemsize}; the tables do not fit the data"
        )
    return np.frombuffer(payload, dtype=dtype)


def escape_block(positions: NDArray[np.uint32], values: NDArray[Any], *, chunk_check: bytes) -> bytes:
    """What follows a chunk of codes: positions, their values, how many, and a checksum of the chunk's and all of this."""
    body = positions.astype("<u4").tobytes() + values.tobytes() + len(positions).to_bytes(_COUNT_BYTES, "little")
    return body + checksum(chunk_check + body)


def split_escapes(
    data: memoryview, *, dtype: "np.dtype[Any]", voxels: int, what: object
) -> tuple[memoryview, NDArray[np.uint32], NDArray[Any]]:
    """A chunk of codes, and the positions and values (dtype) that stand behind it.

    Raises:
        CorruptDataError: checksum, count or positions are not what was written.
    """
    end = len(data) - CRC_BYTES - _COUNT_BYTES
    count = int.from_bytes(data[end : end + _COUNT_BYTES], "little") if end > 0 else 0
    begin = end - count * (4 + dtype.itemsize)
    if begin <= CRC_BYTES or checksum(bytes(data[begin - CRC_BYTES : -CRC_BYTES])) != bytes(data[-CRC_BYTES:]):
        raise CorruptDataError(
            f"{what}: checksum differs, the stored bytes have changed; restore the object from a copy or convert the run again"
        )
    positions = np.frombuffer(data[begin : begin + 4 * count], dtype="<u4")
    values = np.frombuffer(data[begin + 4 * count : end], dtype=dtype)
    if count and int(positions.max()) >= voxels:
        raise CorruptDataError(
            f"{what}: a value for voxel {positions.max()} of {voxels}; nothing that this format's writer wrote"
        )
    return data[:begin], positions, values


def _checked(data: bytes | memoryview, dtype: "np.dtype[Any]", what: object) -> memoryview:
    """A chunk without its checksum, which is right."""
    if dtype.kind not in "iuf":  # decoding into Python objects would be decoding into pointers
        raise FormatError(f"{what}: has the dtype {dtype}, expected whole numbers or floats; do not use this dataset")
    view = memoryview(data)
    if len(view) <= CRC_BYTES or checksum(view[:-CRC_BYTES]) != view[-CRC_BYTES:]:
        raise CorruptDataError(
            f"{what}: checksum differs, the stored bytes have changed; restore the object from a copy or convert the run again"
        )
    return view[:-CRC_BYTES]


def checksum(data: bytes | memoryview) -> bytes:
    """crc32c, little-endian, as zarr's crc32c codec appends it."""
    # google_crc32c takes bytes or an array; an array is made without a copy.
    whole = data if isinstance(data, bytes) else np.frombuffer(data, dtype=np.uint8)
    return int(google_crc32c.value(whole)).to_bytes(CRC_BYTES, "little")


@cache
def entry_points() -> NDArray[np.int64] | None:
    """(3,) addresses of pread, crc32c_value and blosc_decompress_ctx, for kernels that call them without Python.

    Two of them are in the libraries behind the modules used here, exported by the wheels that we know; None where not.
    """
    crc32c = find_spec("google_crc32c._crc32c")
    if crc32c is None:  # a build without C
        return None
    try:
        libraries = ctypes.CDLL(None), ctypes.CDLL(str(crc32c.origin)), ctypes.CDLL(blosc.__file__)
        names = "pread", "crc32c_value", "blosc_decompress_ctx"
        addresses = [
            ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            for library, name in zip(libraries, names, strict=True)
        ]
        return np.array(addresses, dtype=np.int64)
    except (AttributeError, OSError, TypeError):  # no such symbol; a system that cannot open itself
        return None


def _single_threaded() -> None:
    # numcodecs' switch is process-wide; with several threads blosc gives differing bytes and holds a global lock.
    blosc.use_threads = False
