"""Where a dataset's objects live: four verbs per back end, and the little housekeeping around them.

An object is written once, under a name that nobody wrote before, and becomes visible whole or not at all:

- `put_new`: a small object, created exclusively;
- `stream_new`: a large one, written piece by piece, published by an explicit `commit()`;
- `read_range` (and `read`): exactly the bytes that were asked for, or an error;
- `replace_hint`: the only object that is ever overwritten, and that nothing depends on.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self, TypeVar

from fmristream.errors import (
    AccessError,
    CorruptDataError,
    ObjectExistsError,
    ObjectMissingError,
    StorageError,
    UsageError,
)
from fmristream.storage.filesystem import client_errors
from fmristream.storage.urls import redacted, scheme_of, without_query

T = TypeVar("T")
Data = TypeVar("Data", bytes, memoryview)

# Small objects of one run whose answers are awaited at once.
_PUTS_AT_ONCE = 8

# What a name may consist of: nothing that a file system, a bucket, a client's pattern or a URL gives a meaning to.
_KEY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """An object that somebody began to write; of a killed writer nobody will publish or discard it."""

    key: str
    upload: str  # the server's name of it


class NewObject(Protocol):
    """An object being written; leaving the `with` block without `commit()` discards it."""

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""

    def commit(self) -> None:
        """Make the object durable and visible under its name."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class Store(Protocol):
    """A folder or bucket prefix that holds one dataset; keys are '/'-separated and relative to it."""

    @property
    def name(self) -> str:
        """The URL as it may be shown: no credentials, no query."""

    def put_new(self, key: str, data: bytes) -> None:
        """Create an object; ObjectExistsError if the name is taken."""

    def stream_new(self, key: str) -> NewObject:
        """Start an object that is written piece by piece."""

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop); ObjectMissingError, or CorruptDataError where the object is shorter."""

    def read(self, key: str) -> bytes:
        """A whole object; ObjectMissingError if there is none."""

    def replace_hint(self, key: str, data: bytes) -> None:
        """Create or overwrite a small object atomically."""

    def size(self, key: str) -> int:
        """Size in bytes; ObjectMissingError if there is no such object."""

    def list(self, prefix: str) -> list[str]:
        """Sorted keys below a prefix (a folder name without the final slash)."""

    def delete(self, key: str) -> None:
        """Remove an object; no error if it is gone."""

    def unfinished(self) -> Sequence[Unfinished]:
        """Objects that are being written, or were when their writer died, as far as `list` does not tell of them."""

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        """Free what was stored of an object that will not be published; no error if it is gone or published."""

    def keeps_removed(self) -> bool | None:
        """Whether the store keeps old versions of what is removed; None if it cannot be told."""


def put_all(store: Store, objects: Mapping[str, bytes]) -> None:
    """Create several small objects that nothing names yet; after an error any of them may be there.

    On a disk they become durable together, in place of one after the other; from elsewhere the answers are awaited together.
    """
    from fmristream.storage.local import LocalStore

    if isinstance(store, LocalStore):
        store.put_all(objects)
        return
    with ThreadPoolExecutor(_PUTS_AT_ONCE, thread_name_prefix="fmristream-put") as threads:
        puts = [threads.submit(store.put_new, key, data) for key, data in objects.items()]
    for put in puts:  # all have ended: whoever cleans up meets no object that comes later
        put.result()


def open_store(url: str) -> Store:
    """The store behind a URL: a local folder, `memory://`, `s3://`, or read-only any other scheme that fsspec reads.

    Raises:
        UsageError: the URL names no folder or an unknown scheme, or has a query.
        MissingExtraError: the client for the scheme is not installed.
    """
    from fmristream.storage import local, remote, s3

    if not isinstance(url, str):
        raise UsageError(
            f"the dataset URL is {url!r}; give text: a folder, as str(path), or a URL such as s3://bucket/dataset"
        )
    if not url.strip():
        raise UsageError("the dataset URL is empty; give a folder or a URL such as s3://bucket/dataset")
    scheme = scheme_of(without_query(url))
    if scheme == "file":
        return local.LocalStore(url)
    if scheme == "memory":
        return remote.MemoryStore(url)
    if scheme == "s3":
        return s3.S3Store(url)
    if scheme in ("http", "https"):
        return remote.HttpStore(url)
    return remote.ReadOnlyStore(url)


def open_replacing_store(url: str) -> Store:
    """A store for objects whose names nobody else makes up: any scheme that fsspec writes will do, and puts may replace.

    Raises:
        UsageError: as `open_store`.
        MissingExtraError: the client for the scheme is not installed.
    """
    from fmristream.storage import remote

    if scheme_of(without_query(url)) in ("file", "memory", "s3", "http", "https"):
        return open_store(url)
    return remote.ReplacingStore(url)


def is_key(key: str) -> bool:
    """Whether a name can be one of a dataset's objects: it stays inside the store and means the same to every client."""
    return _KEY.fullmatch(key) is not None and not any(part in (".", "..") for part in key.split("/"))


@lru_cache(maxsize=4096)
def checked_key(key: str) -> str:
    """The key itself, after a look that it is one."""
    if not is_key(key):
        raise CorruptDataError(f"object name {key!r} leaves the dataset folder; the table that names it is not ours")
    return key


def whole_range(data: Data, *, store: str, key: str, start: int, stop: int) -> Data:
    """The data, if it has the length that was asked for."""
    if len(data) != stop - start:
        raise CorruptDataError(
            f"{store}/{key}: bytes {start} to {stop} were asked for and {len(data)} came; "
            "the object is cut short: restore it from a copy or convert the run again"
        )
    return data


def translated(store: str, key: str, action: Callable[[], T]) -> T:
    """Run an I/O action; what goes wrong becomes our error and names the object."""
    try:
        return action()
    except (ObjectExistsError, ObjectMissingError, AccessError, CorruptDataError):
        raise
    except FileExistsError as error:
        raise ObjectExistsError(f"{store}/{key}: exists already and is written only once") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectMissingError(
            f"{store}/{key}: there is no such object; check the URL, or restore the object from a copy"
        ) from error
    except PermissionError as error:
        raise access_refused(f"{store}/{key}", _said(error)) from error
    except client_errors() as error:
        raise StorageError(f"{store}/{key}: {_said(error)}") from error


def access_refused(what: str, said: str) -> AccessError:
    """The error for an object that a store does not hand out.

    Args:
        what: the object.
        said: the store's own words, without secrets.
    """
    return AccessError(
        f"{what}: access is refused: {said}; credentials or permissions may be missing, expired or withdrawn: renew them, "
        "then go on from here or from the last saved state"
    )


def _said(error: BaseException) -> str:
    return redacted(str(getattr(error, "strerror", None) or error))


def is_denied(error: StorageError) -> bool:
    """Whether the store refused access: what a bucket that forbids listing answers for objects that are not there."""
    cause = error.__cause__
    return isinstance(error, AccessError) or isinstance(cause, PermissionError) or getattr(cause, "status", None) == 403
