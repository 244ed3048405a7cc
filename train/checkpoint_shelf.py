"""Where checkpoints lie: a folder, where a rename makes one visible, or a bucket, where its manifest does.

A checkpoint is written under a token that nobody else has. On a disk that is a folder of another name, which is renamed; a
bucket renames nothing, so its files go to `step-40/<token>/`, and the manifest, put last, says which token counts. What
has no manifest is not there, and is removed by the next checkpoint. One run writes to a place at a time.
"""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from fmristream.errors import CorruptDataError, ObjectExistsError, ObjectMissingError, UsageError
from fmristream.storage import Store, display_url
from fmristream.storage.store import is_key, open_replacing_store
from fmristream.storage.urls import local_path, scheme_of, without_credentials
from train.checkpoint_manifest import MANIFEST, Folder, read_manifest
from train.files import flush

_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_UNFINISHED = ".unfinished-"
_NOTES = "attempts"
# Of a file, read or written at once.
_PIECE_BYTES = 8 * 2**20


def _anybody() -> None:
    """Nobody else writes here."""


class Shelf(Protocol):
    """A place for the checkpoints of one run."""

    @property
    def where(self) -> str:
        """Its path or URL, as it may be shown."""

    def steps(self) -> list[int]:
        """Steps that something is there of, newest first; whether they are whole is not looked at."""

    def folder(self, name: str) -> Folder:
        """The checkpoint `step-N`."""

    def place(self, token: str, name: str) -> str:
        """Where a file lies in its checkpoint's folder."""

    def write(self, step: int, token: str, *, name: str, data: bytes) -> None:
        """Put a file where nobody sees it yet; it is durable on return."""

    def unfinished(self, step: int, token: str) -> Folder:
        """What was written under a token, to be read back."""

    def publish(self, step: int, token: str, manifest: bytes, *, may: Callable[[], None] = _anybody) -> None:
        """Make what was written under the token the checkpoint of that step, in place of one that is there.

        `may` is asked at the last moment, and raises where it must not be.
        """

    def replace_manifest(self, step: int, manifest: bytes) -> None:
        """Put another manifest in place of a checkpoint's; one of the two is there at any time."""

    def remove(self, step: int) -> None:
        """Take a checkpoint out of sight, then its files."""

    def remove_unfinished(self, *, keep: str = "") -> None:
        """Remove what killed writers left, but not what is written under the token `keep`."""

    def notes(self) -> list[str]:
        """Names of the notes that attempts left (train/fence.py)."""

    def leave_note(self, name: str) -> None:
        """Add a note; it is durable on return."""


def open_shelf(place: str | os.PathLike[str]) -> Shelf:
    """The place behind a path or URL.

    Raises:
        UsageError: it holds credentials, or is no folder in a bucket.
    """
    url = os.fspath(place)
    if scheme_of(without_credentials(url)) == "file":
        return LocalShelf(Path(local_path(url)))
    base, _, name = url.rstrip("/").rpartition("/")
    if not base.partition("://")[2] or not is_key(name):
        raise UsageError(
            f"{display_url(url)}: checkpoints are kept in a folder of a bucket, whose name has letters, digits, '.', '_' and "
            "'-'; give s3://bucket/folder"
        )
    return ObjectShelf(open_replacing_store(base), name)


def step_of(name: str) -> int | None:
    """40 of `step-40`; None for other names."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def where(self) -> str:
        return str(self._path)

    def read(self, name: str) -> bytes:
        path = self._file(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise CorruptDataError(f"{path}: cannot be read: {error.strerror}") from error

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        path = self._file(name)
        try:
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
        except OSError as error:
            raise CorruptDataError(f"{path}: cannot be read: {error.strerror}") from error

    def _file(self, name: str) -> Path:
        return self._path / _inside(name, self.where)


class LocalShelf:
    """A folder on a disk that every rank sees."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def where(self) -> str:
        return str(self._root)

    def steps(self) -> list[int]:
        if not self._root.is_dir():
            return []
        found = (step_of(path.name) for path in self._root.iterdir() if path.is_dir())
        return sorted((step for step in found if step is not None), reverse=True)

    def folder(self, name: str) -> LocalFolder:
        return LocalFolder(self._root / name)

    def place(self, token: str, name: str) -> str:
        return name

    def write(self, step: int, token: str, *, name: str, data: bytes) -> None:
        folder = self._unfinished(step, token)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / name, data)

    def unfinished(self, step: int, token: str) -> LocalFolder:
        return LocalFolder(self._unfinished(step, token))

    def publish(self, step: int, token: str, manifest: bytes, *, may: Callable[[], None] = _anybody) -> None:
        unfinished, final = self._unfinished(step, token), self._root / f"step-{step}"
        _write(unfinished / MANIFEST, manifest)  # into the folder of the files: if somebody removed it, there is none
        _require_same(self.unfinished(step, token).read(MANIFEST), manifest, f"{unfinished}/{MANIFEST}")
        flush(unfinished)
        may()
        if final.exists():  # a damaged one that this run fell back from and has now reached again
            self._set_aside(final)
        unfinished.rename(final)
        flush(self._root)

    def replace_manifest(self, step: int, manifest: bytes) -> None:
        folder = self._root / f"step-{step}"
        beside = folder / f"{_UNFINISHED}{uuid.uuid4().hex[:8]}"
        try:
            _write(beside, manifest)
            beside.replace(folder / MANIFEST)
        finally:
            beside.unlink(missing_ok=True)
        flush(folder)

    def remove(self, step: int) -> None:
        shutil.rmtree(self._set_aside(self._root / f"step-{step}"))

    def remove_unfinished(self, *, keep: str = "") -> None:
        for path in self._root.glob(f"{_UNFINISHED}*"):
            if not keep or not path.name.endswith(keep):
                shutil.rmtree(path)

    def notes(self) -> list[str]:
        folder = self._root / _NOTES
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    def leave_note(self, name: str) -> None:
        folder = self._root / _NOTES
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / name, b"")
        flush(folder)
        flush(self._root)

    def _unfinished(self, step: int, token: str) -> Path:
        return self._root / f"{_UNFINISHED}step-{step}-{token}"

    def _set_aside(self, folder: Path) -> Path:
        """Rename a checkpoint before its files go, so that a kill leaves no half of it."""
        return folder.rename(folder.with_name(f"{_UNFINISHED}{folder.name}-{uuid.uuid4().hex[:8]}"))


