"""How fast windows of a dataset come on this machine from this URL, and what was asked of the store for them."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Self, TypeVar

from fmristream.errors import MissingExtraError, UsageError
from fmristream.shards.dataset import Dataset
from fmristream.shards.generation import newest_generation
from fmristream.shards.index import ranges_of
from fmristream.storage import NewObject, Store, Unfinished, display_url, open_store
from fmristream.storage.async_reads import AsyncReads, reads_of
from fmristream.storage.local import LocalStore

T = TypeVar("T")
Progress = Callable[[int, int], None]

# What an epoch of training begins with is not what it goes on with: threads, connections and buffers are made.
WARM_UP_BATCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is streamed, and how.

    Attributes:
        window: frames of a window.
        batch_size: windows of a batch.
        batches: timed; two more come before them.
        threads: that fetch and decode.
        split: of which runs; None for all.
        seed: of the order.
        normalize: what becomes of the values.
        step_s: how long a pretended training step takes between two batches, seconds.
    """

    window: int = 20
    batch_size: int = 8
    batches: int = 50
    threads: int = 1
    split: str | None = None
    seed: int = 0
    normalize: str = "voxel-zscore"
    step_s: float = 0.0

    def __post_init__(self) -> None:
        if self.batches < 1 or self.step_s < 0:
            raise UsageError(
                f"--batches {self.batches}, --step {self.step_s}: expected 1 batch or more, and no time below 0 s"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What was measured; times in seconds, sizes in bytes."""

    url: str
    window: int
    batch_size: int
    batches: int
    threads: int
    voxels: int
    open_s: float  # from the URL to a planned order
    first_batch_s: float  # from there to the first batch
    seconds: float  # of the timed batches, pretended steps included
    waited_s: float  # of it, in which the consumer had nothing to do
    windows_per_s: float
    frames_per_s: float
    read_mb_s: float  # stored bytes of the delivered windows
    open_requests: int  # until the first window was asked for
    requests: int  # all, opening included
    failed_requests: int  # of them, answered with an error, such as for the version after the newest
    bytes_fetched: int  # all, opening and what was fetched ahead included
    windows: int  # delivered, warming up included
    window_requests: int  # for frames of delivered windows
    window_bytes_fetched: int
    window_bytes_used: int  # what the delivered windows are stored in
    ahead_bytes: int  # of frames that were fetched ahead when the measurement ended

    @property
    def fetched_over_used(self) -> float:
        """Bytes fetched for frames / bytes that the delivered windows needed; 1 is the best there is."""
        return self.window_bytes_fetched / self.window_bytes_used

    @property
    def requests_per_window(self) -> float:
        """Requests for frames; 1, and a little more where windows cross shards."""
        return self.window_requests / self.windows

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ratios = {"fetched_over_used": self.fetched_over_used, "requests_per_window": self.requests_per_window}
        return {**asdict(self), **ratios}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A read that came back."""

    key: str
    start: int
    stop: int


@dataclass
class CountingStore:
    """A store that hands every call on to another, and remembers what was read."""

    inner: Store
    reads: list[Fetched] = field(default_factory=list)
    failed: int = 0
    _lock: Any = field(default_factory=Lock, repr=False)

    @property
    def name(self) -> str:
        return self.inner.name

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        data = self._watched(lambda: self.inner.read_range(key, start, stop))
        if start < stop:
            self.remember(Fetched(key, start, stop))
        return data

    def read(self, key: str) -> bytes:
        data = self._watched(lambda: self.inner.read(key))
        self.remember(Fetched(key, 0, len(data)))
        return data

    def async_reads(self) -> AsyncReads | None:
        """The inner store's own, counted: what is measured is how it is read without this."""
        found = reads_of(self.inner)
        return None if found is None else _CountingReads(found, self)

    def size(self, key: str) -> int:
        found = self._watched(lambda: self.inner.size(key))
        self.remember(Fetched(key, 0, 0))
        return found

    def list(self, prefix: str) -> list[str]:
        found = self._watched(lambda: self.inner.list(prefix))
        self.remember(Fetched(prefix, 0, 0))
        return found

    def put_new(self, key: str, data: bytes) -> None:
        self.inner.put_new(key, data)

    def stream_new(self, key: str) -> NewObject:
        return self.inner.stream_new(key)

    def replace_hint(self, key: str, data: bytes) -> None:
        self.inner.replace_hint(key, data)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def unfinished(self) -> Sequence[Unfinished]:
        return self.inner.unfinished()

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        self.inner.discard_unfinished(unfinished)

    def keeps_removed(self) -> bool | None:
        return self.inner.keeps_removed()

    @property
    def requests(self) -> int:
        """Reads so far, those that failed included."""
        return len(self.reads) + self.failed

    def _watched(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except Exception:
            self.count_failure()
            raise

    def count_failure(self) -> None:
        """Count a read that failed."""
        with self._lock:
            self.failed += 1

    def remember(self, fetched: Fetched) -> None:
        """Count a read that came back."""
        with self._lock:
            self.reads.append(fetched)


@dataclass(frozen=True, slots=True)
class _CountingReads:
    """Asynchronous reads, each of them remembered by the store."""

    inner: AsyncReads
    store: CountingStore

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.inner.loop

    @property
    def retries(self) -> bool:
        return self.inner.retries

    async def read(self, key: str, start: int, stop: int) -> bytes | memoryview:
        try:
            data = await self.inner.read(key, start, stop)
        except Exception:
            self.store.count_failure()
            raise
        self.store.remember(Fetched(key, start, stop))
        return data


class CountingLocalStore(LocalStore):
    """A local folder that remembers what was read of it, but for frames: kernels read these from files that it opens."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.counted = CountingStore(LocalStore(url))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self.counted.read_range(key, start, stop)

    def read(self, key: str) -> bytes:
        return self.counted.read(key)


@dataclass(slots=True)
class _Clock:
    """Times of the batches; a context manager around each wait."""

    waits_s: list[float] = field(default_factory=list)
    _started: float = 0.0

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.waits_s.append(time.perf_counter() - self._started)


def bench(url: str, options: BenchOptions, *, progress: Progress | None = None) -> BenchReport:
    """Stream batches in training order, as a training would, and say how that went.

    Requests are counted between the loader and the client of the store: what the client itself repeats is not seen. Of a
    local folder, frames are counted as they are planned.

    Raises:
        UsageError: no window of that length, or an option makes no sense.
        MissingExtraError: torch is not installed.
        CorruptDataError: stored bytes have changed.
    """
    # Imported here: these need torch, what this package tells of datasets else does not.
    try:
        from fmristream.stream.clips import StreamingDataset
        from fmristream.stream.loader import StreamingLoader
    except ModuleNotFoundError as error:
        raise MissingExtraError("streaming needs torch: pip install 'fmristream[torch]'") from error

    started = time.perf_counter()
    store, counted = _counting(url)
    dataset = Dataset(url, store, newest_generation(store))
    clips = StreamingDataset(
        dataset, window=options.window, split=options.split, seed=options.seed, normalize=options.normalize
    )
    with StreamingLoader(clips, batch_size=options.batch_size, threads=options.threads) as loader:
        open_s = time.perf_counter() - started
        open_requests = counted.requests
        waits_s, seconds, delivered = _consume(loader, options, progress)
    reads = list(counted.reads)  # closed: nothing is under way; what is asked from here on is not the loader's
    requests, failed = counted.requests, counted.failed
    needed = [part for name, start in delivered for part in _parts(dataset, name, start, options.window)]
    if isinstance(store, LocalStore):  # read as they were planned, and not through the store
        reads += needed
        requests += len(needed)
    wanted, ahead = _told_apart(reads, needed)
    timed = options.batches * options.batch_size
    used = sum(part.stop - part.start for part in needed)
    return BenchReport(
        url=display_url(url),
        window=options.window,
        batch_size=options.batch_size,
        batches=options.batches,
        threads=options.threads,
        voxels=clips.voxels,
        open_s=open_s,
        first_batch_s=waits_s[0],
        seconds=seconds,
        waited_s=sum(waits_s[-options.batches :]),
        windows_per_s=timed / seconds,
        frames_per_s=timed * options.window / seconds,
        read_mb_s=used / len(delivered) * timed / seconds / 1e6,
        open_requests=open_requests,
        requests=requests,
        failed_requests=failed,
        bytes_fetched=sum(one.stop - one.start for one in reads),
        windows=len(delivered),
        window_requests=len(wanted),
        window_bytes_fetched=sum(one.stop - one.start for one in wanted),
        window_bytes_used=used,
        ahead_bytes=sum(one.stop - one.start for one in ahead),
    )


def _counting(url: str) -> tuple[Store, CountingStore]:
    """(the store to stream from, what counts its reads)."""
    store = open_store(url)
    if isinstance(store, LocalStore):
        local = CountingLocalStore(url)
        return local, local.counted
    counted = CountingStore(store)
    return counted, counted


def _consume(
    loader: Any, options: BenchOptions, progress: Progress | None
) -> tuple[list[float], float, list[tuple[str, int]]]:
    """(wait for each batch, seconds of the timed ones, (run, first frame) of every window delivered)."""
    batches, clock, total = _endless(loader), _Clock(), WARM_UP_BATCHES + options.batches
    delivered: list[tuple[str, int]] = []
    began = time.perf_counter()
    for number in range(total):
        if number == WARM_UP_BATCHES:
            began = time.perf_counter()
        with clock:
            batch = next(batches)
        delivered += zip(batch.run, batch.start.tolist(), strict=True)
        del batch  # its memory is lent again
        if options.step_s:
            time.sleep(options.step_s)
        if progress is not None:
            progress(number + 1, total)
    return clock.waits_s, time.perf_counter() - began, delivered


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _parts(dataset: Dataset, name: str, start: int, window: int) -> Iterator[Fetched]:
    """The byte ranges that a window is stored in."""
    reader = dataset.reader(name)
    array = reader.frames_array
    for part in ranges_of(reader.lengths, start=start, stop=start + window, frames_per_shard=array.frames_per_shard):
        yield Fetched(
            f"{array.object}/c/{part.shard}" + "/0" * (len(array.shape) - 1),
            part.start,
            part.start + sum(part.lengths),
        )


def _told_apart(reads: Sequence[Fetched], needed: Sequence[Fetched]) -> tuple[list[Fetched], list[Fetched]]:
    """Reads of frames: those that delivered windows needed, and those for windows that were to come.

    Reads come in order, so a part that was needed so often was read so often before it was read ahead.
    """
    missing: dict[str, dict[Fetched, int]] = defaultdict(dict)  # bytes of each part that no read has brought yet
    for part in needed:
        missing[part.key][part] = missing[part.key].get(part, 0) + part.stop - part.start
    wanted, ahead = [], []
    for read in reads:
        if "/c/" in read.key and _settle(read, missing.get(read.key, {})):
            wanted.append(read)
        elif _is_of_frames(read.key, missing):
            ahead.append(read)
    return wanted, ahead


def _settle(read: Fetched, missing: dict[Fetched, int]) -> bool:
    """Take what a read brought off what is missing; whether there was any."""
    has_brought = False
    for part, left in missing.items():
        brought = min(read.stop, part.stop) - max(read.start, part.start)
        if left > 0 and brought > 0:
            missing[part] = left - brought
            has_brought = True
    return has_brought


def _is_of_frames(key: str, known: Iterable[str]) -> bool:
    """Whether the key names a shard of an array that frames are read of; vectors of a run are arrays as well."""
    names = {one.partition("/c/")[0].rpartition("/")[2] for one in known}
    return "/c/" in key and key.partition("/c/")[0].rpartition("/")[2] in names
