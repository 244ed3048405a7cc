"""A dataset behind an fsspec client: memory for tests and the API, anything else read-only; S3 has a module of its own."""

import errno
import threading
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, Self

from fmristream.errors import ObjectExistsError, UsageError
from fmristream.storage.async_reads import AsyncReads, ClientReads, HttpReads, wait_for
from fmristream.storage.filesystem import PART_BYTES, filesystem
from fmristream.storage.obstore_reads import obstore_reads
from fmristream.storage.retry import RetryPolicy, persistently
from fmristream.storage.store import NewObject, Unfinished, checked_key, translated, whole_range
from fmristream.storage.urls import display_url


class ReadOnlyStore:
    """Any store that fsspec reads; writing needs exclusive creation, which is known for file, memory and S3 only."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, path = filesystem(url)
        self._root = path.rstrip("/")

    @property
    def name(self) -> str:
        return display_url(self._url).rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        # Clients hold sockets and an event loop: another process opens its own.
        return type(self), (self._url,)

    def put_new(self, key: str, data: bytes) -> None:
        raise UsageError(f"{self.name}: datasets are written to local folders and s3:// only; choose such a target")

    def stream_new(self, key: str) -> NewObject:
        raise UsageError(f"{self.name}: datasets are written to local folders and s3:// only; choose such a target")

    def replace_hint(self, key: str, data: bytes) -> None:
        raise UsageError(f"{self.name}: datasets are written to local folders and s3:// only; choose such a target")

    def async_reads(self) -> AsyncReads | None:
        """How ranges are read on the event loop; None where the client knows no such way."""
        if (fast := obstore_reads(self._url, self.name)) is not None:
            return fast
        if not getattr(self._fs, "async_impl", False):
            return None
        return ClientReads(self._fs, self._root, self.name, retries=False)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        path = self._path(key)

        def read() -> bytes:
            try:
                return bytes(self._fs.cat_file(path, start=start, end=stop))
            except OSError as error:
                if error.errno == errno.EINVAL:  # S3's answer to a range that begins behind the end
                    return b""
                raise

        data = translated(self.name, key, read)
        return whole_range(data, store=self.name, key=key, start=start, stop=stop)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        return translated(self.name, key, lambda: bytes(self._fs.cat_file(path)))

    def size(self, key: str) -> int:
        path = self._path(key)
        return translated(self.name, key, lambda: int(self._fs.info(path)["size"]))

    def list(self, prefix: str) -> list[str]:
        path = self._path(prefix)
        found = translated(self.name, prefix, lambda: self._fs.find(path))
        return sorted(name[len(self._root) + 1 :] for name in found)

    def delete(self, key: str) -> None:
        path = self._path(key)
        if translated(self.name, key, lambda: self._fs.exists(path)):
            translated(self.name, key, lambda: self._fs.rm_file(path))

    def unfinished(self) -> tuple[Unfinished, ...]:
        return ()

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        raise AssertionError("there is none")

    def keeps_removed(self) -> bool | None:
        return None

    def _path(self, key: str) -> str:
        return f"{self._root}/{checked_key(key)}"


class HttpStore(ReadOnlyStore):
    """A folder behind a web server; every read has an end, and what may pass is tried again.

    Args:
        url: of the folder.
        policy: bounds of each read.
    """

    def __init__(self, url: str, policy: RetryPolicy | None = None) -> None:
        super().__init__(url)
        self._policy = RetryPolicy() if policy is None else policy

    def __reduce__(self) -> tuple[Any, ...]:
        return HttpStore, (self._url, self._policy)

    @cached_property
    def _reads(self) -> HttpReads:
        return HttpReads(self._fs, self._root, self.name)

    def async_reads(self) -> AsyncReads:
        return self._reads

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        checked_key(key)
        return self._persistently(key, stop - start, lambda: self._reads.read(key, start, stop))

    def read(self, key: str) -> bytes:
        checked_key(key)
        return self._persistently(key, PART_BYTES, lambda: self._reads.read_whole(key))

    def _persistently(self, key: str, count: int, action: Callable[[], Awaitable[bytes]]) -> bytes:
        what = f"{self.name}/{key}"
        return wait_for(self._reads.loop, persistently(action, policy=self._policy, count=count, what=what))


class MemoryStore(ReadOnlyStore):
    """Objects in this process's memory, for the API and tests; nothing outlives the process."""

    _lock = threading.Lock()

    def put_new(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._lock:
            if self._fs.exists(path):
                raise ObjectExistsError(f"{self.name}/{key}: exists already and is written only once")
            self._fs.pipe_file(path, bytes(data))

    def stream_new(self, key: str) -> "BufferedNewObject":
        return BufferedNewObject(self, checked_key(key))

    def replace_hint(self, key: str, data: bytes) -> None:
        with self._lock:
            self._fs.pipe_file(self._path(key), bytes(data))

    def keeps_removed(self) -> bool | None:
        return False

    # fsspec walks its dictionary for all of these, and another thread may be writing to it.

    def async_reads(self) -> None:
        return None

    def list(self, prefix: str) -> list[str]:
        with self._lock:
            return super().list(prefix)

    def size(self, key: str) -> int:
        with self._lock:
            return super().size(key)

    def delete(self, key: str) -> None:
        with self._lock:
            super().delete(key)


class ReplacingStore(ReadOnlyStore):
    """Any bucket that its fsspec client writes. Nothing is created exclusively: for names that nobody else makes up."""

    def put_new(self, key: str, data: bytes) -> None:
        path = self._path(key)
        translated(self.name, key, lambda: self._fs.pipe_file(path, bytes(data)))

    def stream_new(self, key: str) -> "BufferedNewObject":
        return BufferedNewObject(self, checked_key(key))

    def replace_hint(self, key: str, data: bytes) -> None:
        self.put_new(key, data)


class BufferedNewObject:
    """An object that is collected in memory and put at `commit`."""

    def __init__(self, store: MemoryStore | ReplacingStore, key: str) -> None:
        self._store = store
        self._key = key
        self._data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self._data += data

    def commit(self) -> None:
        self._store.put_new(self._key, bytes(self._data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._data.clear()
