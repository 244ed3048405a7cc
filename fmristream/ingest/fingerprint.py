"""Know a source file again: its size and a checksum that costs little to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fmristream.errors import ObjectMissingError, SourceError, StorageError
from fmristream.ingest.sources.listing import SourceRun
from fmristream.ingest.sources.synth import is_synth, synth_identity
from fmristream.storage.sources import known_checksum, open_source, read_source_range, source_size
from fmristream.storage.urls import scheme_of

GZIP_MAGIC = b"\x1f\x8b"
# The last 8 bytes of gzip: crc32 and length (mod 2^32) of what the last member holds, both little-endian.
GZIP_TRAILER_BYTES = 8

_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Size of the file in bytes, and its checksum.

    `gz:<crc32>:<length>`, `crc32c:<crc>`, `synth:<sha256>`; for members of archives `zip:<crc32>:<length>`, or
    `tgz:<crc32 of the archive>:<place in it>`.
    """

    size: int
    crc: str


def gzip_fingerprint(size: int, trailer: bytes) -> Fingerprint:
    """From the last 8 bytes of a gzip file, where they speak of all that it holds (`trailer_covers`)."""
    crc = int.from_bytes(trailer[:4], "little")
    length = int.from_bytes(trailer[4:8], "little")
    return Fingerprint(size=size, crc=f"gz:{crc:08x}:{length}")


def trailer_covers(trailer: bytes, content_bytes: int) -> bool:
    """Whether the last member of a gzip file holds all of its content: bgzip, for one, ends in an empty member."""
    return int.from_bytes(trailer[4:8], "little") == content_bytes % 2**32


def plain_fingerprint(size: int, crc: int) -> Fingerprint:
    """From the crc32c of the whole file."""
    return Fingerprint(size=size, crc=f"crc32c:{crc:08x}")


def quick_fingerprint(run: SourceRun) -> Fingerprint:
    """What `RunStream.fingerprint` gives at the end, without decoding all of it.

    What an archive says of its member (checked whenever the member is read); the trailer of gzip, where its one member
    holds everything that the header declares; else one pass of crc32c.

    Raises:
        SourceError: the file is not there, cannot be read, or changes while it is read.
        StorageError: the remote store failed.
    """
    if is_synth(run.url):
        return Fingerprint(**synth_identity(run.url))
    if (known := archived_fingerprint(run)) is not None:
        return known
    with as_source_errors(run.url, run.key):
        size = source_size(run.url)
        if read_source_range(run.url, 0, 2) != GZIP_MAGIC:
            return _plain(run, size)
        trailer = read_source_range(run.url, max(0, size - GZIP_TRAILER_BYTES), size)
    if len(trailer) < GZIP_TRAILER_BYTES:
        raise SourceError(f"{run.key}: {size} bytes are too few for a gzip file")
    from fmristream.ingest.nifti import open_nifti  # here, because it imports this module

    with open_nifti(run.url, name=run.key) as stream:
        content_bytes = stream.content_bytes
    if trailer_covers(trailer, content_bytes):
        return gzip_fingerprint(size, trailer)
    with as_source_errors(run.url, run.key):
        return _plain(run, size)


def archived_fingerprint(run: SourceRun) -> Fingerprint | None:
    """What an archive's directory says of a run that is its member; None for anything else."""
    with as_source_errors(run.url, run.key):
        crc = known_checksum(run.url)
        return Fingerprint(size=source_size(run.url), crc=crc) if crc else None


@contextmanager
def as_source_errors(url: str, name: str) -> Iterator[None]:
    """What is wrong with one file is a `SourceError`; what is wrong with a remote store remains a `StorageError`."""
    try:
        yield
    except ObjectMissingError as error:
        raise SourceError(
            f"{name}: the file is not there; a link that leads nowhere? With DataLad or git-annex, get its content first"
        ) from error
    except OSError as error:  # a StorageError is one, too
        if scheme_of(url) == "file":
            raise SourceError(f"{name}: the file cannot be read: {_cause(error)}") from error
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{name}: reading failed: {_cause(error)}") from error


def _cause(error: OSError) -> str:
    inner = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return inner.strerror or str(inner)


def _plain(run: SourceRun, size: int) -> Fingerprint:
    from google_crc32c import extend

    crc, read = 0, 0
    with open_source(run.url) as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = extend(crc, chunk)
            read += len(chunk)
    if read != size:
        raise SourceError(f"{run.key}: {size} bytes long when opened, but {read} were read: it is being changed")
    return plain_fingerprint(size, crc)
