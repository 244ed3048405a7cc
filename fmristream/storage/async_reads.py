"""Ranges of a remote store's objects, on the process's one event loop: what each kind of client needs, and what is checked."""

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fmristream.errors import CorruptDataError, ObjectMissingError, StorageError
from fmristream.storage.retry import AgainError
from fmristream.storage.store import Store, access_refused

T = TypeVar("T")

_OK, _PARTIAL, _NO_SUCH_RANGE = 200, 206, 416
_GONE = frozenset({404, 410})
_REFUSED = frozenset({401, 403})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# Of an answer, before its connection is told to wait: by default 64 KiB, two wake-ups for each of them.
_BUFFER_BYTES = 2**20
# Objects whose first answer is remembered: an ETag and a length, some 200 bytes each.
_REMEMBERED = 65_536


class AsyncReads(Protocol):
    """One attempt to read a range."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where `read` runs."""
        ...

    @property
    def retries(self) -> bool:
        """Whether the client tries again by itself, with bounds of its own: then nobody else does."""
        ...

    async def read(self, key: str, start: int, stop: int) -> bytes | memoryview:
        """Bytes [start, stop), all of them.

        Raises:
            AgainError: a failure that may pass.
            AccessError: the store refuses access.
            CorruptDataError: the object was replaced since it was first read, or ends before.
            ObjectMissingError: it is gone.
            StorageError: a failure that stays.
        """
        ...


def reads_of(store: Store) -> AsyncReads | None:
    """How a store is read asynchronously; None for those that are read in place: local folders, memory, wrappers."""
    make = getattr(store, "async_reads", None)
    found: AsyncReads | None = make() if make is not None else None
    return found


def wait_for(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop, from a thread that is not its own."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


@dataclass(frozen=True, slots=True)
class _Seen:
    tag: str
    size: int | None


class Versions:
    """What each object was when it was first read: bytes of two versions are never mixed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def require_same(self, key: str, tag: str, size: int | None) -> None:
        """Raise CorruptDataError if an answer is of another version of the object than the first one was."""
        first = self._seen.setdefault(key, _Seen(tag, size))
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        is_other = (first.tag and tag and first.tag != tag) or (None not in (first.size, size) and first.size != size)
        if is_other:
            raise CorruptDataError(
                f"{self._name}/{key}: the object was replaced while it was read: it was {first.tag or 'without ETag'} of "
                f"{first.size} bytes and is {tag or 'without ETag'} of {size}; open the dataset again"
            )


class HttpReads:
    """Of a web server, over the session of fsspec's client."""

    retries = False

    def __init__(self, fs: Any, root: str, name: str) -> None:
        self._fs = fs
        self._root = root
        self._name = name
        self._versions = Versions(name)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._fs.loop  # type: ignore[no-any-return]

    async def read(self, key: str, start: int, stop: int) -> bytes:
        response = await self._asked(key, {"Range": f"bytes={start}-{stop - 1}"})
        try:
            said = response.headers.get("Content-Range", "")
            placed, _, total = said.removeprefix("bytes ").partition("/")
            size = int(total) if total.isdecimal() else None
            if response.status == _NO_SUCH_RANGE:
                raise CorruptDataError(
                    f"{self._name}/{key}: bytes {start} to {stop} were asked for, it has {total or 'fewer'}; "
                    "the object is cut short: restore it from a copy or convert the run again"
                )
            if response.status == _PARTIAL:
                self._versions.require_same(key, _tag(response), size)
            if response.status != _PARTIAL or placed != f"{start}-{stop - 1}":
                self._require_length(key, stop, size)
                raise AgainError(
                    f"bytes {start} to {stop} were asked for and {said or 'all'} came with status {response.status}"
                )
            return await self._body(response, stop - start)
        finally:
            response.close() if response.content.at_eof() is False else response.release()

    async def read_whole(self, key: str) -> bytes:
        """A whole object."""
        response = await self._asked(key, {})
        try:
            length = response.headers.get("Content-Length", "")
            if length.isdecimal():
                return await self._body(response, int(length))
            return bytes(await response.read())
        finally:
            response.close() if response.content.at_eof() is False else response.release()

    def _require_length(self, key: str, stop: int, size: int | None) -> None:
        if size is not None and size < stop:
            raise CorruptDataError(
                f"{self._name}/{key}: bytes up to {stop} were asked for, it has {size}; the object is cut short: restore it "
                "from a copy or convert the run again"
            )

    async def _asked(self, key: str, headers: dict[str, str]) -> Any:
        session = await self._fs.set_session()
        url = self._fs.encode_url(f"{self._root}/{key}")
        response = await session.get(url, headers=headers, read_bufsize=_BUFFER_BYTES)
        if response.status in (_OK, _PARTIAL) or (response.status == _NO_SUCH_RANGE and headers):
            return response
        response.close()
        if response.status in _GONE:
            raise ObjectMissingError(
                f"{self._name}/{key}: there is no such object; check the URL, or restore the object from a copy"
            )
        said = f"the server answers {response.status} {response.reason or ''}".strip()
        if response.status in _PASSING:
            asked = response.headers.get("Retry-After", "")
            raise AgainError(said, pause_s=float(asked) if asked.isdecimal() else 0.0)
        if response.status in _REFUSED:
            raise access_refused(f"{self._name}/{key}", said)
        raise StorageError(f"{self._name}/{key}: cannot be read: {said}")

    async def _body(self, response: Any, count: int) -> bytes:
        try:
            return bytes(await response.content.readexactly(count))
        except asyncio.IncompleteReadError as error:
            raise AgainError(f"the answer ends after {len(error.partial)} of {count} bytes") from error


class ClientReads:
    """Of any other asynchronous fsspec client; what it says of versions we do not see, checksums and the index do."""

    def __init__(self, fs: Any, root: str, name: str, *, retries: bool) -> None:
        self._fs = fs
        self._root = root
        self._name = name
        self.retries = retries

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._fs.loop  # type: ignore[no-any-return]

    async def read(self, key: str, start: int, stop: int) -> bytes:
        data = bytes(await self._fs._cat_file(f"{self._root}/{key}", start=start, end=stop))
        if len(data) != stop - start:
            raise AgainError(f"{stop - start} bytes were asked for and {len(data)} came")
        return data


class S3Reads:
    """Of a bucket, by the client that has its retries."""

    retries = True

    def __init__(self, fs: Any, root: str, name: str) -> None:
        self._fs = fs
        self._root = root
        self._name = name
        self._versions = Versions(name)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._fs.loop  # type: ignore[no-any-return]

    async def read(self, key: str, start: int, stop: int) -> bytes:
        data, tag, said = await self._fs._read_range(f"{self._root}/{key}", start, stop)
        placed, _, total = said.removeprefix("bytes ").partition("/")
        self._versions.require_same(key, tag, int(total) if total.isdecimal() else None)
        if len(data) != stop - start or placed != f"{start}-{stop - 1}":
            raise CorruptDataError(
                f"{self._name}/{key}: bytes {start} to {stop} were asked for and {len(data)} came, {said or 'all'}; the object "
                "is cut short, or the server does not give ranges: restore it from a copy"
            )
        return bytes(data)


def _tag(response: Any) -> str:
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
