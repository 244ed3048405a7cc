"""Files behind web servers: ranges where the server gives them, one answer from front to back where it does not."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fmristream.errors import SourceError, StorageError
from fmristream.storage.filesystem import client_errors, filesystem
from fmristream.storage.urls import display_url

T = TypeVar("T")

_OK, _PARTIAL, _EMPTY_RANGE = 200, 206, 416
_GONE = frozenset({404, 410})
# Worth another try; anything else (401, 403, 500-like programming errors of ours) is said at once.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.2  # doubled each time: 3 s in all
_LONGEST_PAUSE_S = 30.0
_COUNT_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpFile:
    """What a server says of a file."""

    size: int | None  # None where it does not tell
    has_ranges: bool
    tag: str  # ETag, else the date of the last change; "" where it tells neither
    head: bytes = b""  # its first bytes, where more than one was asked for and there are ranges


class _TryAgainError(Exception):
    """A failure that may pass; `pause_s` is what the server asked for."""

    def __init__(self, reason: str, *, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def http_file(url: str, *, head_bytes: int = 1) -> HttpFile:
    """Ask for the first bytes: whether there are ranges, and how long the file is, is in the answer."""
    return _persistently(url, lambda: _asked(url, head_bytes))


def http_size(url: str, about: HttpFile) -> int:
    """Size in bytes; a server that does not tell is read once, to count."""
    if about.size is not None:
        return about.size
    with HttpStream(url) as stream:
        count = 0
        while piece := stream.read(_COUNT_BYTES):
            count += len(piece)
    return count


def http_range(url: str, start: int, stop: int, about: HttpFile) -> bytes:
    """Bytes [start, stop), fewer only where the file ends earlier.

    Raises:
        SourceError: the file is no longer what `about` says.
        StorageError: the server failed, or its answer is short again and again.
    """
    if about.size is not None:
        stop = min(stop, about.size)
    if start >= stop:
        return b""
    if about.has_ranges:
        return _persistently(url, lambda: _ranged(url, start, stop, about))
    return _from_front(url, start, stop)


def http_some(url: str, start: int, stop: int) -> bytes:
    """The same of a file of which nothing is known yet, in one request where the server has ranges."""
    if start >= stop:
        return b""
    found = _persistently(url, lambda: _some(url, start, stop))
    return _from_front(url, start, stop) if found is None else found


def _from_front(url: str, start: int, stop: int) -> bytes:
    """Of a server without ranges: what comes before is read and dropped."""
    with HttpStream(url) as stream:
        _pass_over(stream, start)
        return _read_exactly(stream, stop - start)


class HttpStream:
    """One answer of a server, from front to back. A body shorter than announced is an error of the client library."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, _ = filesystem(url)
        self._response = _persistently(url, lambda: _run(self._fs, _opened(self._fs, url, {})))

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        return bytes(_run(self._fs, self._response.content.read(size)))

    def close(self) -> None:
        async def close() -> None:
            self._response.close()

        _run(self._fs, close())

    def __enter__(self) -> "HttpStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _asked(url: str, head_bytes: int) -> HttpFile:
    fs, _ = filesystem(url)

    async def ask() -> HttpFile:
        response = await _opened(fs, url, {"Range": f"bytes=0-{head_bytes - 1}"})
        try:
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if response.status in (_PARTIAL, _EMPTY_RANGE):
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                size = int(total) if total.isdecimal() else None
                head = b""
                if head_bytes > 1 and size and response.headers["Content-Range"].startswith("bytes 0-"):
                    head = await _exactly(response, min(head_bytes, size))
                return HttpFile(size=size, has_ranges=True, tag=tag, head=head)
            # A body that the server compressed on its own has another length than the file.
            is_plain = response.headers.get("Content-Encoding", "identity") == "identity"
            length = response.headers.get("Content-Length", "") if is_plain else ""
            return HttpFile(size=int(length) if length.isdecimal() else None, has_ranges=False, tag=tag)
        finally:
            response.close()

    return _run(fs, ask())


