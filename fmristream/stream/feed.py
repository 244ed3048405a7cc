"""What a remote dataset's batches wait for: byte ranges planned, fetched and handed on, recipes made ready meanwhile."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

from fmristream.catalog.run import Run
from fmristream.errors import FmriStreamError
from fmristream.sampling.clip import Clip
from fmristream.shards.run_reader import Span
from fmristream.signal.prepared import Prepared
from fmristream.storage import Store
from fmristream.storage.async_reads import reads_of
from fmristream.storage.cache import CachedStore, DiskCache
from fmristream.storage.fetch import Counts, Handle, RangeFetcher, Wanted, blocking_reads
from fmristream.storage.retry import RetryPolicy
from fmristream.stream.window_reader import Request, WindowReader

# They wait for answers: index blocks and vectors of as many runs at a time.
_PLANNERS = 16


@dataclass(frozen=True, slots=True)
class Ready:
    """A clip whose bytes are here."""

    request: Request
    prepared: Prepared
    handles: tuple[Handle, ...]

    @property
    def data(self) -> list[memoryview]:
        """The bytes of each of the request's spans."""
        return [handle.future.result() for handle in self.handles]

    def release(self) -> None:
        """They have been used."""
        for handle in self.handles:
            handle.release()


def after(ready: Future[Ready], work: Callable[..., None], threads: ThreadPoolExecutor) -> Future[None]:
    """Work that a thread does as soon as the bytes are here; fails as they do."""
    result: Future[None] = Future()

    def run() -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            work(ready=ready.result())
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(None)

    def arrived(_: Future[Ready]) -> None:
        if ready.cancelled():
            result.cancel()
        elif (error := ready.exception()) is not None:
            if result.set_running_or_notify_cancel():
                result.set_exception(error)
        else:
            with suppress(RuntimeError):  # the loader is being closed: nobody waits
                threads.submit(run)

    ready.add_done_callback(arrived)
    return result


def feed_of(reader: WindowReader, *, limit_bytes: int, policy: RetryPolicy | None) -> "Feed | None":
    """A feed for a dataset that is read over the network or through a cache; None for one that is read in place."""
    store: Store = reader.dataset.store
    cache: DiskCache | None = None
    if isinstance(store, CachedStore):
        cache, store = store.cache, store.inner
    reads = reads_of(store)
    if reads is None and cache is not None:
        reads = blocking_reads(store)
    if reads is None:
        return None
    fetcher = RangeFetcher(store, reads, limit_bytes=limit_bytes, policy=policy, cache=cache)
    return Feed(reader, fetcher, store, cache)


class Feed:
    """Fetches clips ahead; `close` ends its threads and what is under way."""

    def __init__(self, reader: WindowReader, fetcher: RangeFetcher, store: Store, cache: DiskCache | None) -> None:
        self._reader = reader
        self._fetcher = fetcher
        self._store = store
        self._cache = cache
        self._threads = ThreadPoolExecutor(_PLANNERS, thread_name_prefix="fmristream-plan")

    @property
    def counts(self) -> Counts:
        """What was asked of the store."""
        return self._fetcher.counts

    @property
    def depth(self) -> int:
        """How many requests may be under way now."""
        return self._fetcher.depth.now

    def begin(self, clips: Sequence[tuple[Run, Clip]]) -> "Feeding":
        """Begin to fetch the clips of a batch, ranges that touch or overlap together."""
        return Feeding(self._reader, self._fetcher, self._threads, clips)

    def again(self, ready: Ready) -> list[memoryview]:
        """The bytes of a clip once more, past the cache: what came was damaged, on the way perhaps."""
        spans = ready.request.spans
        for span in spans if self._cache is not None else ():
            for start, stop in pairwise(edges_of(span)):
                self._cache.drop(self._store.name, span.key, start, stop)  # type: ignore[union-attr]
        return [memoryview(self._store.read_range(span.key, span.start, span.stop)) for span in spans]

    def close(self) -> None:
        """Give up what is under way and end the threads."""
        self._fetcher.close()
        self._threads.shutdown(wait=True, cancel_futures=True)


