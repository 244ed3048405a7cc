"""A dataset in a local folder: exclusive creation by link(2), durable before visible."""

import mmap
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, Self

from fmristream.storage.store import Unfinished, checked_key, translated, whole_range
from fmristream.storage.urls import local_path

# Unfinished objects wait here; what a killed process leaves in it is garbage.
SCRATCH = "tmp"

# After so many bytes the kernel is asked to begin writing them to the disk: the fsync at the end then finds little to do.
_WRITE_BEHIND_BYTES = 8 * 2**20

# Files that are mapped at a time: each holds a descriptor.
_MAPS = 64

# How often a folder is made again that another writer removes before something is in it.
_ATTEMPTS = 100


class LocalStore:
    """A folder on a file system with hard links (every POSIX one, NFS and Lustre too)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.root = Path(local_path(url))
        self._name = str(self.root)
        self._maps: OrderedDict[str, memoryview] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self._url,)  # maps are this process's

    @property
    def name(self) -> str:
        return self._name

    def put_new(self, key: str, data: bytes) -> None:
        with self.stream_new(key) as new:
            new.write(data)
            new.commit()

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        """Create several objects: all are on the disk before the first has its name, and each folder is synced once."""
        with ExitStack() as stack:
            written = []
            for key, data in objects.items():
                new = stack.enter_context(self.stream_new(key))
                new.write(data)
                written.append(new)
            for new in written:
                new.sync()
            folders = dict.fromkeys(folder for new in written for folder in new.link())
            for folder in folders:
                translated(self.name, "", partial(_sync_folder_if_there, folder))

    def stream_new(self, key: str) -> "LocalNewObject":
        return translated(self.name, key, lambda: LocalNewObject(self.root, checked_key(key)))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        def read() -> bytes:
            descriptor = os.open(self.root / checked_key(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, stop - start, start)
            finally:
                os.close(descriptor)

        return whole_range(translated(self.name, key, read), store=self.name, key=key, start=start, stop=stop)

    def open_object(self, key: str) -> "LocalObject":
        """An object to read pieces of into memory that is there already."""
        return LocalObject(self, key)

    def map_object(self, key: str, size: int) -> memoryview:
        """An object's bytes as they lie in the page cache; the maps used last are kept.

        To read memory behind the end of a file kills the process, so what is mapped is looked at first.

        Args:
            key: the object.
            size: bytes that it has to have at least.

        Raises:
            CorruptDataError: it is shorter.
        """
        with self._lock:
            held = self._maps.get(key)
            if held is not None and len(held) >= size:
                self._maps.move_to_end(key)
                return held

        def map_it() -> memoryview:
            with open(self.root / checked_key(key), "rb") as file:
                length = os.fstat(file.fileno()).st_size
                return (
                    memoryview(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)) if length else memoryview(b"")
                )

        mapped = translated(self.name, key, map_it)
        whole_range(mapped[:size], store=self.name, key=key, start=0, stop=size)
        with self._lock:
            self._maps[key] = mapped
            while len(self._maps) > _MAPS:
                self._maps.popitem(last=False)
        return mapped

    def unmap(self, key: str) -> None:
        """Let go of a map: what it shows was damaged, and may be another file by the next time."""
        with self._lock:
            self._maps.pop(key, None)

    def read(self, key: str) -> bytes:
        return translated(self.name, key, (self.root / checked_key(key)).read_bytes)

    def replace_hint(self, key: str, data: bytes) -> None:
        def replace() -> None:
            path = self.root / checked_key(key)
            scratch = _write_scratch(self.root, data)
            try:
                os.replace(scratch, path)
            except OSError:
                scratch.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

        translated(self.name, key, replace)

    def size(self, key: str) -> int:
        return translated(self.name, key, lambda: (self.root / checked_key(key)).stat().st_size)

    def list(self, prefix: str) -> list[str]:
        folder = self.root / checked_key(prefix)
        return sorted(path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file())

    def delete(self, key: str) -> None:
        path = self.root / checked_key(key)
        translated(self.name, key, lambda: path.unlink(missing_ok=True))
        _remove_empty_folders(path.parent, self.root)

    def unfinished(self) -> tuple[Unfinished, ...]:
        return ()  # they lie in `tmp`, where `list` shows them

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        raise AssertionError("there is none")

    def keeps_removed(self) -> bool | None:
        return False


class LocalObject:
    """An open file; closed by the `with` block."""

    def __init__(self, store: LocalStore, key: str) -> None:
        self._store = store
        self._key = key
        path = f"{store.name}/{checked_key(key)}"
        self.descriptor = translated(store.name, key, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill memory with the bytes from `start` on.

        Raises:
            CorruptDataError: the object ends before.
        """

        def read() -> int:
            done = 0
            while done < len(view):
                count = os.preadv(self.descriptor, [view[done:] if done else view], start + done)
                if not count:
                    break
                done += count
            return done

        done = translated(self._store.name, self._key, read)
        if done != len(view):
            whole_range(view[:done], store=self._store.name, key=self._key, start=start, stop=start + len(view))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.descriptor)


