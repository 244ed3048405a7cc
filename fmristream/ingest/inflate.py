"""The bytes of a file from front to back, decompressed where it is gzip, and proof at the end that they were all right."""

import os
from io import FileIO, RawIOBase
from typing import Any, Protocol

import numpy as np

from fmristream.errors import SourceError
from fmristream.ingest.fingerprint import (
    GZIP_MAGIC,
    GZIP_TRAILER_BYTES,
    Fingerprint,
    as_source_errors,
    gzip_fingerprint,
    plain_fingerprint,
    trailer_covers,
)
from fmristream.storage.sources import open_source, source_size

_READ_BYTES = 2 * 2**20
# zlib copies what it leaves of its input: small pieces keep a file of many tiny members from costing quadratic time.
_FEED_BYTES = 64 * 2**10
_PIECE_BYTES = 2**20
# What the reader of a single member reads at a time.
_AHEAD_BYTES = 2**18
# Valid gzip, but nobody writes it: bgzip ends with one empty member; only a file made to waste time holds many.
_MAX_EMPTY_MEMBERS = 64
# Damage can make a stream longer: what follows is read this far, so that a bad checksum is found and named as the reason.
_MAX_EXCESS_BYTES = 8 * 2**20
_GZIP_WBITS = 31


class SourceBytes(Protocol):
    """Bytes in order, and a check at the end."""

    size: int  # bytes of the file as stored
    is_gzip: bool

    def read_into(self, target: memoryview) -> int:
        """Fill the target; fewer bytes only where the stream ends."""
        ...

    def expect(self, content_bytes: int) -> None:
        """Tell how many bytes the whole stream should hold: a file that ends accordingly can be read faster."""
        ...

    def finish(self) -> None:
        """Check that the stream ends here, whole.

        Raises:
            SourceError: bytes follow, checksums differ, or the file changed meanwhile.
        """
        ...

    def fingerprint(self) -> Fingerprint: ...

    def close(self) -> None: ...


def open_bytes(url: str, name: str) -> SourceBytes:
    """Open a file as stored or as gzip, by its first bytes.

    Raises:
        SourceError: it is empty, not there or cannot be read.
        StorageError: the remote store failed.
    """
    file = _File(url, name)
    try:
        first = file.read(_READ_BYTES)
        while first and len(first) < len(GZIP_MAGIC):
            more = file.read(_READ_BYTES)
            if not more:
                break
            first += more
        if not first:
            raise SourceError(f"{name}: the file is empty")
        return _Gzip(file, first) if first.startswith(GZIP_MAGIC) else _Plain(file, first)
    except BaseException:
        file.close()
        raise