class Feeding:
    """A batch under way: `clips[n]` comes when the bytes and the recipe of clip n are here, or says what failed."""

    def __init__(
        self,
        reader: WindowReader,
        fetcher: RangeFetcher,
        threads: ThreadPoolExecutor,
        clips: Sequence[tuple[Run, Clip]],
    ) -> None:
        self.clips: list[Future[Ready]] = [Future() for _ in clips]
        self._reader = reader
        self._fetcher = fetcher
        self._threads = threads
        self._lock = Lock()
        self._is_cancelled = False
        self._handles: list[Handle] = []
        self._runs = [run for run, _ in clips]
        self._turn = fetcher.turn()  # taken now: a batch that is planned later than the next one still comes first
        planned = [threads.submit(reader.request, run, clip) for run, clip in clips]
        when_all_done(planned, lambda: self._fetch(planned))

    def cancel(self) -> None:
        """Give up what is not here yet, and make room."""
        with self._lock:
            self._is_cancelled = True
            handles = list(self._handles)
        for clip in self.clips:
            clip.cancel()
        for handle in handles:
            handle.release()

    def _fetch(self, planned: list[Future[Request]]) -> None:
        """All that could be planned is asked for together."""
        requests: dict[int, Request] = {}
        for number, plan in enumerate(planned):
            if plan.cancelled():
                self.clips[number].cancel()
            elif (error := plan.exception()) is not None:
                _fail(self.clips[number], _of_run(self._runs[number], error))
            else:
                requests[number] = plan.result()
        with self._lock:
            if self._is_cancelled:
                return
            wanted = [wanted_of(request, span) for request in requests.values() for span in request.spans]
            self._handles = handles = self._fetcher.submit(wanted, turn=self._turn)
        prepared: dict[str, Future[Prepared]] = {}
        for request in requests.values():
            if request.run.name not in prepared:
                try:
                    prepared[request.run.name] = self._threads.submit(self._reader.prepared, request.run)
                except RuntimeError:  # the loader is being closed
                    return
        at = 0
        for number, request in requests.items():
            own = tuple(handles[at : at + len(request.spans)])
            at += len(own)
            recipe = prepared[request.run.name]
            parts: list[Future[Any]] = [recipe, *(handle.future for handle in own)]
            when_all_done(parts, _finisher(self.clips[number], request, recipe, own, parts))


def _finisher(
    clip: Future[Ready], request: Request, recipe: Future[Prepared], own: tuple[Handle, ...], parts: list[Future[Any]]
) -> Callable[[], None]:
    def finish() -> None:
        for part in parts:
            if part.cancelled():
                clip.cancel()
                return
            if (error := part.exception()) is not None:
                _fail(clip, _of_run(request.run, error))
                return
        if clip.set_running_or_notify_cancel():
            clip.set_result(Ready(request, recipe.result(), own))

    return finish


def _of_run(run: Run, error: BaseException) -> BaseException:
    """The error with the name of the run: objects have names that say nothing to people."""
    if not isinstance(error, FmriStreamError) or run.name in str(error):
        return error
    named = type(error)(f"{error} (of {run.name})")
    named.__cause__ = error
    return named


def _fail(clip: Future[Ready], error: BaseException) -> None:
    if clip.set_running_or_notify_cancel():
        clip.set_exception(error)


def when_all_done(futures: Sequence[Future[Any]], action: Callable[[], None]) -> None:
    """Call once, when the last of them is done, in whichever thread that is."""
    left, lock = len(futures), Lock()

    def count(_: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            is_last = not left
        if is_last:
            action()

    for future in futures:
        future.add_done_callback(count)


def wanted_of(request: Request, span: Span) -> Wanted:
    """A span as a range to fetch."""
    return Wanted(span.key, span.start, span.stop, edges_of(span)[1:], request.run.name)


def edges_of(span: Span) -> tuple[int, ...]:
    """Where its chunks begin, and where the last one ends."""
    edges = [span.start]
    for length in span.lengths:
        edges.append(edges[-1] + length)
    return tuple(edges)
