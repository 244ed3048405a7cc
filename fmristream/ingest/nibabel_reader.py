"""A second pair of eyes: the frames of a source as nibabel reads them, or as a synthetic cohort makes them.

Nothing here shares code with the reader that converts: it is what conversions are verified against.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import SourceError
from fmristream.ingest.sources import SourceRun
from fmristream.ingest.sources.synth import affine_rows, is_synth, locate_synth
from fmristream.storage.sources import MemberUrl, open_source
from fmristream.storage.urls import display_url, local_path, scheme_of

if TYPE_CHECKING:
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.cifti2 import BrainModelAxis

_COPY_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """What the source says of a run, and its frames."""

    shape: tuple[int, ...]  # x, y, z, frames
    dtype: "np.dtype[Any]"  # stored dtype, little-endian
    slope: float
    inter: float
    affine: tuple[tuple[float, ...], ...]
    frames: Iterator[NDArray[Any]]  # (x, y, z), stored dtype, unscaled; once
    prefix: bytes = b""  # every byte before the first voxel; empty where there is no file
    models: "BrainModelAxis | None" = None  # of CIFTI, whose shape is grayordinates, 1, 1, frames

    def scaled(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Stored values in the units of the source, as `get_fdata` gives them."""
        from nibabel.volumeutils import apply_read_scaling

        with np.errstate(all="ignore"):
            scaled = apply_read_scaling(stored, np.float64(self.slope), np.float64(self.inter))
            return np.asarray(scaled, dtype=np.float64)


@contextmanager
def open_with_nibabel(run: SourceRun) -> Iterator[SourceImage]:
    """Open a run; memory is one frame, whatever its length. Remote files and members of archives are copied first.

    Raises:
        SourceError: nibabel cannot read it, or it is no 4-D image.
    """
    if is_synth(run.url):
        yield _synthetic(run.url)
        return
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        if scheme_of(run.url) == "file" and MemberUrl.parse(run.url) is None:
            with _nifti(local_path(run.url), run.key) as image:
                yield image
            return
        suffix = ".nii.gz" if run.key.lower().endswith(".gz") else ".nii"
        with tempfile.NamedTemporaryFile(prefix="fmristream-", suffix=suffix) as copy, open_source(run.url) as file:
            while piece := file.read(_COPY_BYTES):
                copy.write(piece)
            copy.flush()
            with _nifti(copy.name, run.key) as image:
                yield image
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError) as error:
        raise SourceError(f"{run.key}: nibabel cannot read {display_url(run.url)}: {error}") from error


@contextmanager
def _nifti(path: str, name: str) -> Iterator[SourceImage]:
    import nibabel
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.cifti2 import Cifti2Image
    from nibabel.openers import ImageOpener

    image: Any = nibabel.load(path)
    declared = image.dataobj
    if isinstance(image, Cifti2Image):
        with ImageOpener(path) as file:
            yield _dense_series(image, file, name)
        return
    if len(declared.shape) != 4:
        raise SourceError(f"{name}: nibabel reads {len(declared.shape)} dimensions, a run has 4")
    with ImageOpener(path) as file:
        prefix = file.read(declared.offset)
        # nibabel's own reader without the scaling, over one open file: a gzip stream is decoded once, front to back.
        unscaled = ArrayProxy(file, (declared.shape, declared.dtype, declared.offset), mmap=False)
        yield SourceImage(
            shape=tuple(int(size) for size in declared.shape),
            dtype=declared.dtype.newbyteorder("<"),
            slope=float(declared.slope),
            inter=float(declared.inter),
            affine=affine_rows(image.affine),
            frames=_frames(unscaled),
            prefix=prefix,
        )


def _dense_series(image: Any, file: Any, name: str) -> SourceImage:
    """A CIFTI-2 series by grayordinates: some frames of every series at a time."""
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.cifti2 import BrainModelAxis, SeriesAxis

    declared, axes = image.dataobj, [image.header.get_axis(axis) for axis in range(len(image.shape))]
    if [type(axis) for axis in axes] != [SeriesAxis, BrainModelAxis]:
        raise SourceError(f"{name}: nibabel reads {', '.join(type(axis).__name__ for axis in axes)}: no dense series")
    frames, grayordinates = (int(size) for size in declared.shape)
    dtype = declared.dtype.newbyteorder("<")
    unscaled = ArrayProxy(file, (declared.shape, declared.dtype, declared.offset), mmap=False)

    def each() -> Iterator[NDArray[Any]]:
        at_once = max(1, _COPY_BYTES // (grayordinates * dtype.itemsize))
        for start in range(0, frames, at_once):
            for values in np.asarray(unscaled[start : start + at_once]).astype(dtype, copy=False):
                yield values.reshape(grayordinates, 1, 1)

    return SourceImage(
        shape=(grayordinates, 1, 1, frames),
        dtype=dtype,
        slope=float(declared.slope),
        inter=float(declared.inter),
        affine=((0.0,) * 4,) * 4,
        frames=each(),
        models=axes[1],
    )


def _frames(unscaled: "ArrayProxy") -> Iterator[NDArray[Any]]:
    little = unscaled.dtype.newbyteorder("<")
    for frame in range(unscaled.shape[3]):
        # astype to another byte order moves bytes and keeps the payload of NaN.
        yield np.asarray(unscaled[..., frame]).astype(little, copy=False)


def _synthetic(url: str) -> SourceImage:
    cohort, subject, run = locate_synth(url)
    dtype = np.dtype(cohort.dtype).newbyteorder("<")
    return SourceImage(
        shape=(*cohort.shape, cohort.frames),
        dtype=dtype,
        slope=1.0,
        inter=0.0,
        affine=affine_rows(cohort.affine()),
        frames=(frame.astype(dtype, copy=False) for frame in cohort.run_frames(subject, run)),
    )
