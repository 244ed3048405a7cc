"""What a NIfTI-1 or NIfTI-2 header says, checked before anything is allocated by it."""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fmristream.errors import SourceError
from fmristream.shards import MAX_PREFIX_BYTES
from fmristream.signal.grid import Grid, corner_shift_mm

HEADER_BYTES = {1: 348, 2: 540}  # by NIfTI version; the header's first field says so itself
MAGIC = {1: b"n+1\0", 2: b"n+2\0\r\n\x1a\n"}
_PAIR_MAGIC = {1: b"ni1\0", 2: b"ni2\0\r\n\x1a\n"}
_EXTENDER_BYTES = 4

DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_REFUSED_DTYPES = {
    0: "of unknown type",
    1: "single bits",
    32: "complex64",
    128: "RGB colours",
    1536: "float128",
    1792: "complex128",
    2048: "complex256",
    2304: "RGBA colours",
}
_CIFTI_INTENTS = range(3000, 3100)
# What CIFTI-2 files hold, by intent (CIFTI-2 specification, table of file types). 3000 leaves it to the XML.
_CIFTI_SERIES = (3000, 3002)
_CIFTI_KINDS = {
    3001: "a dense connectome (.dconn)",
    3003: "a parcellated connectome (.pconn)",
    3004: "a parcellated series (.ptseries)",
    3006: "dense scalars (.dscalar)",
    3007: "dense labels (.dlabel)",
    3008: "parcellated scalars (.pscalar)",
    3009: "a parcellated-by-dense connectome (.pdconn)",
    3010: "a dense-by-parcellated connectome (.dpconn)",
    3011: "parcellated connectomes of a series (.pconnseries)",
    3012: "parcellated connectomes of scalars (.pconnscalar)",
}
# A FreeSurfer surface (163,842 vertices), folded so that it fits 16-bit sizes.
_FOLDED_SURFACE = (27307, 1, 6)

_SPACES = {0: "unknown", 1: "native", 2: "native", 3: "Talairach", 4: "MNI", 5: "template"}
_SECONDS_PER_UNIT = {8: 1.0, 16: 1e-3, 24: 1e-6}
_TIME_UNIT_BITS = 0x38
_PLAUSIBLE_TR_S = (0.05, 30.0)
# Above the rounding of a float32 quaternion, below what matters to anybody.
_QFORM_TOLERANCE_MM = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiHeader:
    """A header in plain values; `dims` may have any length from 1 to 7."""

    header_bytes: int
    dims: tuple[int, ...]
    dtype: np.dtype[Any]  # as stored, byte order included
    data_offset: int
    slope: float
    inter: float
    affine: npt.NDArray[np.float64]
    tr_s: float | None
    space: str
    notes: tuple[str, ...]
    is_cifti: bool = False  # a CIFTI-2 file: 1 x 1 x 1 x 1 x time x grayordinates, time fastest; the XML says the rest

    @property
    def data_bytes(self) -> int:
        """Bytes of all voxels, in Python's unbounded integers."""
        return math.prod(self.dims) * int(self.dtype.itemsize)


def header_length(first: bytes, name: str) -> int:
    """How long the header is, from its first 4 bytes.

    Raises:
        SourceError: it is no NIfTI header.
    """
    for order in "<>":
        if len(first) == 4 and (length := struct.unpack(order + "i", first)[0]) in HEADER_BYTES.values():
            return int(length)
    raise SourceError(
        f"{name}: not a NIfTI file: it starts with {first!r}, where the header's length, 348 or 540, is expected"
    )