class StoredFolder:
    """The objects below a prefix of a store."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    @property
    def where(self) -> str:
        return f"{self._store.name}/{self._prefix}"

    def read(self, name: str) -> bytes:
        try:
            return self._store.read(self._key(name))
        except ObjectMissingError as error:
            raise CorruptDataError(f"{self.where}/{name}: is not there") from error

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        try:
            for start in range(0, size, _PIECE_BYTES):
                yield self._store.read_range(self._key(name), start, min(start + _PIECE_BYTES, size))
            longer = self._store.size(self._key(name))
        except ObjectMissingError as error:
            raise CorruptDataError(f"{self.where}/{name}: is not there") from error
        if longer != size:
            raise CorruptDataError(f"{self.where}/{name}: has {longer} bytes, {size} were written")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{_inside(name, self.where)}"


class ObjectShelf:
    """A prefix of a bucket, or of this process's memory."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    @property
    def where(self) -> str:
        return f"{self._store.name}/{self._prefix}"

    def steps(self) -> list[int]:
        return sorted(self._found(), reverse=True)

    def folder(self, name: str) -> StoredFolder:
        return StoredFolder(self._store, f"{self._prefix}/{name}")

    def place(self, token: str, name: str) -> str:
        return f"{token}/{name}"

    def write(self, step: int, token: str, *, name: str, data: bytes) -> None:
        view = memoryview(data)
        with self._store.stream_new(self._key(step, self.place(token, name))) as new:
            for start in range(0, len(data), _PIECE_BYTES):
                new.write(view[start : start + _PIECE_BYTES])
            new.commit()

    def unfinished(self, step: int, token: str) -> StoredFolder:
        return self.folder(f"step-{step}")

    def publish(self, step: int, token: str, manifest: bytes, *, may: Callable[[], None] = _anybody) -> None:
        may()
        try:
            self._store.put_new(self._key(step, MANIFEST), manifest)
        except ObjectExistsError:  # of a damaged one that this run fell back from and has now reached again
            self._store.replace_hint(self._key(step, MANIFEST), manifest)
        _require_same(self.folder(f"step-{step}").read(MANIFEST), manifest, f"{self.where}/step-{step}/{MANIFEST}")

    def replace_manifest(self, step: int, manifest: bytes) -> None:
        self._store.replace_hint(self._key(step, MANIFEST), manifest)

    def remove(self, step: int) -> None:
        self._store.delete(self._key(step, MANIFEST))  # first: without it nothing is seen
        for key in self._store.list(f"{self._prefix}/step-{step}"):
            self._store.delete(key)

    def remove_unfinished(self, *, keep: str = "") -> None:
        for step, names in self._found().items():
            used = self._used(step) if MANIFEST in names else ()
            if used is None:
                continue  # its manifest is damaged, and nobody knows any more which token counts
            for name in names:
                token = name.partition("/")[0]
                if name != MANIFEST and token not in used and (not keep or token != keep):
                    self._store.delete(self._key(step, name))
        for upload in self._store.unfinished():
            if upload.key.startswith(f"{self._prefix}/step-") and (not keep or keep not in upload.key.split("/")):
                self._store.discard_unfinished(upload)

    def notes(self) -> list[str]:
        return [key.rpartition("/")[2] for key in self._store.list(f"{self._prefix}/{_NOTES}")]

    def leave_note(self, name: str) -> None:
        self._store.put_new(f"{self._prefix}/{_NOTES}/{name}", b"")

    def _found(self) -> dict[int, list[str]]:
        """Names of every step's files, as far as they look like ours."""
        found: dict[int, list[str]] = {}
        beginning = f"{self._prefix}/"
        for key in self._store.list(self._prefix):  # of a bucket that is not there it raises: that is not an empty one
            folder, _, name = key.removeprefix(beginning).partition("/")
            step = step_of(folder)
            if step is not None and name:
                found.setdefault(step, []).append(name)
        return found

    def _used(self, step: int) -> set[str] | None:
        try:
            manifest = read_manifest(self.folder(f"step-{step}"))
        except CorruptDataError:
            return None
        return {listed.at.partition("/")[0] for listed in manifest.files.values()}

    def _key(self, step: int, name: str) -> str:
        return f"{self._prefix}/step-{step}/{name}"


def _inside(name: str, where: str) -> str:
    if not is_key(name):
        raise CorruptDataError(f"{where}: names a file {name!r} that would lie outside of it")
    return name


def _require_same(found: bytes, written: bytes, where: str) -> None:
    if found != written:
        raise CorruptDataError(f"{where}: reads back as something else than was written; look at the disk or the store")


def _write(path: Path, data: bytes) -> None:
    """Write a file to the disk itself, and let go of what is remembered of it: it is to be read back from there."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