class _File:
    """A file that counts what it hands out, and names itself when reading fails."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.read_so_far = 0
        self._url = url
        with as_source_errors(url, name):
            self.size = source_size(url)
            self._file = open_source(url)

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        with as_source_errors(self._url, self.name):
            piece = self._file.read(size)
        self.read_so_far += len(piece)
        return piece

    def read_into(self, target: memoryview) -> int:
        """Read into the target, at most as much as it holds; 0 at the end."""
        if not isinstance(self._file, FileIO):
            piece = self.read(len(target))
            target[: len(piece)] = piece
            return len(piece)
        with as_source_errors(self._url, self.name):
            size = self._file.readinto(target)
        self.read_so_far += size
        return size

    def last_bytes(self, size: int) -> bytes | None:
        """The last bytes of a local file as it is now; None for others, where that would be another request."""
        if not isinstance(self._file, FileIO) or self.size < size:
            return None
        with as_source_errors(self._url, self.name):
            return os.pread(self._file.fileno(), size, self.size - size)

    def restart(self) -> None:
        """Go back to the first byte of a local file."""
        with as_source_errors(self._url, self.name):
            self._file.seek(0)
        self.read_so_far = 0

    def check_whole(self) -> None:
        """The file must be as long as it was when it was opened."""
        if self.read_so_far != self.size:
            raise SourceError(
                f"{self.name}: {self.size} bytes long when opened, but {self.read_so_far} were read: it is being changed"
            )

    def close(self) -> None:
        self._file.close()


class _Plain:
    """A file as stored; its crc32c is computed on the way."""

    is_gzip = False

    def __init__(self, file: _File, first: bytes) -> None:
        from google_crc32c import extend

        self.size = file.size
        self._file = file
        self._extend = extend
        self._crc = int(extend(0, first))
        self._pending = memoryview(first)

    def read_into(self, target: memoryview) -> int:
        filled = min(len(target), len(self._pending))
        target[:filled] = self._pending[:filled]
        self._pending = self._pending[filled:]
        while filled < len(target):
            size = self._file.read_into(target[filled : filled + _PIECE_BYTES])
            if not size:
                break
            self._crc = int(self._extend(self._crc, np.frombuffer(target[filled : filled + size], dtype=np.uint8)))
            filled += size
        return filled

    def expect(self, content_bytes: int) -> None:
        pass

    def finish(self) -> None:
        if self._pending or self._file.read(1):
            raise SourceError(f"{self._file.name}: bytes follow the last frame")
        self._file.check_whole()

    def fingerprint(self) -> Fingerprint:
        return plain_fingerprint(self.size, self._crc)

    def close(self) -> None:
        self._file.close()


class _Gzip:
    """What a gzip file holds, member after member; zlib checks crc32 and length of each."""

    is_gzip = True

    def __init__(self, file: _File, first: bytes) -> None:
        from google_crc32c import extend

        self.size = file.size
        self._file = file
        self._extend = extend
        self._crc = int(extend(0, first))
        self._zlib = _zlib()
        self._pending = memoryview(first)
        self._tail = first[-GZIP_TRAILER_BYTES:]
        self._produced = 0
        self._empty_members = 0
        self._member_is_empty = False
        self._members = 0
        self._single: _SingleMember | None = None
        self._start_member()

    def read_into(self, target: memoryview) -> int:
        if self._single is not None:
            return self._single.read_into(target)
        filled = 0
        while filled < len(target):
            piece = self._inflate(min(len(target) - filled, _PIECE_BYTES))
            if not piece:
                break
            target[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled

    def expect(self, content_bytes: int) -> None:
        """Read the rest through `_SingleMember` where that finds everything that is found here.

        It tolerates zeros after a member and any number of empty ones. The file's last 8 bytes tell a length of
        exactly what was declared, and what came so far is of the first member: so there is one member, which ends
        with the file. What looks otherwise, damaged files and those of several members, stays here.
        """
        trailer = self._file.last_bytes(GZIP_TRAILER_BYTES)
        is_single = (
            trailer is not None
            and content_bytes % 2**32 != 0
            and trailer_covers(trailer, content_bytes)
            and self._members == 1
            and self._file.read_so_far <= _READ_BYTES
        )
        if trailer is None or not is_single or not hasattr(self._zlib, "_GzipReader"):
            return
        self._file.restart()
        self._single = _SingleMember(self._file, self._zlib, trailer)
        scratch = memoryview(bytearray(min(self._produced, _PIECE_BYTES)))
        for start in range(0, self._produced, _PIECE_BYTES):
            self._single.read_into(scratch[: self._produced - start])

    def finish(self) -> None:
        if self._single is not None:
            self._single.finish()
            return
        declared, excess = self._produced, 0
        while excess <= _MAX_EXCESS_BYTES and (piece := self._inflate(_PIECE_BYTES)):
            excess += len(piece)
        if excess:
            raise _excess(self._file, excess, declared)
        self._file.check_whole()

    def fingerprint(self) -> Fingerprint:
        if self._single is not None:
            return gzip_fingerprint(self.size, self._single.trailer)
        if trailer_covers(self._tail, self._produced):
            return gzip_fingerprint(self.size, self._tail)
        return plain_fingerprint(self.size, self._crc)

    def close(self) -> None:
        self._file.close()

    def _inflate(self, limit: int) -> bytes:
        """The next bytes, at most `limit`; none after the last member."""
        while True:
            if self._member.eof and not self._next_member():
                return b""
            has_input = bool(self._pending) or self._refill()
            feed = self._pending[:_FEED_BYTES]
            piece = self._decompress(feed, limit)
            rest = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            self._pending = self._pending[len(feed) - len(rest) :]
            if piece:
                self._produced += len(piece)
                self._member_is_empty = False
                return piece
            if not has_input and not self._member.eof:
                raise SourceError(
                    f"{self._file.name}: the gzip stream ends early, after {self._file.read_so_far} bytes of the file "
                    f"and {self._produced} bytes of data: the file is cut short"
                )

    def _decompress(self, feed: memoryview, limit: int) -> bytes:
        try:
            piece: bytes = self._member.decompress(feed, limit)
        except self._zlib.error as error:
            raise _damaged(self._file, error, self._produced) from error
        return piece

    def _next_member(self) -> bool:
        """Start the next member; False at the end of the file."""
        while len(self._pending) < len(GZIP_MAGIC):
            kept = bytes(self._pending)
            if not self._refill():
                self._pending = memoryview(kept)
                break
            self._pending = memoryview(kept + bytes(self._pending))
        if not self._pending:
            return False
        if self._pending[: len(GZIP_MAGIC)] != GZIP_MAGIC:
            offset = self._file.read_so_far - len(self._pending)
            raise SourceError(
                f"{self._file.name}: the gzip stream ends at byte {offset} of {self.size}, and what follows is not gzip"
            )
        self._start_member()
        return True

    def _start_member(self) -> None:
        self._empty_members += self._member_is_empty
        if self._empty_members > _MAX_EMPTY_MEMBERS:
            raise SourceError(f"{self._file.name}: more than {_MAX_EMPTY_MEMBERS} gzip members that hold nothing")
        self._members += 1
        self._member_is_empty = True
        self._member = self._zlib.decompressobj(wbits=_GZIP_WBITS)

    def _refill(self) -> bool:
        chunk = self._file.read(_READ_BYTES)
        self._tail = (self._tail + chunk[-GZIP_TRAILER_BYTES:])[-GZIP_TRAILER_BYTES:]
        self._crc = int(self._extend(self._crc, chunk))
        self._pending = memoryview(chunk)
        return bool(chunk)


class _SingleMember:
    """A file that is one gzip member, decompressed straight into the caller's memory; a tenth faster than piece by piece.

    python-zlib-ng's reader behind `gzip_ng.open` checks crc32 and length; bytes are counted here.
    """

    def __init__(self, file: _File, zlib: Any, trailer: bytes) -> None:
        self.trailer = trailer
        self._file = file
        # BadGzipFile is an OSError; a header longer than the reader's buffer is an OverflowError.
        self._errors = (zlib.error, EOFError, OSError, OverflowError)
        self._produced = 0
        self._compressed = _Compressed(file)
        self._reader = zlib._GzipReader(self._compressed, _AHEAD_BYTES)

    def read_into(self, target: memoryview) -> int:
        filled = 0
        while filled < len(target) and (size := self._decompress(target[filled:])):
            filled += size
        return filled

    def finish(self) -> None:
        declared, excess = self._produced, 0
        scratch = memoryview(bytearray(_AHEAD_BYTES))
        while excess <= _MAX_EXCESS_BYTES and (size := self._decompress(scratch)):
            excess += size
        if excess:
            raise _excess(self._file, excess, declared)
        self._file.check_whole()
        if self._compressed.tail != self.trailer:
            raise SourceError(
                f"{self._file.name}: its last bytes are others than when it was opened: it is being changed"
            )

    def _decompress(self, target: memoryview) -> int:
        try:
            size: int = self._reader.readinto(target)
        except SourceError:
            raise
        except self._errors as error:
            raise _damaged(self._file, error, self._produced) from error
        self._produced += size
        return size


class _Compressed(RawIOBase):
    """The file as the reader wants it, a proper Python file; keeps the last 8 bytes that were read."""

    def __init__(self, file: _File) -> None:
        self.tail = b""
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view = memoryview(target)
        size = self._file.read_into(view)
        self.tail = (self.tail + bytes(view[max(0, size - GZIP_TRAILER_BYTES) : size]))[-GZIP_TRAILER_BYTES:]
        return size


def _damaged(file: _File, error: Exception, produced: int) -> SourceError:
    reason = str(error).rpartition(": ")[2]
    return SourceError(f"{file.name}: the gzip data are damaged ({reason}), found after {produced} bytes of data")


def _excess(file: _File, excess: int, declared: int) -> SourceError:
    return SourceError(
        f"{file.name}: {'more than ' if excess > _MAX_EXCESS_BYTES else ''}{excess} bytes follow the {declared} "
        "that the header declares: its sizes or the place of its voxels are wrong"
    )


def _zlib() -> Any:
    """zlib-ng decodes 2.5 times as fast as zlib and has the same interface."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        import zlib

        return zlib
    return zlib_ng