def parse_header(raw: bytes, name: str) -> NiftiHeader:
    """Check a whole header of 348 or 540 bytes and read it the way nibabel does.

    Raises:
        SourceError: not a single-file NIfTI image of real numbers, or one that contradicts itself.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    version = 1 if len(raw) == HEADER_BYTES[1] else 2
    _check_magic(raw, version, name)
    endianness = "<" if struct.unpack("<i", raw[:4])[0] == len(raw) else ">"
    fields = (Nifti1Header if version == 1 else Nifti2Header)(raw, endianness=endianness, check=False)
    dims = _dims(fields, version, name)
    dtype = _dtype(fields, endianness, name)
    offset = _data_offset(fields, version, name)
    slope, inter = _scaling(fields, name)
    is_cifti = _is_cifti(fields, version)
    _repair_as_nibabel(fields)
    # What NIfTI's fields say of place and time does not count in CIFTI.
    affine, code, notes = (np.zeros((4, 4)), 0, list[str]()) if is_cifti else _affine(fields, dims, name)
    tr_s, tr_notes = (None, list[str]()) if is_cifti else _repetition_time(fields, dims)
    if int(fields["bitpix"]) != dtype.itemsize * 8:
        notes.append(
            f"bitpix is {int(fields['bitpix'])}, though its {dtype.name} values have {dtype.itemsize * 8} bits"
        )
    return NiftiHeader(
        header_bytes=len(raw),
        dims=dims,
        dtype=dtype,
        data_offset=offset,
        slope=slope,
        inter=inter,
        affine=affine,
        tr_s=tr_s,
        space=_SPACES[code],
        notes=(*notes, *tr_notes),
        is_cifti=is_cifti,
    )


def _check_magic(raw: bytes, version: int, name: str) -> None:
    place = slice(344, 348) if version == 1 else slice(4, 12)
    found = raw[place]
    if found == _PAIR_MAGIC[version]:
        raise SourceError(f"{name}: the header of a .hdr/.img pair; write the image as one .nii or .nii.gz file")
    if found != MAGIC[version]:
        kind = "an ANALYZE 7.5 header or a damaged one" if version == 1 else "a damaged NIfTI-2 header"
        raise SourceError(f"{name}: {kind}: its magic is {found!r}, that of NIfTI is {MAGIC[version]!r}")


def _dims(fields: Any, version: int, name: str) -> tuple[int, ...]:
    sizes = [int(size) for size in fields["dim"]]
    if _is_cifti(fields, version):
        _check_is_dense_series(sizes, int(fields["intent_code"]), name)
    if not 1 <= sizes[0] <= 7:
        raise SourceError(f"{name}: the header says {sizes[0]} dimensions; NIfTI has 1 to 7")
    dims = tuple(sizes[1 : sizes[0] + 1])
    if min(dims) < 1:
        raise SourceError(f"{name}: the header says {_times(dims)} voxels; every size must be at least 1")
    if dims[:3] == _FOLDED_SURFACE:
        raise SourceError(f"{name}: a FreeSurfer surface ({_times(dims)}), not volumes")
    return dims


def _is_cifti(fields: Any, version: int) -> bool:
    return version == 2 and int(fields["intent_code"]) in _CIFTI_INTENTS


def _check_is_dense_series(sizes: list[int], intent: int, name: str) -> None:
    if intent not in _CIFTI_SERIES:
        what = _CIFTI_KINDS.get(intent, "of a kind that this release does not know")
        raise SourceError(
            f"{name}: a CIFTI-2 file (intent {intent}): {what}; of CIFTI-2 dense time series (.dtseries) are converted"
        )
    if sizes[0] != 6 or sizes[1:5] != [1, 1, 1, 1]:
        raise SourceError(
            f"{name}: a CIFTI-2 file (intent {intent}) with the sizes {_times(tuple(sizes[1 : max(sizes[0], 0) + 1]))}; "
            "expected 1 x 1 x 1 x 1 x frames x grayordinates"
        )


def check_is_run(dims: tuple[int, ...], name: str) -> None:
    """A run has exactly 4 dimensions.

    Raises:
        SourceError: it has fewer or more.
    """
    if len(dims) != 4:
        raise SourceError(
            f"{name}: a {len(dims)}-D image ({_times(dims)}), not a run, which has 4 dimensions: x, y, z and time"
        )


def check_is_mask(dims: tuple[int, ...], name: str) -> None:
    """A mask has 3 dimensions, or a fourth of size 1.

    Raises:
        SourceError: anything else.
    """
    if len(dims) < 3 or math.prod(dims[3:]) != 1:
        raise SourceError(
            f"{name}: a {len(dims)}-D image ({_times(dims)}), not a mask, which has 3 dimensions: x, y, z"
        )


def _dtype(fields: Any, endianness: str, name: str) -> np.dtype[Any]:
    code = int(fields["datatype"])
    if code not in DTYPES:
        what = _REFUSED_DTYPES.get(code, f"of a type that NIfTI does not know (code {code})")
        raise SourceError(f"{name}: its voxels are {what}; integers and floats of 8 to 64 bits are converted")
    return np.dtype(DTYPES[code]).newbyteorder(endianness)  # type: ignore[arg-type]


def _data_offset(fields: Any, version: int, name: str) -> int:
    stored = fields["vox_offset"].item()
    least = HEADER_BYTES[version] + _EXTENDER_BYTES
    if not math.isfinite(stored) or stored != int(stored) or stored < least:
        raise SourceError(
            f"{name}: the header says that voxels start at byte {stored}; expected a whole number of at least {least}"
        )
    if stored > MAX_PREFIX_BYTES:
        raise SourceError(
            f"{name}: the header says that voxels start at byte {int(stored)}; "
            f"more than {MAX_PREFIX_BYTES} bytes of header extensions are not believed"
        )
    return int(stored)


def _scaling(fields: Any, name: str) -> tuple[float, float]:
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(inter):
        raise SourceError(f"{name}: scl_slope is {slope} but scl_inter is {inter}: the values cannot be scaled")
    return slope, inter


def _repair_as_nibabel(fields: Any) -> None:
    """The repairs that nibabel makes on loading and that an affine depends on."""
    if fields["pixdim"][0] not in (-1, 1):
        fields["pixdim"][0] = 1
    sizes = fields["pixdim"][1:4]
    sizes[sizes == 0] = 1
    np.abs(sizes, out=sizes)
    for code in ("sform_code", "qform_code"):
        if int(fields[code]) not in _SPACES:
            fields[code] = 0


def _affine(fields: Any, dims: tuple[int, ...], name: str) -> tuple[npt.NDArray[np.float64], int, list[str]]:
    sform_code, qform_code = int(fields["sform_code"]), int(fields["qform_code"])
    try:
        # Nonsense such as an infinite quaternion is refused below, by its result.
        with np.errstate(all="ignore"):
            affine = np.asarray(fields.get_best_affine(), dtype=np.float64)
    except ValueError as error:
        raise SourceError(f"{name}: the header's qform is no rotation: {error}") from error
    if not np.isfinite(affine).all():
        raise SourceError(f"{name}: the header's affine has values that are not finite")
    notes = []
    if sform_code and qform_code:
        notes += _qform_notes(fields, dims, affine)
    with np.errstate(all="ignore"):
        volume = abs(np.linalg.det(affine[:3, :3]))
    if volume < np.finfo(np.float32).tiny:
        notes.append("its affine is singular: voxels have no volume in millimetres")
    return affine, sform_code or qform_code, notes


def _qform_notes(fields: Any, dims: tuple[int, ...], affine: npt.NDArray[np.float64]) -> list[str]:
    try:
        with np.errstate(all="ignore"):
            qform = np.asarray(fields.get_qform(), dtype=np.float64)
            shift = corner_shift_mm(_grid(dims, affine), _grid(dims, qform))
    except ValueError:
        return ["its qform is no rotation; the sform is used"]
    if shift <= _QFORM_TOLERANCE_MM:
        return []
    codes = f"qform code {int(fields['qform_code'])}, sform code {int(fields['sform_code'])}"
    return [f"its qform and sform place a corner voxel {shift:.3g} mm apart ({codes}); the sform is used"]


def _repetition_time(fields: Any, dims: tuple[int, ...]) -> tuple[float | None, list[str]]:
    if len(dims) < 4:
        return None, []
    stored, unit = float(fields["pixdim"][4]), int(fields["xyzt_units"]) & _TIME_UNIT_BITS
    if not math.isfinite(stored) or stored <= 0:
        return None, []
    if unit not in _SECONDS_PER_UNIT:
        what = "no time unit" if unit == 0 else f"time unit {unit}, which is no time"
        return None, [f"the header's frame step is {stored:g} with {what}: the repetition time is unknown"]
    # float32 in NIfTI-1: 0.72 is stored as 0.7200000286; its shortest decimal is what was meant.
    tr_s = float(f"{float(str(fields['pixdim'][4])) * _SECONDS_PER_UNIT[unit]:.9g}")
    if not _PLAUSIBLE_TR_S[0] <= tr_s <= _PLAUSIBLE_TR_S[1]:
        return tr_s, [f"the header's repetition time is {tr_s:g} s, which is not plausible"]
    return tr_s, []


def _grid(dims: tuple[int, ...], affine: npt.NDArray[np.float64]) -> Grid:
    x, y, z = (*dims, 1, 1)[:3]
    return Grid(shape=(x, y, z), affine=tuple(affine.ravel().tolist()))


def _times(dims: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in dims)
