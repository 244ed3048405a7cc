"""Many ranges at once: coalesced, bounded in bytes, as deep as latency and bandwidth ask for, on one event loop a process."""

import asyncio
import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count, pairwise

from fmristream.errors import FmriStreamError, StorageError
from fmristream.storage.async_reads import AsyncReads, wait_for
from fmristream.storage.cache import DiskCache
from fmristream.storage.filesystem import client_errors, event_loop
from fmristream.storage.retry import RetryPolicy, persistently
from fmristream.storage.store import Store, translated

# One request for more than that would keep what came from being decoded, and fails as a whole.
_LARGEST_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes [start, stop) of an object.

    Attributes:
        key: the object.
        start: first byte.
        stop: the byte after the last one.
        edges: where each chunk ends, rising, the last one `stop`: what a cache keeps apart.
        what: what the bytes are of, for errors: the run.
    """

    key: str
    start: int
    stop: int
    edges: tuple[int, ...]
    what: str


@dataclass(slots=True)
class Counts:
    """What was asked of the store so far."""

    requests: int = 0  # first attempts
    retries: int = 0
    bytes_fetched: int = 0  # that came from the store and were kept
    bytes_wanted: int = 0  # that callers asked for, those that several share once
    most_held_bytes: int = 0  # asked for or not yet released, at the worst moment
    most_in_flight: int = 0  # requests


class Depth:
    """How many requests are under way: what bandwidth x latency asks for, found by looking.

    While answers come as fast as ever when there are more of them, there are too few; when they only come later, the
    network or the server is full. Latencies are compared with the lowest seen; since that of yesterday's network says
    nothing of today's, it is measured anew from time to time, at half the depth.

    Args:
        start: at first.
        low: at least.
        high: at most.
    """

    _WINDOW = 8  # answers between two decisions
    _FULL = 1.5  # times the lowest latency: then answers queue somewhere
    _GROWTH = 1.25
    _ROUND = 64  # decisions until the lowest latency is measured anew

    def __init__(self, *, start: int = 16, low: int = 4, high: int = 48) -> None:
        self.now = start
        self._low = low
        self._high = high
        self._lowest_s = float("inf")
        self._latencies: list[float] = []
        self._decisions = 0

    def answered(self, latency_s: float, *, in_flight: int) -> None:
        """An answer came after so long, when so many were under way."""
        self._latencies.append(latency_s)
        self._lowest_s = min(self._lowest_s, latency_s)
        if len(self._latencies) < self._WINDOW:
            return
        middle = sorted(self._latencies)[len(self._latencies) // 2]
        self._latencies.clear()
        self._decisions += 1
        if self._decisions % self._ROUND == 0:
            self.now, self._lowest_s = max(self._low, self.now // 2), float("inf")
        elif middle > 2 * self._FULL * self._lowest_s:
            self.now = max(self._low, int(self.now / self._GROWTH))
        elif middle < self._FULL * self._lowest_s and in_flight >= self.now - 1:  # else nobody asks for more
            self.now = min(self._high, int(self.now * self._GROWTH) + 1)


class Handle:
    """One of the ranges asked for; `release` when its bytes are not looked at any more."""

    def __init__(self, fetcher: "RangeFetcher", part: "_Part", wanted: Wanted) -> None:
        self.future: Future[memoryview] = Future()
        self._fetcher = fetcher
        self._part = part
        self._wanted = wanted
        self._is_released = False

    def release(self) -> None:
        """Make room for others; what is still under way for nobody else is given up."""
        if not self._is_released:
            self._is_released = True
            self._fetcher._call(self._part.released)

    def _set(self, data: memoryview) -> None:
        if self.future.set_running_or_notify_cancel():
            start = self._wanted.start - self._part.start
            self.future.set_result(data[start : start + self._wanted.stop - self._wanted.start])

    def _fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class _Part:
    """Ranges that touch or overlap, in one request."""

    fetcher: "RangeFetcher"
    key: str
    start: int
    stop: int
    what: str
    edges: set[int]
    turn: int = 0  # see `RangeFetcher.turn`
    handles: list[Handle] = field(default_factory=list)
    users: int = 0
    task: asyncio.Task[None] | None = None
    is_admitted: bool = False
    is_over: bool = False

    @property
    def bytes(self) -> int:
        return self.stop - self.start

    def released(self) -> None:
        """One of the users is done; on the loop."""
        self.users -= 1
        if self.users == 0 and not self.is_over:
            self.is_over = True
            if self.task is not None:
                self.task.cancel()
            self.fetcher._left(self)


class RangeFetcher:
    """Fetches ranges of one store for one loader.

    Ranges are begun in the order in which they were asked for, so what a caller waits for is never behind what it has
    not asked for yet, whatever is held. Use from any thread; `close` gives up what is under way.

    Args:
        store: what `reads` reads, for messages.
        reads: how.
        limit_bytes: asked for or not yet released, beside what the earliest turn needs.
        policy: of retries, where the client has none of its own.
        cache: where chunks are looked for first, and kept.
        depth: how many requests at a time.
    """

    def __init__(
        self,
        store: Store,
        reads: AsyncReads,
        *,
        limit_bytes: int,
        policy: RetryPolicy | None = None,
        cache: DiskCache | None = None,
        depth: Depth | None = None,
    ) -> None:
        self.counts = Counts()
        self.depth = Depth() if depth is None else depth
        self._store = store
        self._reads = reads
        self._limit_bytes = limit_bytes
        self._policy = RetryPolicy() if policy is None else policy
        self._cache = cache
        # All of these are the loop's alone.
        self._waiting: list[tuple[int, int, _Part]] = []  # a heap, the earliest turn first
        self._numbers = count()
        self._parts: set[_Part] = set()
        self._held_bytes = 0
        self._in_flight = 0
        self._is_closed = False
        self._turns = count()  # asked for by any thread: next() of it is one step

    def turn(self) -> int:
        """A place in the order in which ranges are fetched, for a `submit` that comes later."""
        return next(self._turns)

    def submit(self, wanted: Sequence[Wanted], *, turn: int | None = None) -> list[Handle]:
        """Begin to fetch, neighbours together; one handle for each.

        Args:
            wanted: the ranges.
            turn: what all of them are needed for together, so that none of the earliest turn waits for room; each request
                has its own where not given.
        """
        handles: list[Handle] = []
        by_place: dict[int, Handle] = {}
        parts = []
        for part, places in _coalesced(self, wanted):
            part.turn = self.turn() if turn is None else turn
            parts.append(part)
            for place in places:
                handle = by_place[place] = Handle(self, part, wanted[place])
                part.handles.append(handle)
            part.users = len(places)
        handles = [by_place[place] for place in range(len(wanted))]
        self._call(lambda: self._enqueue(parts))
        return handles

    def close(self) -> None:
        """Give up what is under way; its handles fail."""

        async def close() -> None:
            self._is_closed = True
            self._waiting.clear()
            tasks = [part.task for part in self._parts if part.task is not None]
            for part in list(self._parts):
                part.is_over = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for part in list(self._parts):
                self._left(part)
                for handle in part.handles:
                    if not handle.future.done():
                        handle._fail(StorageError(f"{self._store.name}: the loader is closed"))

        wait_for(self._reads.loop, close())

    def _call(self, action: Callable[[], None]) -> None:
        self._reads.loop.call_soon_threadsafe(action)

    def _enqueue(self, parts: list[_Part]) -> None:
        for part in parts:
            if self._is_closed:
                for handle in part.handles:
                    handle._fail(StorageError(f"{self._store.name}: the loader is closed"))
            elif part.users:  # else everybody let go of it before it began
                heapq.heappush(self._waiting, (part.turn, next(self._numbers), part))
                self._parts.add(part)
                self.counts.bytes_wanted += part.bytes
        self._pump()

    def _pump(self) -> None:
        while self._waiting and self._in_flight < self.depth.now:
            part = self._waiting[0][-1]
            if part.is_over:
                heapq.heappop(self._waiting)
                continue
            if self._held_bytes + part.bytes > self._limit_bytes and not self._is_due(part):
                return
            heapq.heappop(self._waiting)
            part.is_admitted = True
            self._held_bytes += part.bytes
            self._in_flight += 1
            self.counts.most_held_bytes = max(self.counts.most_held_bytes, self._held_bytes)
            self.counts.most_in_flight = max(self.counts.most_in_flight, self._in_flight)
            part.task = self._reads.loop.create_task(self._run(part))
            part.task.add_done_callback(self._ended)  # also where it is given up before it began

    def _is_due(self, part: _Part) -> bool:
        """Whether nothing that is held was asked for earlier: then what is held may wait for this very part."""
        return all(part.turn <= held.turn for held in self._parts if held.is_admitted and not held.is_over)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._in_flight -= 1
        self._pump()

    def _left(self, part: _Part) -> None:
        """Nobody looks at a part any more."""
        self._parts.discard(part)
        if part.is_admitted:
            part.is_admitted = False
            self._held_bytes -= part.bytes
        self._pump()

    async def _run(self, part: _Part) -> None:
        try:
            data = memoryview(await (self._direct(part) if self._cache is None else self._cached(part, self._cache)))
        except (FmriStreamError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and not part.is_over:
                raise
            for handle in part.handles:
                handle._fail(error if isinstance(error, FmriStreamError) else StorageError("given up"))
        except BaseException as error:
            for handle in part.handles:
                handle._fail(error)
            raise
        else:
            for handle in part.handles:
                handle._set(data)
        finally:
            part.handles.clear()

    async def _direct(self, part: _Part) -> bytes | memoryview:
        return await self._fetch(part.key, part.start, part.stop, part.what)

    async def _cached(self, part: _Part, cache: DiskCache) -> bytes:
        """Chunks from the cache, and what it lacks from the store, neighbours together."""
        edges = sorted(part.edges | {part.start, part.stop})
        chunks = list(pairwise(edges))
        loop, name = self._reads.loop, self._store.name
        found = await loop.run_in_executor(None, lambda: [cache.get(name, part.key, *chunk) for chunk in chunks])
        buffer = bytearray(part.bytes)
        missing: list[tuple[int, int]] = []
        for (start, stop), data in zip(chunks, found, strict=True):
            if data is not None:
                buffer[start - part.start : stop - part.start] = data
            elif missing and missing[-1][1] == start:
                missing[-1] = missing[-1][0], stop
            else:
                missing.append((start, stop))
        if not missing:
            return buffer  # type: ignore[return-value] # memory that nobody else has
        for start, stop in missing:
            buffer[start - part.start : stop - part.start] = await self._fetch(part.key, start, stop, part.what)
        fresh = [chunk for chunk, data in zip(chunks, found, strict=True) if data is None]

        def keep() -> None:
            view = memoryview(buffer)
            for start, stop in fresh:
                cache.put(name, part.key, start, stop, view[start - part.start : stop - part.start])

        await loop.run_in_executor(None, keep)
        return buffer  # type: ignore[return-value]

    async def _fetch(self, key: str, start: int, stop: int, run: str) -> bytes | memoryview:
        loop, count = self._reads.loop, stop - start
        what = f"{self._store.name}/{key} ({run})"
        self.counts.requests += 1

        async def attempt() -> bytes | memoryview:
            begun = loop.time()
            data = await self._reads.read(key, start, stop)
            self.depth.answered(loop.time() - begun, in_flight=self._in_flight)
            return data

        try:
            if self._reads.retries:
                data = await attempt()
            else:
                data = await persistently(
                    attempt, policy=self._policy, count=count, what=what, on_retry=self._count_retry
                )
        except FmriStreamError as error:
            if what in str(error):
                raise
            raise type(error)(f"{error} (of {run})") from error
        except client_errors() as error:
            raise _named(error, what) from error
        self.counts.bytes_fetched += len(data)
        return data

    def _count_retry(self) -> None:
        self.counts.retries += 1


def _named(error: BaseException, what: str) -> StorageError:
    """A client's error as ours, with the name of the object."""

    def fail() -> None:
        raise error

    store, _, key = what.rpartition("/")
    try:
        translated(store, key, fail)
    except StorageError as ours:
        return ours
    raise AssertionError("it was raised")


