"""NIfTI files made byte by byte from the standard's tables, with no reader's or writer's help, lies included."""

import gzip
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

DATATYPES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}
SECONDS, MILLISECONDS, MICROSECONDS = 8, 16, 24
MILLIMETRES = 2
NIFTI1_BYTES, NIFTI2_BYTES = 348, 540

# An affine whose every number differs: 2.5 x 3 x 4 mm, turned and shifted.
AFFINE = ((-2.5, 0.25, 0.0, 90.0), (0.0, 3.0, -0.5, -126.5), (0.125, 0.0, 4.0, -72.0))


def nifti_bytes(
    stored: "np.ndarray[Any, Any]",
    *,
    version: int = 1,
    order: str = "<",
    extension: bytes = b"",
    trailing: bytes = b"",
    **lies: Any,
) -> bytes:
    """A single-file image. `extension` is what follows the 4 extender bytes; `lies` replace header fields.

    `order` is the byte order of header and voxels; `stored` is little-endian.
    """
    fields = header_fields(stored, version=version, extension=extension) | lies
    head = pack_nifti1(fields, order) if version == 1 else pack_nifti2(fields, order)
    extender = bytes([bool(extension), 0, 0, 0])
    payload = stored.astype(stored.dtype.newbyteorder(order)).tobytes("F")
    return head + extender + extension + payload + trailing


def header_fields(stored: "np.ndarray[Any, Any]", *, version: int, extension: bytes) -> dict[str, Any]:
    """Honest fields for an array, by the names of the standard."""
    header_bytes = NIFTI1_BYTES if version == 1 else NIFTI2_BYTES
    return {
        "sizeof_hdr": header_bytes,
        "dim": (stored.ndim, *stored.shape, *[1] * (7 - stored.ndim)),
        "intent_code": 0,
        "datatype": DATATYPES[stored.dtype.str[1:]],
        "bitpix": stored.dtype.itemsize * 8,
        "pixdim": (1.0, 2.5, 3.0, 4.0, 2.0, 0.0, 0.0, 0.0),
        "vox_offset": header_bytes + 4 + len(extension),
        "scl_slope": 1.0,
        "scl_inter": 0.0,
        "xyzt_units": MILLIMETRES | SECONDS,
        "qform_code": 0,
        "sform_code": 4,
        "quaternion": (0.0, 0.0, 0.0),
        "qoffset": (0.0, 0.0, 0.0),
        "srow": AFFINE,
        "magic": b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n",
    }


def pack_nifti1(fields: dict[str, Any], order: str) -> bytes:
    """The 348 bytes of a NIfTI-1 header."""
    return b"".join(
        [
            struct.pack(order + "i35xB", fields["sizeof_hdr"], 0),  # data_type … dim_info
            struct.pack(order + "8h3f", *fields["dim"], 0, 0, 0),
            struct.pack(order + "4h", fields["intent_code"], fields["datatype"], fields["bitpix"], 0),
            struct.pack(order + "8f", *fields["pixdim"]),
            struct.pack(order + "3f", fields["vox_offset"], fields["scl_slope"], fields["scl_inter"]),
            struct.pack(order + "hBB", 0, 0, fields["xyzt_units"]),
            struct.pack(order + "4f2i", 0, 0, 0, 0, 0, 0),  # cal_max … glmin
            struct.pack("80s24s", b"made for a test", b""),
            struct.pack(order + "2h", fields["qform_code"], fields["sform_code"]),
            struct.pack(order + "6f", *fields["quaternion"], *fields["qoffset"]),
            struct.pack(order + "12f", *_flat(fields["srow"])),
            struct.pack("16s4s", b"", fields["magic"]),
        ]
    )


def pack_nifti2(fields: dict[str, Any], order: str) -> bytes:
    """The 540 bytes of a NIfTI-2 header."""
    return b"".join(
        [
            struct.pack(order + "i", fields["sizeof_hdr"]),
            struct.pack("8s", fields["magic"]),
            struct.pack(order + "2h8q", fields["datatype"], fields["bitpix"], *fields["dim"]),
            struct.pack(order + "3d8d", 0, 0, 0, *fields["pixdim"]),
            struct.pack(order + "q2d", fields["vox_offset"], fields["scl_slope"], fields["scl_inter"]),
            struct.pack(order + "4d2q", 0, 0, 0, 0, 0, 0),  # cal_max … slice_end
            struct.pack("80s24s", b"made for a test", b""),
            struct.pack(order + "2i", fields["qform_code"], fields["sform_code"]),
            struct.pack(order + "6d", *fields["quaternion"], *fields["qoffset"]),
            struct.pack(order + "12d", *_flat(fields["srow"])),
            struct.pack(order + "3i", 0, fields["xyzt_units"], fields["intent_code"]),
            struct.pack("16sB15x", b"", 0),
        ]
    )


def comment_extension(text_bytes: int, order: str = "<") -> bytes:
    """A header extension that holds a comment (code 6); its size is a multiple of 16, as the standard wants."""
    size = (8 + text_bytes + 15) // 16 * 16
    return struct.pack(order + "2i", size, 6) + b"c" * (size - 8)


def gzip_members(data: bytes, cuts: Sequence[int] = (), *, level: int = 6) -> bytes:
    """The data as gzip, one member between each two cuts."""
    places = [0, *sorted(cuts), len(data)]
    pieces = [data[start:stop] for start, stop in pairwise(places)]
    return b"".join(gzip.compress(piece, compresslevel=level, mtime=0) for piece in pieces)


def bold_like(shape: Sequence[int], dtype: str = "i2", *, seed: int = 0) -> "np.ndarray[Any, Any]":
    """Values over the whole range of the type; floats with a NaN of odd bits, infinities and subnormals."""
    bits = np.random.default_rng(seed).integers(0, 256, size=(*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    return np.asfortranarray(bits.view(np.dtype(dtype).newbyteorder("<"))[..., 0])


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]
