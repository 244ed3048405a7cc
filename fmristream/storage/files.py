"""Files as they lie, on disks, in buckets, behind web servers: whole from front to back, or a range. Nothing here writes."""

import os
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from fmristream.errors import ObjectMissingError, SourceError, StorageError, UsageError
from fmristream.storage.filesystem import PART_BYTES, client_errors, filesystem
from fmristream.storage.http_sources import HttpFile, HttpStream, http_file, http_range, http_size, http_some
from fmristream.storage.urls import display_url, local_path, redacted, scheme_of

T = TypeVar("T")

_HTTP = frozenset({"http", "https"})
# Reading only a header should not cost a whole part; four steps later the parts are whole.
_FIRST_PART_BYTES = 64 * 2**10
_GROWTH = 4
_SHORT_ANSWERS = 3


def open_file(url: str, start: int = 0, stop: int | None = None) -> BinaryIO:
    """Open a file, or bytes [start, stop) of it, from front to back; only `read(n)`, which may give less, and `close()`.

    Raises:
        ObjectMissingError: there is no such file.
        StorageError: it cannot be read.
    """
    if scheme_of(url) == "file":
        return cast(BinaryIO, _named(url, lambda: _open_local(local_path(url), start, stop)))
    if scheme_of(url) in _HTTP:
        return cast(BinaryIO, _named(url, lambda: _open_http(url, start, stop)))
    return cast(BinaryIO, _named(url, lambda: _InParts(url, _StoreParts(url), start, stop)))


def file_size(url: str) -> int:
    """Size of a file in bytes."""
    if scheme_of(url) == "file":
        return _named(url, lambda: os.stat(local_path(url)).st_size)
    if scheme_of(url) in _HTTP:
        return _named(url, lambda: http_size(url, http_file(url)))
    fs, path = filesystem(url)
    return int(_named(url, lambda: fs.size(path)))


def file_version(url: str) -> tuple[int, str]:
    """Size, and what changes when the file does, as far as the store tells; to notice a change, never to trust it."""
    if scheme_of(url) == "file":
        found = _named(url, lambda: os.stat(local_path(url)))
        return found.st_size, f"{found.st_ino}:{found.st_mtime_ns}"
    if scheme_of(url) in _HTTP:
        about = _named(url, lambda: http_file(url))
        return _named(url, lambda: http_size(url, about)), about.tag
    fs, path = filesystem(url)
    return _version(_named(url, lambda: fs.info(path)))


