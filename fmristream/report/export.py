"""Runs back into NIfTI files: the very file where its header was kept, else the same voxels under a header that is whole.

What is written is checked on the way, and gets its name only when it is complete and right.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, StorageError, UsageError
from fmristream.ingest.header_bytes import make_prefix
from fmristream.ingest.sources.listing import without_suffix
from fmristream.report.image import HeaderKind, image_of
from fmristream.shards.dataset import Dataset
from fmristream.storage.urls import display_url

# gzip's own default: level 9 takes three times as long for 1 % less.
GZIP_LEVEL = 6
_GZIP_WBITS = 31
SUFFIXES = (".nii.gz", ".nii")

# File systems take 255 bytes.
_MAX_STEM = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that was written."""

    run: str
    path: str
    bytes: int  # of the file
    stream_bytes: int  # of the NIfTI image in it, decompressed
    stream_sha256: str
    header: HeaderKind  # the source's own, without what may tell who was scanned, or made from the dataset's tables
    notes: tuple[str, ...] = ()  # in what it differs from the source

    @property
    def is_original(self) -> bool:
        """Whether the uncompressed image equals the source's in every byte."""
        return self.header == "original"


def export_run(
    dataset: Dataset,
    run: int | str | Run,
    path: str | Path,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write one run as `.nii` or `.nii.gz`; memory is a few frames.

    Args:
        dataset: an open dataset.
        run: name or position.
        path: a local file.
        force: replace a file that is there.
        progress: called with the number of frames of every piece that was written.

    Raises:
        UsageError: there is no such run, the path has another suffix, or the file exists.
        CorruptDataError: stored bytes have changed; no file is left.
        StorageError: the file cannot be written.
    """
    wanted, target = dataset.run(run), _local(path)
    _check_target(target, force=force)
    image = image_of(dataset, wanted)
    with _as_storage_errors(target), _Output(target, force=force) as output:
        output.write(image.prefix)
        for frame in image.frames:
            output.write(frame)
            if progress is not None:
                progress(1)
        digest = output.sha256
        if image.stream_sha256 not in ("", digest):
            raise CorruptDataError(
                f"{dataset.store.name}: run {wanted.name}: the image comes to sha256 {digest[:12]}, "
                f"{image.stream_sha256[:12]} was recorded; convert the run again"
            )
        output.publish()
    return Exported(
        run=wanted.name,
        path=str(target),
        bytes=target.stat().st_size,
        stream_bytes=output.stream_bytes,
        stream_sha256=digest,
        header=image.header,
        notes=image.notes,
    )


def export_volume(
    volume: NDArray[Any], path: str | Path, *, affine: NDArray[np.float64], space: str, force: bool = False
) -> None:
    """Write one volume, such as a map that was computed of a run, as a 3-D NIfTI image of float32.

    Args:
        volume: (x, y, z) on the grid of the affine.
        path: a local file, `.nii` or `.nii.gz`.
        affine: (4, 4) voxel to mm.
        space: label of the space (`Run.space`), which decides the header's code.
        force: replace a file that is there.

    Raises:
        UsageError: it is no volume, the path has another suffix, or the file exists.
        StorageError: the file cannot be written.
    """
    target = _local(path)
    if volume.ndim != 3:
        raise UsageError(f"{target}: an array of {volume.ndim} axes was to be written as a volume; give (x, y, z)")
    _check_target(target, force=force)
    x, y, z = volume.shape
    matrix = tuple(np.asarray(affine, dtype=np.float64).ravel().tolist())
    dtype = np.dtype("<f4")
    prefix = make_prefix(
        shape=(x, y, z), frames=None, dtype=dtype, slope=1.0, inter=0.0, affine=matrix, tr_s=None, space=space
    )
    with _as_storage_errors(target), _Output(target, force=force) as output:
        output.write(prefix)
        output.write(volume.astype(dtype).tobytes(order="F"))
        output.publish()


def file_names(runs: Sequence[Run], *, suffix: str = SUFFIXES[0]) -> dict[str, str]:
    """A relative path for each run: BIDS folders for BIDS names, else the run's own name, made safe; never two alike."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for run in runs:
        # Names come from a table: no part of a path may lead out of the folder.
        parts = [
            re.sub(r"[^\w.+-]+", "_", part).strip("._")[:_MAX_STEM] for part in without_suffix(run.name).split("/")
        ]
        *folders, stem = [part for part in parts if part] or ["run"]
        if not folders and run.name.startswith(f"sub-{run.subject}_"):
            session = [f"ses-{run.session}"] if run.session else []
            folders = [re.sub(r"[^\w.+-]+", "_", part) for part in (f"sub-{run.subject}", *session, "func")]
        number, name = 1, "/".join([*folders, stem]) + suffix
        while name.lower() in taken:
            number += 1
            name = "/".join([*folders, f"{stem}-{number}"]) + suffix
        taken.add(name.lower())
        names[run.name] = name
    return names


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UsageError(f"{display_url(str(path))}: runs are exported into local files; give a path")
    return Path(path)


def _check_target(path: Path, *, force: bool) -> None:
    if not path.name.lower().endswith(SUFFIXES):
        raise UsageError(f"{path}: an exported run is a NIfTI file; give a name that ends in .nii.gz or .nii")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not force:
        raise UsageError(f"{path}: exists already; give another name, or --force to replace it")


class _Output:
    """A file under a passing name, compressed where its own ends in .gz; `publish` gives it its own."""

    def __init__(self, path: Path, *, force: bool) -> None:
        self.stream_bytes = 0
        self._path, self._force = path, force
        self._digest = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = path.parent / f".fmristream-{secrets.token_hex(8)}.part"
        self._file = _new_file(self._scratch)
        self._gzip = _compressor() if path.name.lower().endswith(".gz") else None

    @property
    def sha256(self) -> str:
        """Of what was written, uncompressed."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append uncompressed bytes."""
        self._digest.update(data)
        self.stream_bytes += len(data)
        self._file.write(data if self._gzip is None else self._gzip.compress(data))

    def publish(self) -> None:
        """Make the file durable and give it its name."""
        if self._gzip is not None:
            self._file.write(self._gzip.flush())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._force:
            os.replace(self._scratch, self._path)
            return
        try:
            os.link(self._scratch, self._path)
        except FileExistsError:
            raise UsageError(f"{self._path}: was made by somebody else meanwhile; it was left as it is") from None
        except OSError:  # a file system without hard links
            if self._path.exists():
                raise
            os.rename(self._scratch, self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._scratch.unlink(missing_ok=True)


def _new_file(path: Path) -> BinaryIO:
    return open(path, "xb", buffering=2**20)


@contextmanager
def _as_storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (CorruptDataError, StorageError, UsageError):
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _compressor() -> Any:
    """zlib-ng where it is installed: three times as fast, the same format. No time and no name go into gzip's header."""
    zlib: Any
    try:
        zlib = import_module("zlib_ng.zlib_ng")
    except ImportError:
        zlib = import_module("zlib")
    return zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, _GZIP_WBITS)