class LocalNewObject:
    """A scratch file that `commit` links to its name."""

    def __init__(self, root: Path, key: str) -> None:
        self._root = root
        self._key = key
        self._file, self._scratch = _open_scratch(root)
        self._size = 0
        self._on_its_way = 0  # bytes that the disk was given

    def write(self, data: bytes | memoryview) -> None:
        translated(str(self._root), self._key, lambda: self._write(data))

    def _write(self, data: bytes | memoryview) -> None:
        _write_all(self._file, data)
        self._size += len(data)
        if self._size - self._on_its_way >= _WRITE_BEHIND_BYTES and hasattr(os, "posix_fadvise"):
            # Named for dropping clean pages, it first starts the writing of dirty ones, without waiting for it.
            length = self._size - self._on_its_way
            os.posix_fadvise(self._file.fileno(), self._on_its_way, length, os.POSIX_FADV_DONTNEED)
            self._on_its_way = self._size

    def commit(self) -> None:
        self.sync()
        for folder in self.link():
            translated(str(self._root), self._key, partial(_sync_folder_if_there, folder))

    def sync(self) -> None:
        """Have what was written on the disk."""

        def sync() -> None:
            os.fsync(self._file.fileno())
            self._file.close()

        translated(str(self._root), self._key, sync)

    def link(self) -> list[Path]:
        """Give the object its name; the folders that have to be synced for it to last."""
        return translated(str(self._root), self._key, lambda: _link(self._scratch, self._root / self._key, self._root))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):  # NFS may report a failed write here; what was committed is closed
            self._file.close()
        self._scratch.unlink(missing_ok=True)


def _open_scratch(root: Path) -> tuple[FileIO, Path]:
    """A new file that nobody else has; unbuffered, because frames come in pieces larger than a buffer."""
    folder = root / SCRATCH
    for attempts_left in reversed(range(_ATTEMPTS)):
        path = folder / secrets.token_hex(8)
        try:
            _make_folder(folder)
            return open(path, "xb", buffering=0), path
        except FileNotFoundError:  # `delete` of another writer removed the folder, empty then
            if not attempts_left:
                raise
    raise AssertionError("the last attempt returns or raises")


def _write_scratch(root: Path, data: bytes) -> Path:
    file, path = _open_scratch(root)
    with file:
        _write_all(file, data)
        os.fsync(file.fileno())
    return path


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write everything; one call may take only a part, 2 GiB at most on Linux."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


def _link(scratch: Path, path: Path, root: Path) -> list[Path]:
    """Give a file its name; FileExistsError if it is taken, which rename would not tell. Returns folders to be synced."""
    folders = [path.parent]
    for attempts_left in reversed(range(_ATTEMPTS)):
        if not path.parent.is_dir():
            # The names of new folders have to last as well.
            folders = [folder for folder in path.parents if folder == root or root in folder.parents]
        _make_folder(path.parent)
        try:
            os.link(scratch, path)
            break
        except FileNotFoundError:  # `delete` of another writer removed the folder, empty then
            if not attempts_left:
                raise
    return folders


def _make_folder(folder: Path) -> None:
    """Make a folder; it may be gone at once, where another writer removes it."""
    with suppress(FileExistsError, FileNotFoundError):  # it, or its parent, was removed while it was made
        folder.mkdir(parents=True, exist_ok=True)


def _sync_folder_if_there(folder: Path) -> None:
    with suppress(FileNotFoundError):  # the object was removed meanwhile, by who may
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty_folders(folder: Path, root: Path) -> None:
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:  # not empty, or somebody else removed it
            return
        folder = folder.parent