def _ranged(url: str, start: int, stop: int, about: HttpFile) -> bytes:
    fs, _ = filesystem(url)

    async def fetch() -> bytes:
        response = await _opened(fs, url, {"Range": f"bytes={start}-{stop - 1}"})
        try:
            _require_same(url, response, start, stop, about)
            return await _exactly(response, stop - start)
        finally:
            response.close()

    return _run(fs, fetch())


def _some(url: str, start: int, stop: int) -> bytes | None:
    """A range, shorter where the file ends within it; None from a server without ranges."""
    fs, _ = filesystem(url)

    async def fetch() -> bytes | None:
        response = await _opened(fs, url, {"Range": f"bytes={start}-{stop - 1}"})
        try:
            if response.status == _EMPTY_RANGE:
                return b""
            if response.status != _PARTIAL:
                return None
            said = response.headers.get("Content-Range", "")
            placed, _, total = said.removeprefix("bytes ").partition("/")
            end = min(stop, int(total)) if total.isdecimal() else stop
            if placed != f"{start}-{end - 1}":
                raise _TryAgainError(f"asked for bytes {start}-{stop - 1}, it answered with {said or 'others'}")
            return await _exactly(response, end - start)
        finally:
            response.close()

    return _run(fs, fetch())


async def _exactly(response: Any, count: int) -> bytes:
    try:
        return bytes(await response.content.readexactly(count))
    except asyncio.IncompleteReadError as error:
        raise _TryAgainError(f"its answer ends after {len(error.partial)} of {count} bytes") from error


def _require_same(url: str, response: Any, start: int, stop: int, about: HttpFile) -> None:
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    said = response.headers.get("Content-Range", "")
    placed, _, total = said.removeprefix("bytes ").partition("/")
    if (about.tag and tag and tag != about.tag) or (total.isdecimal() and about.size not in (None, int(total))):
        raise SourceError(f"{display_url(url)}: the file is being changed on its server; convert it again")
    if response.status != _PARTIAL or placed != f"{start}-{stop - 1}":
        raise _TryAgainError(f"asked for bytes {start}-{stop - 1}, it answered {response.status} with {said or 'all'}")


async def _opened(fs: Any, url: str, headers: dict[str, str]) -> Any:
    """A response whose status is good; its body is not read yet."""
    session = await fs.set_session()
    response = await session.get(fs.encode_url(url), headers=headers)
    if response.status in (_OK, _PARTIAL) or (response.status == _EMPTY_RANGE and headers):
        return response
    response.close()
    if response.status in _GONE:
        raise FileNotFoundError(url)
    said = f"the server answers {response.status} {response.reason or ''}".strip()
    if response.status in _PASSING:
        asked = response.headers.get("Retry-After", "")
        raise _TryAgainError(said, pause_s=float(asked) if asked.isdecimal() else 0.0)
    raise StorageError(f"{display_url(url)}: cannot be read: {said}")


def _persistently(url: str, action: Callable[[], T]) -> T:
    """Try again what may pass: an overloaded server, a broken connection, a short answer."""
    pause_s = _FIRST_PAUSE_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:
            if not isinstance(error, (_TryAgainError, *client_errors())):
                raise
            if attempt == _ATTEMPTS:
                # The client's own text may hold the URL with its query; its kind says enough.
                reason = str(error) if isinstance(error, _TryAgainError) else type(error).__name__
                raise StorageError(f"{display_url(url)}: {reason}, {_ATTEMPTS} times in a row") from error
            wanted = error.pause_s if isinstance(error, _TryAgainError) else 0.0
            time.sleep(min(max(pause_s, wanted), _LONGEST_PAUSE_S))
            pause_s *= 2
    raise AssertionError("the last attempt returns or raises")


def _pass_over(stream: HttpStream, count: int) -> None:
    while count and (piece := stream.read(min(count, _COUNT_BYTES))):
        count -= len(piece)


def _read_exactly(stream: HttpStream, count: int) -> bytes:
    """The next bytes; fewer only where the stream ends."""
    pieces = []
    while count and (piece := stream.read(min(count, _COUNT_BYTES))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _run(fs: Any, coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine on the client's own event loop, which runs in a thread of fsspec's."""
    return asyncio.run_coroutine_threadsafe(coroutine, fs.loop).result()
