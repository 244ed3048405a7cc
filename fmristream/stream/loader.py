"""Batches in a fixed global order, fetched ahead by threads inside the rank's process. One of two importers of torch."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from threading import local
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, UsageError
from fmristream.sampling.deal import Schedule, World, check_schedule
from fmristream.sampling.state import StreamState
from fmristream.signal.grid import stretches_of
from fmristream.signal.prepared import Prepared
from fmristream.storage.fetch import Counts
from fmristream.storage.retry import RetryPolicy
from fmristream.stream.batch import Batch
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.feed import Feeding, Ready, feed_of
from fmristream.stream.pool import BatchPool
from fmristream.stream.window_reader import Scratch, Target

# What may be fetched ahead of decoding: 40 windows of 20 frames of an MNI brain at 2 mm.
PREFETCH_BYTES = 256 * 2**20

_DTYPES = ("float32", "float16", "int16")
_OUTPUTS = ("packed", "placed")


@dataclass(slots=True)
class _Ahead:
    """A batch under way: planned, its bytes perhaps on their way, then memory lent to it and threads filling it."""

    numbers: NDArray[np.int64]
    valid: NDArray[np.bool_]
    position: int
    feeding: Feeding | None = None
    batch: Batch | None = None
    filling: list[Future[None]] = field(default_factory=list)
    scales: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)


class StreamingLoader:
    """Iterates over batches of a `StreamingDataset`, one epoch at a time.

    Global batch k holds the same windows whatever the number of ranks and threads. With a seed, positions run on from
    epoch to epoch, so every batch is full and every window comes exactly once per epoch; without one, an iteration is
    one pass in stored order and the last batch is padded with samples marked `valid = False`.

    A batch that fails raises when it is due, and is the next one again when the iteration is taken up again.

    A context manager; `close()` ends its threads.

    Args:
        clips: what to load.
        batch_size: samples of one batch over all ranks.
        rank: this process; with world_size from torch.distributed where it is initialised and neither is given.
        world_size: how many processes share each batch.
        threads: decoding threads of this process; local files are read by them, too.
        prefetch_batches: how many batches may have memory and be filled.
        dtype: of values: `float32`; `float16`, rounded as numpy rounds it; `int16`: residuals as they are stored, with
            `scale` and `offset` beside them, where the recipe is just that.
        output: `packed` in-mask values, or `placed` on the grid by the loader's threads, which a host without a GPU wants.
        prefetch_bytes: of remote datasets, what may be asked for or waiting to be decoded; one window alone may be more.
        retry: bounds of a remote read with all its attempts; those of `RetryPolicy` where not given. S3's own client has
            its own.

    Raises:
        UsageError: no window, a batch smaller than the world, or an unknown dtype or output.
        SpaceError: grayordinates are to be placed.
    """

    def __init__(
        self,
        clips: StreamingDataset,
        *,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        threads: int = 1,
        prefetch_batches: int = 2,
        dtype: str = "float32",
        output: str = "packed",
        prefetch_bytes: int = PREFETCH_BYTES,
        retry: RetryPolicy | None = None,
    ) -> None:
        _require_form(dtype, output)
        if batch_size < 1 or threads < 1 or prefetch_batches < 1:
            raise UsageError(
                f"batch_size {batch_size}, threads {threads}, prefetch_batches {prefetch_batches}: expected 1 or more each"
            )
        self.clips = clips
        self.world = _world(rank, world_size)
        self._schedule = Schedule(
            windows=clips.num_windows,
            batch_size=batch_size,
            seed=clips.seed,
            selection_digest=clips.selection_digest,
        )
        check_schedule(self._schedule, [self.world.size])
        self._prefetch = prefetch_batches
        self._pool = BatchPool(pinned=torch.cuda.is_available())
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fmristream-loader")
        self._scratch = local()
        # A row of the table costs 50 us to take out.
        self._run = lru_cache(maxsize=1024)(clips.runs.__getitem__)
        self._positions = torch.from_numpy(clips.positions) if clips.has_grid else None
        self._dtype = dtype
        self._grid = clips.grid if output == "placed" or clips.has_grid else None
        self._stretches = stretches_of(clips.positions) if output == "placed" else None
        self._feed = feed_of(clips.reader, limit_bytes=prefetch_bytes, policy=retry)
        self._consumed = 0  # samples handed out over all ranks
        self._ahead: deque[_Ahead] = deque()
        self._resumed = False  # a state was loaded, and no batch was asked for since
        self._iteration = 0  # the newest; an older one must not take its batches
        self._closed = False

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._epoch_at(self._consumed)

    def __len__(self) -> int:
        """Batches that start in this epoch; epochs may differ by one."""
        return self._schedule.batches_in(self.epoch, consumed=self._consumed)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch's batches; the next call goes on with the next epoch. Without a seed, always one pass."""
        if self._closed:
            raise UsageError("the loader is closed; make a new one")
        if self.clips.seed is None and not self._resumed:
            self._restart(0)
        self._resumed = False
        self._iteration = mine = self._iteration + 1
        epoch = self.epoch
        while self._epoch_at(self._consumed) == epoch and not self._is_past_end(self._consumed):
            batch = self._next()
            yield batch
            if self._iteration != mine:
                raise UsageError("another iteration over this loader was started; make a loader for each")
        if self.clips.seed is None:
            self._restart(0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last batch handed out: the same on every rank; JSON-able."""
        return self._state(self._consumed).as_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, on this or any other world size.

        Raises:
            ResumeError: the state belongs to other data, another window or another seed.
        """
        saved = StreamState.from_dict(state)
        saved.require_same_stream(self._state(0))
        self._restart(saved.consumed)
        self._resumed = True

    def close(self) -> None:
        """End the threads; batches handed out stay valid."""
        if not self._closed:
            self._closed = True
            self._restart(self._consumed)
            if self._feed is not None:
                self._feed.close()
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def counts(self) -> Counts | None:
        """Requests and bytes so far; None where files are read in place."""
        return None if self._feed is None else self._feed.counts

    def _next(self) -> Batch:
        self._fetch_ahead()
        ahead = self._ahead[0]
        try:
            for filling in ahead.filling:
                filling.result()  # the thread's error, if it had one
        except BaseException:
            self._restart(self._consumed)
            raise
        self._ahead.popleft()
        self._consumed = ahead.position + self._schedule.batch_size
        self._fetch_ahead()
        assert ahead.batch is not None, "the first batches have memory"
        return _with_scales(ahead.batch, ahead.scales) if self._dtype == "int16" else ahead.batch

    def _fetch_ahead(self) -> None:
        position = self._ahead[-1].position + self._schedule.batch_size if self._ahead else self._consumed
        while len(self._ahead) < self._batches_ahead() and not self._is_past_end(position):
            self._ahead.append(self._start(position))
            position += self._schedule.batch_size
        for number, ahead in enumerate(self._ahead):
            if number < self._prefetch and ahead.batch is None:
                self._begin_filling(ahead)

    def _batches_ahead(self) -> int:
        """How many may be under way: of remote ones, as many as keep the requests going that latency asks for."""
        if self._feed is None:
            return self._prefetch
        share = max(1, self._schedule.batch_size // self.world.size)
        return self._prefetch + -(-self._feed.depth // share)

    def _start(self, position: int) -> _Ahead:
        numbers, valid = self._schedule.batch(position, self.world)
        ahead = _Ahead(numbers, valid, position)
        if self._feed is not None:
            clips = [self.clips.clip(number) for number in numbers.tolist()]
            ahead.feeding = self._feed.begin([(self._run(clip.run), clip) for clip in clips])
        return ahead

    def _begin_filling(self, ahead: _Ahead) -> None:
        clips = self.clips
        last = clips.voxels if self._stretches is None else math.prod(clips.grid)
        shape = (len(ahead.numbers), clips.channels, clips.window, last)
        array, values = self._pool.lend(shape, self._dtype)
        fill = np.empty((len(ahead.numbers), clips.channels), dtype=np.float32)
        ahead.batch = self._describe(ahead, values, torch.from_numpy(fill))
        for row, number in enumerate(ahead.numbers.tolist()):
            # The tensor goes along so that its memory is not lent again before the last thread has written to it.
            work = partial(self._fill, ahead.scales, number, array[row], fill[row], values)
            if ahead.feeding is None:
                ahead.filling.append(self._threads.submit(work))
            else:
                ahead.filling.append(_after(ahead.feeding.clips[row], work, self._threads))

    def _fill(
        self,
        scales: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
        number: int,
        values: NDArray[Any],
        fill: NDArray[np.float32],
        _lent: torch.Tensor,
        ready: Ready | None = None,
    ) -> None:
        scratch = getattr(self._scratch, "buffers", None)
        if scratch is None:
            scratch = self._scratch.buffers = Scratch()
        reader, target = self.clips.reader, Target(values, self._stretches)
        if ready is not None:
            prepared = self._fill_from(ready, target, scratch)
        else:
            clip = self.clips.clip(number)
            prepared = reader.fill(reader.request(self._run(clip.run), clip), target, scratch)
        fill[:] = prepared.fill
        if values.dtype == np.int16:
            name = self._run(self.clips.clip(number).run).name
            scales[name] = prepared.affine  # type: ignore[attr-defined] # who filled looked at it

    def _fill_from(self, ready: Ready, target: Target, scratch: Scratch) -> Prepared:
        reader = self.clips.reader
        try:
            try:
                return reader.fill(ready.request, target, scratch, data=ready.data, prepared=ready.prepared)
            finally:
                ready.release()
        except CorruptDataError:
            # What is damaged on the way, or was kept damaged, comes whole the second time; what is stored damaged does not.
            assert self._feed is not None
            data = self._feed.again(ready)
            return reader.fill(ready.request, target, scratch, data=data, prepared=ready.prepared)

    def _describe(self, ahead: _Ahead, values: torch.Tensor, fill: torch.Tensor) -> Batch:
        numbers = ahead.numbers
        clips = [self.clips.clip(number) for number in numbers.tolist()]
        runs = [self._run(clip.run) for clip in clips]
        return Batch(
            packed=values if self._stretches is None else None,
            placed=None if self._stretches is None else values.view(*values.shape[:3], *self.clips.grid),
            positions=self._positions,
            grid=self._grid,
            fill=fill,
            valid=torch.from_numpy(ahead.valid),
            window=torch.from_numpy(numbers),
            start=torch.tensor([clip.start for clip in clips], dtype=torch.int64),
            subject=[run.subject for run in runs],
            run=[run.name for run in runs],
            targets={
                target.name: torch.tensor([target.of(run.subject) for run in runs], dtype=torch.float32)
                for target in self.clips.targets
            },
            global_size=self._schedule.batch_size,
            position=ahead.position,
        )

    def _state(self, consumed: int) -> StreamState:
        return StreamState(
            consumed=consumed,
            seed=self.clips.seed,
            window=self.clips.window,
            stride=self.clips.stride,
            windows=self.clips.num_windows,
            selection=self.clips.selection_digest,
        )

    def _restart(self, consumed: int) -> None:
        for ahead in self._ahead:
            for filling in ahead.filling:
                filling.cancel()
            if ahead.feeding is not None:
                ahead.feeding.cancel()
        self._ahead.clear()
        self._consumed = consumed

    def _epoch_at(self, position: int) -> int:
        return self._schedule.epoch_of(position)

    def _is_past_end(self, position: int) -> bool:
        return self.clips.seed is None and position >= self._schedule.windows


def _require_form(dtype: str, output: str) -> None:
    if dtype not in _DTYPES or output not in _OUTPUTS:
        raise UsageError(
            f"dtype={dtype!r}, output={output!r}: expected one of {', '.join(_DTYPES)} and one of {', '.join(_OUTPUTS)}"
        )
    if dtype == "int16" and output == "placed":
        raise UsageError("dtype='int16', output='placed': residuals have no background; use output='packed'")


def _with_scales(batch: Batch, scales: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Batch:
    """The batch with what its residuals are scaled by, a row for each run."""
    rows = {name: row for row, name in enumerate(dict.fromkeys(batch.run))}
    return replace(
        batch,
        scale=torch.from_numpy(np.stack([scales[name][0] for name in rows])),
        offset=torch.from_numpy(np.stack([scales[name][1] for name in rows])),
        scale_row=torch.tensor([rows[name] for name in batch.run], dtype=torch.int64),
    )


def _after(ready: Future[Ready], work: Callable[..., None], threads: ThreadPoolExecutor) -> Future[None]:
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


def _world(rank: int | None, world_size: int | None) -> World:
    if (rank is None) != (world_size is None):
        raise UsageError("give both rank and world_size, or neither to take them from torch.distributed")
    if rank is not None and world_size is not None:
        return World(rank=rank, size=world_size)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return World(rank=distributed.get_rank(), size=distributed.get_world_size())
    return World()