def _coalesced(fetcher: RangeFetcher, wanted: Sequence[Wanted]) -> list[tuple[_Part, list[int]]]:
    """Parts in the order in which their first range was asked for, and which ranges each serves."""
    found: list[tuple[_Part, list[int]]] = []
    for place in sorted(range(len(wanted)), key=lambda at: (wanted[at].key, wanted[at].start, wanted[at].stop)):
        one = wanted[place]
        if found:
            part, places = found[-1]
            joined = max(part.stop, one.stop)
            if part.key == one.key and one.start <= part.stop and joined - part.start <= _LARGEST_BYTES:
                part.stop = joined
                part.edges.update((one.start, *one.edges))
                places.append(place)
                continue
        part = _Part(fetcher, one.key, one.start, one.stop, one.what, {one.start, *one.edges})
        found.append((part, [place]))
    return sorted(found, key=lambda pair: min(pair[1]))


class _BlockingReads:
    """A store that is read in place, for a fetcher that has a cache in front of it."""

    retries = True

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._loop = loop

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    async def read(self, key: str, start: int, stop: int) -> bytes:
        return await self._loop.run_in_executor(None, lambda: self._store.read_range(key, start, stop))


def blocking_reads(store: Store) -> AsyncReads:
    """Any store, read by threads of the event loop's own."""
    return _BlockingReads(store, event_loop())
