"""Read a NIfTI run frame by frame: header checked first, memory of one frame, every byte accounted for at the end."""

import math
from collections.abc import Iterator

import numpy as np

from fmristream.errors import SourceError
from fmristream.ingest.cifti import CiftiStream, read_axes, require_small_xml
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.inflate import SourceBytes, open_bytes
from fmristream.ingest.nifti_header import NiftiHeader, check_is_mask, check_is_run, header_length, parse_header
from fmristream.ingest.run_stream import MAX_RUN_BYTES, Closing, Frame, RunHeader

# Deflate cannot do better: a header that declares more than this many bytes for each stored one lies.
MAX_DEFLATE_RATIO = 1032
# A head at .25 mm in float64 is below this.
MAX_FRAME_BYTES = 2**30

_SKIP_BYTES = 64 * 2**10
_FIRST_BYTES = 4

_UNSUPPORTED = {
    ".hdr": "the header of a .hdr/.img pair; write the image as one .nii or .nii.gz file",
    ".hdr.gz": "the header of a .hdr/.img pair; write the image as one .nii or .nii.gz file",
    ".img": "the voxels of a .hdr/.img pair; write the image as one .nii or .nii.gz file",
    ".img.gz": "the voxels of a .hdr/.img pair; write the image as one .nii or .nii.gz file",
    ".mgz": "a FreeSurfer image; write it as .nii.gz, with mri_convert for example",
    ".mgh": "a FreeSurfer image; write it as .nii.gz, with mri_convert for example",
}


class NiftiStream(Closing):
    """An open single-file NIfTI image (a `RunStream`)."""

    models = None

    def __init__(
        self,
        source: SourceBytes,
        header: RunHeader,
        *,
        name: str,
        is_swapped: bool,
        content_bytes: int,
        prefix: bytes = b"",
    ) -> None:
        self.content_bytes = content_bytes  # of the file, decompressed: header, extensions and voxels
        self.prefix = prefix  # every byte before the first voxel; empty unless it was asked for
        self._source = source
        self._header = header
        self._name = name
        self._is_swapped = is_swapped
        self._is_started = False
        self._is_complete = False

    @property
    def header(self) -> RunHeader:
        return self._header

    def frames(self, ring: int = 1) -> Iterator[Frame]:
        """Every frame, once; an array is overwritten by the frame that comes `ring` later.

        Raises:
            SourceError: the data are damaged, too short or too long.
        """
        assert not self._is_started, "frames() reads the file from front to back and can be called once"
        self._is_started = True
        header = self._header
        # Memory is touched only as data come, so a stream that is shorter than its header says costs what it holds.
        buffers = [np.empty(header.frame_bytes, dtype=np.uint8) for _ in range(min(ring, header.frames))]
        self._source.expect(self.content_bytes)
        for number in range(header.frames):
            stored = buffers[number % ring]
            found = self._source.read_into(stored.data)
            if found < header.frame_bytes:
                raise SourceError(
                    f"{self._name}: the data end in frame {number + 1} of the {header.frames} that the header declares, "
                    f"after {found} of its {header.frame_bytes} bytes"
                )
            if self._is_swapped:
                stored.view(f"u{header.dtype.itemsize}").byteswap(inplace=True)
            yield stored.view(header.dtype).reshape(header.shape, order="F")
        self._source.finish()
        self._is_complete = True

    def fingerprint(self) -> Fingerprint:
        """Size and checksum of the file."""
        assert self._is_complete, "the checksum is known once frames() is exhausted"
        return self._source.fingerprint()

    def close(self) -> None:
        self._source.close()


def open_nifti(
    url: str, *, name: str, max_run_bytes: int = MAX_RUN_BYTES, is_mask: bool = False, with_prefix: bool = False
) -> NiftiStream | CiftiStream:
    """Open a `.nii` or `.nii.gz` file with a 4-D run, with a 3-D mask (which then has one frame), or with a CIFTI-2 series.

    `with_prefix` keeps the bytes before the first voxel, header and extensions, as they are.

    Raises:
        SourceError: it is not such a file, and why.
        StorageError: the remote store failed.
    """
    suffix = _suffix(name)
    if suffix in _UNSUPPORTED:
        raise SourceError(f"{name}: {_UNSUPPORTED[suffix]}")
    source = open_bytes(url, name)
    try:
        _check_suffix(suffix, is_gzip=source.is_gzip, name=name)
        raw = _read_header(source, name)
        nifti = parse_header(raw, name)
        if is_mask or not nifti.is_cifti:
            (check_is_mask if is_mask else check_is_run)(nifti.dims, name)
        _check_sizes(nifti, source, name=name, max_run_bytes=max_run_bytes)
        if nifti.is_cifti:
            require_small_xml(nifti, name)
            axes = read_axes(nifti, raw + _pass_over(source, nifti, name, kept=True), name)
            return CiftiStream(source, nifti, axes, name=name)
        rest = _pass_over(source, nifti, name, kept=with_prefix)
    except BaseException:
        source.close()
        raise
    return NiftiStream(
        source,
        _run_header(nifti),
        name=name,
        is_swapped=not nifti.dtype.isnative,
        content_bytes=nifti.data_offset + nifti.data_bytes,
        prefix=raw + rest if with_prefix else b"",
    )


