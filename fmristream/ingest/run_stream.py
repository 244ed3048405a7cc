"""What every reader of a run offers: a checked header, then frames one by one, then proof that all of it was read."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from fmristream.errors import SourceError
from fmristream.ingest.fingerprint import Fingerprint, archived_fingerprint, quick_fingerprint
from fmristream.ingest.sources.listing import SourceRun
from fmristream.ingest.sources.synth import is_synth
from fmristream.shards.grayordinates import BrainModels

__all__ = ["MAX_RUN_BYTES", "Fingerprint", "Frame", "RunHeader", "RunStream", "open_run", "quick_fingerprint"]

# The longest runs there are (7 T, 1 mm, hours of it) stay two orders of magnitude below.
MAX_RUN_BYTES = 256 * 2**30

Frame = npt.NDArray[Any]  # x y z


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """What a run declares before a voxel is read."""

    shape: tuple[int, int, int]
    frames: int
    dtype: np.dtype[Any]  # stored dtype, little-endian
    slope: float  # value = stored x slope + inter; 1 and 0 where the file declares none
    inter: float
    affine: tuple[
        tuple[float, ...], ...
    ]  # 4x4, voxel to mm: sform, else qform, else the voxel sizes, as nibabel chooses
    tr_s: float | None  # None where the header does not tell
    space: str  # from the code of the affine in use: "MNI", "Talairach", "template", "native" or "unknown"
    notes: tuple[str, ...] = ()  # oddities worth a warning
    models: str = ""  # of grayordinates, digest of their brain models; their shape is (grayordinates, 1, 1)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored frame."""
        x, y, z = self.shape
        return x * y * z * int(self.dtype.itemsize)


class Closing:
    """Closes itself at the end of a `with` block."""

    def close(self) -> None:
        """Let go of what is open."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RunStream(Protocol):
    """An open run. Use it as a context manager."""

    prefix: bytes  # of a NIfTI file every byte before the first voxel, where that was asked for; else empty

    @property
    def header(self) -> RunHeader: ...

    @property
    def models(self) -> BrainModels | None:
        """What the values of a frame are, where that is no volume."""
        ...

    def frames(self, ring: int = 1) -> Iterator[Frame]:
        """Every frame, once: (x, y, z) in Fortran order, stored dtype, little-endian.

        The frame that comes `ring` later may overwrite it: with 1 the next one.

        Read it to the end: only then is the file known to be whole (gzip's checksum comes last), and an error may still come.

        Raises:
            SourceError: the data are damaged, too short or too long.
        """
        ...

    def fingerprint(self) -> Fingerprint:
        """Size and checksum of the source, known once the frames are exhausted."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def open_run(run: SourceRun, *, max_run_bytes: int = MAX_RUN_BYTES, with_prefix: bool = False) -> RunStream:
    """Open a run and check its header; nothing is allocated by what the header says.

    `with_prefix` keeps the bytes that a NIfTI file has before its first voxel.

    Raises:
        SourceError: it is not a run that can be converted, and why.
        StorageError: the remote store failed.
    """
    # Imported here: each reader imports this module, and only one of them is needed.
    if is_synth(run.url):
        from fmristream.ingest.sources.synth_stream import SynthStream

        return SynthStream(run.url)
    from fmristream.ingest.nifti import open_nifti

    known = archived_fingerprint(run)
    stream = open_nifti(run.url, name=run.key, max_run_bytes=max_run_bytes, with_prefix=with_prefix)
    return stream if known is None else _Archived(stream, run, known)


class _Archived(Closing):
    """A run in an archive, whose directory knows its checksum; the archive's reader compared it with what was read."""

    def __init__(self, stream: RunStream, run: SourceRun, known: Fingerprint) -> None:
        self.prefix = stream.prefix
        self._stream = stream
        self._run = run
        self._known = known

    @property
    def header(self) -> RunHeader:
        return self._stream.header

    @property
    def models(self) -> BrainModels | None:
        return self._stream.models

    def frames(self, ring: int = 1) -> Iterator[Frame]:
        """The stream's own."""
        return self._stream.frames(ring)

    def fingerprint(self) -> Fingerprint:
        """What the archive says, if it says the same as when the run was opened."""
        self._stream.fingerprint()  # known only when every byte was read
        if archived_fingerprint(self._run) != self._known:
            raise SourceError(f"{self._run.key}: its archive was replaced while it was read; convert it again")
        return self._known

    def close(self) -> None:
        self._stream.close()
