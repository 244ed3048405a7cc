"""A bounded folder of chunks that were fetched before: read through, verified each time, shared by processes, safe to lose.

A file is a chunk and its crc32c behind it; its name is a hash of where the chunk is from, so it says nothing of subjects.
Files appear whole, under their name, or not at all. Whatever is damaged or cut short counts as absent.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import google_crc32c
import numpy as np

from fmristream.errors import UsageError
from fmristream.storage.store import NewObject, Store, Unfinished

_CRC_BYTES = 4
# Parts of the limit that one process writes before it looks at the folder again, and that are freed below the limit.
_LOOK_AFTER = 1 / 32
_FREED = 1 / 16
# What a killed process left unfinished.
_ABANDONED_S = 3600
# How old the time of last use may be before it is set anew: each time would double the work of a hit.
_USED_S = 600

# What is ours in the folder: AB/CDEF... of a sha256, and tmp/... of 16 random bytes.
_FOLDER, _CHUNK, _SCRATCH = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{62}"), re.compile("[0-9a-f]{32}")

_log = logging.getLogger(__name__)


class DiskCache:
    """Chunks in a folder; used from any number of threads and processes at once.

    Where the disk is full or may not be written, nothing more is kept, and that is said once.

    Args:
        path: the folder; made where it is missing.
        limit_bytes: of all files. Processes that write at the same time may pass it by 1/32 each, until one of them looks.
    """

    def __init__(self, path: str | os.PathLike[str], limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise UsageError(f"cache_bytes {limit_bytes}: expected 1 or more")
        self.path = Path(path)
        self.limit_bytes = limit_bytes
        self.hits = 0
        self.misses = 0
        self._lock = Lock()
        self._written = 0
        self._look_after = 0  # look at the first write
        self._is_writing = True
        self._is_made = False

    def __reduce__(self) -> tuple[Any, ...]:
        return DiskCache, (str(self.path), self.limit_bytes)

    def get(self, store: str, key: str, start: int, stop: int) -> bytes | None:
        """A chunk that is there and whole; else None, and what is damaged is removed."""
        path = self._file(store, key, start, stop)
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read()
                is_whole = len(data) == stop - start + _CRC_BYTES and _crc(data[:-_CRC_BYTES]) == data[-_CRC_BYTES:]
                if is_whole and time.time() - os.fstat(file.fileno()).st_mtime > _USED_S:
                    with suppress(OSError):
                        os.utime(path)
        except OSError:
            self.misses += 1
            return None
        if not is_whole:
            self.misses += 1
            with suppress(OSError):
                os.unlink(path)
            return None
        self.hits += 1
        return data[:-_CRC_BYTES]

    def put(self, store: str, key: str, start: int, stop: int, data: bytes | memoryview) -> None:
        """Keep a chunk, if there is room for it."""
        if not self._is_writing or len(data) + _CRC_BYTES > self.limit_bytes:
            return
        with self._lock:
            self._written += len(data) + _CRC_BYTES
            is_due = self._written >= self._look_after
            if is_due:
                self._written, self._look_after = 0, int(self.limit_bytes * _LOOK_AFTER)
        if is_due:
            self._evict(room=int(self.limit_bytes * _LOOK_AFTER) + len(data))
        try:
            self._write(self._file(store, key, start, stop), data)
        except OSError as error:
            self._stop(error)

    def drop(self, store: str, key: str, start: int, stop: int) -> None:
        """Forget a chunk: it was damaged before it came here."""
        with suppress(OSError):
            os.unlink(self._file(store, key, start, stop))

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        if not self._is_made:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold data of people
            (self.path / "tmp").mkdir(exist_ok=True)
            self._is_made = True
        scratch = self.path / "tmp" / secrets.token_hex(16)
        try:
            with open(scratch, "xb", buffering=0) as file:
                left = memoryview(bytes(data) + _crc(data))
                while left:
                    left = left[file.write(left) :]
            path.parent.mkdir(exist_ok=True)
            os.rename(scratch, path)
        except OSError:
            with suppress(OSError):
                os.unlink(scratch)
            raise

    def _stop(self, error: OSError) -> None:
        """Keep nothing more."""
        with self._lock:
            is_first, self._is_writing = self._is_writing, False
        if is_first:
            _log.warning(
                "the cache in %s cannot be written (%s); going on without it: what is not in it yet is fetched each time",
                self.path,
                error.strerror or type(error).__name__,
            )

    def _evict(self, *, room: int) -> None:
        """Remove what was used longest ago, until there is room; one process at a time does it."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold data of people
            with open(self.path / "lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove_oldest(room)
        except BlockingIOError:
            return
        except OSError as error:
            self._stop(error)

    def _remove_oldest(self, room: int) -> None:
        files = []
        for path in self._own_files():
            with suppress(OSError):  # removed by another process
                state = path.lstat()
                if path.parent.name != "tmp":
                    files.append((state.st_mtime, state.st_size, path))
                elif time.time() - state.st_mtime > _ABANDONED_S:
                    path.unlink()
        total = sum(size for _, size, _ in files)
        if total + room <= self.limit_bytes:
            return
        goal = max(0, self.limit_bytes - room - int(self.limit_bytes * _FREED))
        for _, size, path in sorted(files):
            if total <= goal:
                break
            with suppress(OSError):
                path.unlink()
            total -= size

    def _own_files(self) -> Iterator[Path]:
        """Files that have a name of ours: the folder may hold other things, which are not ours to remove."""
        for folder in self.path.iterdir():
            pattern = _SCRATCH if folder.name == "tmp" else _CHUNK if _FOLDER.fullmatch(folder.name) else None
            if pattern is not None and folder.is_dir() and not folder.is_symlink():
                yield from (path for path in folder.iterdir() if pattern.fullmatch(path.name))

    def _file(self, store: str, key: str, start: int, stop: int) -> Path:
        name = hashlib.sha256(f"{store}\n{key}\n{start}-{stop}".encode()).hexdigest()
        return self.path / name[:2] / name[2:]


def _crc(data: bytes | memoryview) -> bytes:
    return int(google_crc32c.value(np.frombuffer(data, dtype=np.uint8))).to_bytes(_CRC_BYTES, "little")


# Folders of a dataset whose objects are written once under random names, and are read again and again.
_LASTING = ("runs/", "index/", "stats/")


class CachedStore:
    """A store whose vectors, index blocks and spaces are read through a cache; frames go there by the fetcher."""

    def __init__(self, inner: Store, cache: DiskCache) -> None:
        self.inner = inner
        self.cache = cache

    @property
    def name(self) -> str:
        return self.inner.name

    def read(self, key: str) -> bytes:
        if not key.startswith(_LASTING):
            return self.inner.read(key)
        size = self.cache.get(self.name, f"{key} size", 0, 8)  # of objects that are read whole nobody else knows it
        if size is not None:
            data = self.cache.get(self.name, key, 0, int.from_bytes(size, "little"))
            if data is not None:
                return data
        data = self.inner.read(key)
        self.cache.put(self.name, key, 0, len(data), data)
        self.cache.put(self.name, f"{key} size", 0, 8, len(data).to_bytes(8, "little"))
        return data

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        data = self.cache.get(self.name, key, start, stop) if stop > start else b""
        if data is None:
            data = self.inner.read_range(key, start, stop)
            self.cache.put(self.name, key, start, stop, data)
        return data

    def forget(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Drop what was read whole, or a range of it: whoever read it found it damaged."""
        if stop is None:
            size = self.cache.get(self.name, f"{key} size", 0, 8)
            stop = 0 if size is None else int.from_bytes(size, "little")
        self.cache.drop(self.name, key, start, stop)

    def put_new(self, key: str, data: bytes) -> None:
        self.inner.put_new(key, data)

    def stream_new(self, key: str) -> NewObject:
        return self.inner.stream_new(key)

    def replace_hint(self, key: str, data: bytes) -> None:
        self.inner.replace_hint(key, data)

    def size(self, key: str) -> int:
        return self.inner.size(key)

    def list(self, prefix: str) -> list[str]:
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def unfinished(self) -> "tuple[Unfinished, ...]":
        return tuple(self.inner.unfinished())

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        self.inner.discard_unfinished(unfinished)

    def keeps_removed(self) -> bool | None:
        return self.inner.keeps_removed()
