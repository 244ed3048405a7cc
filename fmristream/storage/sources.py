"""Read what is to be converted: whole files from front to back, wherever they lie. Nothing here writes."""

import os
from collections.abc import Callable
from typing import BinaryIO, TypeVar, cast

from fmristream.errors import ObjectMissingError, StorageError
from fmristream.storage.filesystem import PART_BYTES, client_errors, filesystem
from fmristream.storage.urls import display_url, local_path, redacted, scheme_of

T = TypeVar("T")


def open_source(url: str) -> BinaryIO:
    """Open a file for reading from front to back; only `read(n)` and `close()` are promised.

    Raises:
        ObjectMissingError: there is no such file.
        StorageError: it cannot be read.
    """
    if scheme_of(url) == "file":
        return cast(BinaryIO, _named(url, lambda: open(local_path(url), "rb", buffering=0)))
    fs, path = filesystem(url)
    return cast(BinaryIO, _named(url, lambda: fs.open(path, "rb", block_size=PART_BYTES, cache_type="readahead")))


def source_size(url: str) -> int:
    """Size of a file in bytes."""
    if scheme_of(url) == "file":
        return _named(url, lambda: os.stat(local_path(url)).st_size)
    fs, path = filesystem(url)
    return int(_named(url, lambda: fs.size(path)))


def read_source_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; fewer where it ends earlier."""
    if scheme_of(url) == "file":

        def read() -> bytes:
            with open(local_path(url), "rb") as file:
                file.seek(start)
                return file.read(stop - start)

        return _named(url, read)
    fs, path = filesystem(url)
    return bytes(_named(url, lambda: fs.cat_file(path, start=start, end=stop)))


def list_source(url: str) -> list[str]:
    """Every file below a folder, as sorted '/'-separated paths relative to it; links to folders are followed once."""
    if scheme_of(url) == "file":
        return _list_local(local_path(url))
    fs, path = filesystem(url)
    root = path.rstrip("/") + "/"
    found = _named(url, lambda: fs.find(path))
    return sorted(name[len(root) :] for name in found if name.startswith(root))


def is_folder(url: str) -> bool:
    """Whether the URL names a folder (or a bucket prefix that holds something)."""
    if scheme_of(url) == "file":
        return os.path.isdir(local_path(url))
    fs, path = filesystem(url)
    return bool(_named(url, lambda: fs.isdir(path)))


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
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        found += [prefix + name for name in files]
    return sorted(found)


def _named(url: str, action: Callable[[], T]) -> T:
    """Run an I/O action; its failure names the file."""
    try:
        return action()
    except FileNotFoundError as error:
        raise ObjectMissingError(f"{display_url(url)}: there is no such file") from error
    except client_errors() as error:
        reason = redacted(str(getattr(error, "strerror", None) or error))
        raise StorageError(f"{display_url(url)}: cannot be read: {reason}") from error