def _suffix(name: str) -> str:
    lower = name.lower()
    known = (".nii.gz", ".nii", *_UNSUPPORTED)
    return next((suffix for suffix in known if lower.endswith(suffix)), "")


def _check_suffix(suffix: str, *, is_gzip: bool, name: str) -> None:
    if suffix == ".nii.gz" and not is_gzip:
        raise SourceError(f"{name}: named .nii.gz but not gzip; if it is a plain NIfTI file, rename it to .nii")
    if suffix == ".nii" and is_gzip:
        raise SourceError(f"{name}: named .nii but gzip; rename it to .nii.gz")


def _read_header(source: SourceBytes, name: str) -> bytes:
    first = _read(source, _FIRST_BYTES, name)
    return first + _read(source, header_length(first, name) - _FIRST_BYTES, name)


def _read(source: SourceBytes, size: int, name: str) -> bytes:
    piece = bytearray(size)
    found = source.read_into(memoryview(piece))
    if found < size:
        raise SourceError(f"{name}: the file ends within its header")
    return bytes(piece)


def _check_sizes(nifti: NiftiHeader, source: SourceBytes, *, name: str, max_run_bytes: int) -> None:
    declared = nifti.data_offset + nifti.data_bytes
    dims = " x ".join(str(size) for size in nifti.dims)
    what = f"{name}: the header declares {declared} bytes ({dims} {nifti.dtype.name} from byte {nifti.data_offset})"
    if source.is_gzip and declared > MAX_DEFLATE_RATIO * source.size:
        raise SourceError(
            f"{what}; {source.size} bytes of gzip cannot hold that: the file is cut short or the header lies"
        )
    if not source.is_gzip and declared > source.size:
        raise SourceError(f"{what}, the file has {source.size}: it is cut short or the header lies")
    if not source.is_gzip and declared < source.size:
        raise SourceError(f"{what}, the file has {source.size}: {source.size - declared} bytes follow the last frame")
    if nifti.data_bytes > max_run_bytes:
        raise SourceError(f"{what}; runs of at most {max_run_bytes} bytes are converted (max_run_bytes)")
    if (frame_bytes := _frame_bytes(nifti)) > MAX_FRAME_BYTES:
        raise SourceError(f"{what}; one frame has {frame_bytes} bytes, at most {MAX_FRAME_BYTES} are converted")


def _frame_bytes(nifti: NiftiHeader) -> int:
    voxels = nifti.dims[5] if nifti.is_cifti else math.prod(nifti.dims[:3])
    return voxels * int(nifti.dtype.itemsize)


def _pass_over(source: SourceBytes, nifti: NiftiHeader, name: str, *, kept: bool) -> bytes:
    """Read up to the first voxel; nothing in header extensions is believed, and they are kept only where asked for."""
    scratch = memoryview(bytearray(_SKIP_BYTES))
    rest = bytearray()  # grows as bytes come, not by what the header says
    # The header itself is as long as its version says: 352 and 544 are the least offsets (checked).
    left = nifti.data_offset - nifti.header_bytes
    while left > 0:
        wanted = min(left, _SKIP_BYTES)
        if source.read_into(scratch[:wanted]) < wanted:
            raise SourceError(f"{name}: the file ends before byte {nifti.data_offset}, where its voxels should start")
        if kept:
            rest += scratch[:wanted]
        left -= wanted
    return bytes(rest)


def _run_header(nifti: NiftiHeader) -> RunHeader:
    x, y, z, *rest = nifti.dims
    return RunHeader(
        shape=(x, y, z),
        frames=rest[0] if rest else 1,
        dtype=nifti.dtype.newbyteorder("<"),
        slope=nifti.slope,
        inter=nifti.inter,
        affine=tuple(tuple(float(value) for value in row) for row in nifti.affine),
        tr_s=nifti.tr_s,
        space=nifti.space,
        notes=nifti.notes,
    )
