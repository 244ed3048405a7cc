"""A NIfTI header as bytes: what of it may tell who was scanned, the header without that, and one made anew.

Everything before the first voxel is called the prefix: 348 or 540 bytes of header, 4 bytes that say whether extensions
follow, the extensions, and whatever fills the file up to `vox_offset`. Bytes are cut and replaced here, never parsed and
written again, so that what stays is exactly what the file had, in the file's byte order.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fmristream.errors import SourceError
from fmristream.ingest.nifti_header import DTYPES, HEADER_BYTES, MAGIC, header_length
from fmristream.signal.grid import voxel_sizes_mm

EXTENDER_BYTES = 4
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
CIFTI_CODE = 32

# Free text, and fields that NIfTI does not use: acquisition times, names and comments have been found in them, or memory
# of the program that wrote the file. Place and size by NIfTI version.
_SCRUBBED = {
    1: {
        "data_type": (4, 10), "db_name": (14, 18), "extents": (32, 4), "session_error": (36, 2), "glmax": (140, 4),
        "glmin": (144, 4), "descrip": (148, 80), "aux_file": (228, 24),
    },
    2: {"descrip": (240, 80), "aux_file": (320, 24), "unused_str": (525, 15)},
}  # fmt: skip
_INTENT_NAME = {1: (328, 16), 2: (508, 16)}
_REGULAR = 38  # NIfTI-1: `r` or nothing
_VOX_OFFSET = {1: (108, "f"), 2: (168, "q")}

# Names of intents that say what values are; anything else in this field is free text.
INTENT_NAMES = frozenset(
    {
        "", "Correlation", "Displacement", "Estimate", "F-test", "Label", "T-test", "Time Series", "Vector", "Z-score",
        "ConnDense", "ConnDenseScalar", "ConnDenseSeries", "ConnDenseLabel", "ConnParcelSries", "ConnParcels",
    }
)  # fmt: skip

_EXTENSION_NAMES = {
    2: "dicom", 4: "afni", 6: "comment", 8: "xcede", 10: "jim", 12: "workflow", 14: "freesurfer", 16: "pickle",
    32: "cifti", 34: "frame timing", 40: "matlab", 42: "quantiphyse", 44: "mrs",
}  # fmt: skip

# Where a header that is made anew has its fields, and what they are.
_WRITTEN = {
    1: {
        "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
        "vox_offset": (108, "f"), "scl_slope": (112, "2f"), "xyzt_units": (123, "B"), "sform_code": (254, "h"),
        "srow": (280, "12f"), "magic": (344, "4s"),
    },
    2: {
        "sizeof_hdr": (0, "i"), "magic": (4, "8s"), "datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"),
        "pixdim": (104, "8d"), "vox_offset": (168, "q"), "scl_slope": (176, "2d"), "sform_code": (348, "i"),
        "srow": (400, "12d"), "xyzt_units": (500, "i"),
    },
}  # fmt: skip

# By the beginning of a space's label. An affine without a code is not used by readers: others are "aligned".
_SPACE_CODES = {"MNI": 4, "Talairach": 3, "template": 5, "native": 1}
_ALIGNED_CODE = 2
_MILLIMETRES, _SECONDS = 2, 8
_MAX_NIFTI1_SIZE = 2**15 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """A prefix without free text, and the names of what was taken out; never what it said."""

    prefix: bytes
    removed: tuple[str, ...]


def header_of(prefix: bytes, name: str) -> bytes:
    """The header alone, of bytes that nobody checked.

    Raises:
        SourceError: they do not begin with a whole header.
    """
    size = header_length(prefix[:4], name)
    if len(prefix) < size + EXTENDER_BYTES:
        raise SourceError(f"{name}: {len(prefix)} bytes, where a header takes {size + EXTENDER_BYTES}")
    return prefix[:size]


def version_of(prefix: bytes) -> int:
    """1 or 2, of a prefix whose header was checked."""
    return 1 if HEADER_BYTES[1] in (int.from_bytes(prefix[:4], order) for order in _ORDERS) else 2


def is_big_endian(prefix: bytes) -> bool:
    """Whether header and voxels are big-endian."""
    return int.from_bytes(prefix[:4], "big") == HEADER_BYTES[version_of(prefix)]


def scrub(prefix: bytes) -> Scrubbed:
    """Zero free text, unused fields and padding, and drop every extension.

    One with CIFTI's code goes with the others: what is stored under a header is volumes, of which it says nothing, and it
    can hold whatever a program or person wrote beside the axes.

    Sizes, types, scaling, affines, units, slice timing and intent codes stay as they are, bit for bit.
    """
    version, order = version_of(prefix), ">" if is_big_endian(prefix) else "<"
    size = HEADER_BYTES[version]
    header = bytearray(prefix[:size])
    removed = [name for name, place in _SCRUBBED[version].items() if _zero(header, *place)]
    if version == 1 and header[_REGULAR] not in b"r\0":
        header[_REGULAR] = 0
        removed.append("regular")
    if _keep_known_name(header, *_INTENT_NAME[version]):
        removed.append("intent_name")
    dropped = _extensions(prefix, size, order)
    offset, kind = _VOX_OFFSET[version]
    struct.pack_into(order + kind, header, offset, size + EXTENDER_BYTES)
    return Scrubbed(prefix=bytes(header) + bytes(EXTENDER_BYTES), removed=(*removed, *dropped))


def make_prefix(
    *,
    shape: tuple[int, int, int],
    frames: int | None,
    dtype: "np.dtype[Any]",
    slope: float,
    inter: float,
    affine: tuple[float, ...],
    tr_s: float | None,
    space: str,
) -> bytes:
    """A little-endian header for values in `dtype`: NIfTI-1 where that holds every number exactly, else NIfTI-2.

    Args:
        shape: the grid (x, y, z).
        frames: number of time points; None for a volume without a time axis.
        dtype: little-endian stored dtype.
        slope: scaled value = stored x slope + inter.
        inter: see slope.
        affine: 16 numbers, row by row, voxel index to mm; written as sform.
        tr_s: repetition time in seconds, None if unknown.
        space: label of the space, which decides the sform's code.
    """
    code = next(code for code, name in DTYPES.items() if name == dtype.str[1:])
    edges_mm = voxel_sizes_mm(np.array(affine).reshape(4, 4))
    dims = (3, *shape, 1) if frames is None else (4, *shape, frames)
    fits = max(dims) <= _MAX_NIFTI1_SIZE and all(_is_single(n) for n in (slope, inter, *affine[:12]))
    version = 1 if fits else 2
    values: dict[str, tuple[Any, ...]] = {
        "sizeof_hdr": (HEADER_BYTES[version],),
        "dim": (*dims, 1, 1, 1),
        "datatype": (code,),
        "bitpix": (8 * dtype.itemsize,),
        "pixdim": (1.0, *edges_mm, tr_s or 0.0, 0.0, 0.0, 0.0),
        "vox_offset": (HEADER_BYTES[version] + EXTENDER_BYTES,),
        "scl_slope": (slope, inter),
        "xyzt_units": (_MILLIMETRES | (_SECONDS if tr_s else 0),),
        "sform_code": (_sform_code(space),),
        "srow": affine[:12],
        "magic": (MAGIC[version],),
    }
    header = bytearray(HEADER_BYTES[version])
    for name, numbers in values.items():
        place, form = _WRITTEN[version][name]
        struct.pack_into("<" + form, header, place, *numbers)
    return bytes(header) + bytes(EXTENDER_BYTES)


def _zero(header: bytearray, place: int, size: int) -> bool:
    """Zero a field; whether it held anything."""
    held = any(header[place : place + size])
    header[place : place + size] = bytes(size)
    return held


def _keep_known_name(header: bytearray, place: int, size: int) -> bool:
    """Keep the name of an intent if it is a known one, with zeros behind it; whether anything was taken out."""
    before = bytes(header[place : place + size])
    name = before.split(b"\0", 1)[0]
    known = name if name.decode("latin-1") in INTENT_NAMES else b""
    after = known.ljust(size, b"\0")
    header[place : place + size] = after
    return after != before


def _extensions(prefix: bytes, start: int, order: str) -> tuple[str, ...]:
    """Names of what follows the header."""
    place = start + EXTENDER_BYTES
    dropped = ["extender"] if any(prefix[start + 1 : place]) else []
    while prefix[start] and place + 8 <= len(prefix):
        size, code = struct.unpack_from(order + "2i", prefix, place)
        if size < 16 or size % 16 or place + size > len(prefix):  # no extension: what is left cannot be told apart
            break
        dropped.append(f"extension {_EXTENSION_NAMES.get(code, 'of another kind')}")
        place += size
    if any(prefix[place:]):
        dropped.append("padding")
    return tuple(dict.fromkeys(dropped))


def _is_single(number: float) -> bool:
    """Whether float32 holds the number exactly."""
    with np.errstate(over="ignore"):
        return math.isfinite(number) and float(np.float32(number)) == number


def _sform_code(space: str) -> int:
    for beginning, code in _SPACE_CODES.items():
        if space.startswith(beginning):
            return code
    return _ALIGNED_CODE