def read_file_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; fewer where it ends earlier."""
    if scheme_of(url) == "file":

        def read() -> bytes:
            with open(local_path(url), "rb") as file:
                file.seek(start)
                return file.read(stop - start)

        return _named(url, read)
    if scheme_of(url) in _HTTP:
        return _named(url, lambda: http_some(url, start, stop))
    fs, path = filesystem(url)
    return bytes(_named(url, lambda: fs.cat_file(path, start=start, end=stop)))


def list_files(url: str) -> list[str]:
    """Every file below a folder, as sorted '/'-separated paths relative to it; links to folders are followed once.

    Folders whose name starts with a dot (.git with its annex, .datalad, caches) are not entered.
    """
    if scheme_of(url) == "file":
        return _list_local(local_path(url))
    if scheme_of(url) in _HTTP:
        raise UsageError(f"{display_url(url)}: web servers have no listing; give one file, or a table of URLs")
    fs, path = filesystem(url)
    root = path.rstrip("/") + "/"
    found = (name[len(root) :] for name in _named(url, lambda: fs.find(path)) if name.startswith(root))
    return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")[:-1]))


def is_folder(url: str) -> bool:
    """Whether the URL names a folder (or a bucket prefix that holds something)."""
    if scheme_of(url) == "file":
        return os.path.isdir(local_path(url))
    if scheme_of(url) in _HTTP:
        return False
    fs, path = filesystem(url)
    return bool(_named(url, lambda: fs.isdir(path)))


def _open_local(path: str, start: int, stop: int | None) -> Any:
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - handed to the caller, who closes it
    if start:
        file.seek(start)
    return file if stop is None else _Limited(file, stop - start)


def _open_http(url: str, start: int, stop: int | None) -> Any:
    about = http_file(url, head_bytes=_FIRST_PART_BYTES if start == 0 else 1)
    if not about.has_ranges and start == 0 and stop is None:
        return _HttpWhole(url, about)
    return _InParts(url, _HttpParts(url, about), start, stop)


class _Limited:
    """The first bytes of what an open file has left."""

    def __init__(self, file: Any, count: int) -> None:
        self._file = file
        self._left = count

    def read(self, size: int) -> bytes:
        piece: bytes = self._file.read(min(size, self._left))
        self._left -= len(piece)
        return piece

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "_Limited":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _StoreParts:
    """Ranges of an object in a store that fsspec reads."""

    def __init__(self, url: str) -> None:
        self._fs, self._path = filesystem(url)
        self._found = _version(self._fs.info(self._path))
        self.size: int | None = self._found[0]

    def part(self, start: int, stop: int) -> bytes:
        return bytes(self._fs.cat_file(self._path, start=start, end=stop))

    def is_unchanged(self) -> bool:
        return _version(self._fs.info(self._path)) == self._found


class _HttpParts:
    """Ranges of a file behind a web server; every answer is compared with the first."""

    def __init__(self, url: str, about: HttpFile) -> None:
        self._url = url
        self._about = about
        self.size: int | None = http_size(url, about)

    def part(self, start: int, stop: int) -> bytes:
        if stop <= len(self._about.head):
            return self._about.head[start:stop]
        return http_range(self._url, start, stop, self._about)

    def is_unchanged(self) -> bool:
        return True  # each answer said so


class _InParts:
    """A remote file in parts of up to 8 MiB, one held at a time, each as long as was asked for."""

    def __init__(self, url: str, parts: Any, start: int, stop: int | None) -> None:
        self._url = url
        self._parts = parts
        self._place = start
        self._stop = parts.size if stop is None else min(stop, parts.size)
        self._wanted = _FIRST_PART_BYTES
        self._part = memoryview(b"")
        self._is_checked = False

    def read(self, size: int) -> bytes:
        if not self._part and not self._fetch():
            return b""
        piece = bytes(self._part[:size])
        self._part = self._part[len(piece) :]
        if not self._part and self._place >= self._stop:
            self._check()
        return piece

    def close(self) -> None:
        self._part = memoryview(b"")

    def __enter__(self) -> "_InParts":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fetch(self) -> bool:
        stop = min(self._place + self._wanted, self._stop)
        if stop <= self._place:
            return False
        data = _named(self._url, lambda: self._whole(self._place, stop))
        self._part = memoryview(data)
        self._place = stop
        self._wanted = min(self._wanted * _GROWTH, PART_BYTES)
        return True

    def _whole(self, start: int, stop: int) -> bytes:
        for _ in range(_SHORT_ANSWERS):
            data: bytes = self._parts.part(start, stop)
            if len(data) == stop - start:
                return data
        raise StorageError(
            f"{display_url(self._url)}: asked for bytes {start}-{stop}, {len(data)} came, {_SHORT_ANSWERS} times in a row"
        )

    def _check(self) -> None:
        if not self._is_checked and not _named(self._url, self._parts.is_unchanged):
            raise SourceError(f"{_last_name(self._url)}: it was replaced while it was read; convert it again")
        self._is_checked = True


class _HttpWhole:
    """The one answer of a server without ranges, counted."""

    def __init__(self, url: str, about: HttpFile) -> None:
        self._url = url
        self._size = about.size
        self._count = 0
        self._stream = HttpStream(url)

    def read(self, size: int) -> bytes:
        piece = _named(self._url, lambda: self._stream.read(size))
        self._count += len(piece)
        if not piece and size and self._size is not None and self._count != self._size:
            raise StorageError(
                f"{display_url(self._url)}: the server announced {self._size} bytes and sent {self._count}"
            )
        return piece

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> "_HttpWhole":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _version(info: dict[str, Any]) -> tuple[int, str]:
    tag = next((str(info[name]) for name in ("ETag", "etag", "LastModified", "updated", "mtime") if name in info), "")
    return int(info["size"]), tag


def _last_name(url: str) -> str:
    return display_url(url).rstrip("/").rpartition("/")[2]


def _list_local(root: str) -> list[str]:
    found = []
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        # Real folders before links to them, each in order of name: which of two paths a file has is the same everywhere.
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        found += [prefix + name for name in files]
    return sorted(found)


def _named(url: str, action: Callable[[], T]) -> T:
    """Run an I/O action; its failure names the file."""
    try:
        return action()
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise ObjectMissingError(f"{display_url(url)}: there is no such file") from error
    except client_errors() as error:
        reason = redacted(str(getattr(error, "strerror", None) or error))
        raise StorageError(f"{display_url(url)}: cannot be read: {reason}") from error
