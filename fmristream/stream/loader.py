"""Batches in a fixed global order, fetched ahead by threads inside the rank's process."""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from functools import partial
from threading import local
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, UsageError
from fmristream.sampling.deal import Draws, Schedule, World, check_schedule
from fmristream.sampling.state import StreamState
from fmristream.signal.grid import stretches_of
from fmristream.signal.prepared import Prepared
from fmristream.storage.fetch import Counts
from fmristream.storage.retry import RetryPolicy
from fmristream.stream.batch import Batch
from fmristream.stream.clips import Row, StreamingDataset
from fmristream.stream.described import Buffers, Describer, Scale, with_scales
from fmristream.stream.feed import Feed, Feeding, Ready, after, feed_of
from fmristream.stream.forms import counts_of, require_endless, require_form, require_room
from fmristream.stream.mixture import Mixture
from fmristream.stream.pool import BatchPool
from fmristream.stream.selection import whole
from fmristream.stream.window_reader import Scratch, Target

# What may be fetched ahead of decoding: 40 windows of 20 frames of an MNI brain at 2 mm.
PREFETCH_BYTES = 256 * 2**20

# Positions that are drawn at once.
_DRAWN_AHEAD = 256


@dataclass(slots=True)
class _Ahead:
    """A batch under way: planned, its bytes perhaps on their way, then memory lent to it and threads filling it."""

    draws: Draws
    rows: list[Row]
    position: int
    arriving: list[Future[Ready] | None]  # of each row; None where it is read in place
    feedings: list[Feeding] = field(default_factory=list)
    batch: Batch | None = None
    filling: list[Future[None]] = field(default_factory=list)
    scales: dict[tuple[int, str], Scale] = field(default_factory=dict)


class StreamingLoader:
    """Iterates over batches of a `StreamingDataset` or a `Mixture`, one epoch at a time.

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
        prefetch_bytes: of remote datasets, what may be asked for or waiting to be decoded beside the batch that is due.
        retry: bounds of a remote read of frames with all its attempts; those of `RetryPolicy` where not given. S3's own
            client has its own.

    Raises:
        UsageError: no window, a batch smaller than the world, an unknown dtype or output, or int16 of what has no residuals.
        SpaceError: grayordinates are to be placed.
    """

    def __init__(
        self,
        clips: StreamingDataset | Mixture,
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
        require_form(dtype, output)
        batch_size, threads, prefetch_batches = counts_of(
            batch_size=batch_size, threads=threads, prefetch_batches=prefetch_batches
        )
        self.clips = clips
        self.world = _world(rank, world_size)
        self._schedule = Schedule(order=clips.order, batch_size=batch_size)
        check_schedule(self._schedule, [self.world.size])
        self._prefetch = prefetch_batches
        self._pool = BatchPool(pinned=torch.cuda.is_available())
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fmristream-loader")
        # What batches ahead need is planned beside the caller: the milliseconds are the device's.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="fmristream-planner")
        self._began_in: int | None = None  # the process that has the threads
        self._is_restarting = False
        self._planning: Future[None] | None = None  # until it is done, what is under way is the planner's
        self._scratch = local()
        self._members = members = clips.members if isinstance(clips, Mixture) else (clips,)
        require_room(clips, members, dtype=dtype, output=output)
        self._dtype, self._is_placed = dtype, output == "placed"
        self._describer = Describer(
            clips,
            members,
            is_placed=self._is_placed,
            global_size=batch_size,
            offset=self.world.share(batch_size)[0],
        )
        self._stretches = [stretches_of(member.positions) if self._is_placed else None for member in members]
        # Each member has its share of what may be under way.
        self._feeds: list[Feed | None] = [
            feed_of(member.reader, limit_bytes=prefetch_bytes // len(members), policy=retry) for member in members
        ]
        self._drawn: Draws | None = None
        self._drawn_from = 0  # position of its first sample
        self._consumed = 0  # samples handed out over all ranks
        self._ahead: deque[_Ahead] = deque()
        self._resumed = False  # a state was loaded, and no batch was asked for since
        self._iteration = 0  # the newest; an older one must not take its batches
        self._closed = False

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self.epoch_at(self._consumed)

    def __len__(self) -> int:
        """Batches that start in this epoch; epochs may differ by one."""
        return self.batches_at(self._consumed)

    def epoch_at(self, consumed: int) -> int:
        """Epoch of the batch that comes after so many samples."""
        return self._schedule.epoch_of(consumed)

    def batches_at(self, consumed: int) -> int:
        """Batches that start in that epoch, for a stream that has handed out so many samples."""
        return self._schedule.batches_in(self.epoch_at(consumed), consumed=consumed)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch's batches; the next call goes on with the next epoch. Without a seed, always one pass."""
        if not self._schedule.order.is_shuffled and not self._resumed:
            self._restart(0)
        self._resumed = False
        self._iteration = mine = self._iteration + 1
        epoch = self.epoch
        while self.epoch_at(self._consumed) == epoch and not self._is_past_end(self._consumed):
            yield self._next()
            if self._iteration != mine:
                raise UsageError("another iteration over this loader was started; make a loader for each")
        if not self._schedule.order.is_shuffled:
            self._restart(0)

    def forever(self) -> Iterator[Batch]:
        """Batches of this epoch and all that follow, without end."""
        require_endless(self.clips.seed)
        while True:
            yield from self

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch that starts in an epoch; nothing happens in that epoch itself, wherever in it the stream is.

        Iterations go from epoch to epoch without this. Stored order has one epoch only, which every iteration begins anew.

        Raises:
            UsageError: it is negative, or epochs are shorter than a batch.
        """
        epoch = whole("epoch", epoch)
        if epoch < 0:
            raise UsageError(f"epoch {epoch}: expected 0 or more")
        samples = self._schedule.order.samples
        if self._schedule.order.is_shuffled and samples < self._schedule.batch_size:
            raise UsageError(
                f"set_epoch({epoch}): an epoch has {samples} samples, a batch {self._schedule.batch_size}, so that not every "
                "epoch has a batch of its own; use a smaller batch_size, or forever()"
            )
        if self._schedule.order.is_shuffled and epoch != self.epoch:
            self._restart(self._schedule.start_of(epoch, consumed=self._consumed))

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
            for feed in self._feeds:
                if feed is not None:
                    feed.close()
            self._planner.shutdown(wait=True, cancel_futures=True)
            self._threads.shutdown(wait=True, cancel_futures=True)
            if (planning := self._planning) is not None:
                planning.cancel()  # another thread asked for it meanwhile, and no thread is left to do it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def counts(self) -> Counts | None:
        """Requests and bytes so far; None where files are read in place."""
        found = [feed.counts for feed in self._feeds if feed is not None]
        if len(found) < 2:
            return found[0] if found else None
        return Counts(**{one.name: sum(getattr(counts, one.name) for counts in found) for one in fields(Counts)})

    def _next(self) -> Batch:
        if self._closed:
            raise UsageError("the loader is closed; make a new one")
        if self._began_in not in (None, os.getpid()):
            raise UsageError(
                "this loader began in another process, and its threads are there; make a new one after a fork"
            )
        try:
            if self._is_restarting:
                self._restart(self._consumed)  # an interrupt broke it off
            self._finish_planning()
            if not self._ahead or self._ahead[0].position != self._consumed:  # at the start, and after an error
                self._restart(self._consumed)
                self._begin_planning(self._consumed)
                self._finish_planning()
            ahead = self._ahead[0]
            for filling in ahead.filling:
                filling.result()  # the thread's error, if it had one
            assert ahead.batch is not None, "the first batches have memory"
            batch = with_scales(ahead.batch, ahead.rows, ahead.scales) if self._dtype == "int16" else ahead.batch
            self._ahead.popleft()
            consumed = ahead.position + self._schedule.batch_size
            self._begin_planning(consumed)
        except BaseException as error:
            if self._closed and isinstance(error, Exception):
                raise UsageError("the loader was closed while a batch was waited for; make a new one") from error
            # Wherever an error or an interrupt came: a batch that is begun by half must not be handed out, nor one be lost.
            self._restart(self._consumed)
            raise
        self._consumed = consumed
        return batch

    def _begin_planning(self, consumed: int) -> None:
        self._began_in = os.getpid()
        # Known before it can begin: whoever is interrupted here still finds it, to wait for or to call off.
        self._planning = planning = Future[None]()
        self._planner.submit(self._plan, planning, consumed, self._pool.device())

    def _finish_planning(self) -> None:
        if (planning := self._planning) is not None:
            planning.result()
            self._planning = None

    def _plan(self, planning: Future[None], consumed: int, device: int | None) -> None:
        if not planning.set_running_or_notify_cancel():
            return
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread's is the first, where pinned memory would take a context
            self._fetch_ahead(consumed)
        except BaseException as error:
            planning.set_exception(error)  # raised when the next batch is due
        else:
            planning.set_result(None)

    def _fetch_ahead(self, consumed: int) -> None:
        """Begin what is to be under way once so many samples are handed out."""
        position = self._ahead[-1].position + self._schedule.batch_size if self._ahead else consumed
        while len(self._ahead) < self._batches_ahead() and not self._is_past_end(position):
            self._ahead.append(self._start(position))
            position += self._schedule.batch_size
        for number, ahead in enumerate(self._ahead):
            if number < self._prefetch and ahead.batch is None:
                self._begin_filling(ahead)

    def _batches_ahead(self) -> int:
        """How many may be under way: of remote ones, as many as keep the requests going that latency asks for."""
        depth = max((feed.depth for feed in self._feeds if feed is not None), default=0)
        share = max(1, self._schedule.batch_size * self.clips.views // self.world.size)
        return self._prefetch + -(-depth // share)

    def _start(self, position: int) -> _Ahead:
        draws = self._draws(position)
        rows = self.clips.rows(draws)
        ahead = _Ahead(draws, rows, position, arriving=[None] * len(rows))
        for source, feed in enumerate(self._feeds):
            places = [place for place, row in enumerate(rows) if row.source == source]
            if feed is None or not places:
                continue
            feeding = feed.begin([(rows[place].run, rows[place].clip) for place in places])
            ahead.feedings.append(feeding)
            for place, arriving in zip(places, feeding.clips, strict=True):
                ahead.arriving[place] = arriving
        return ahead

    def _draws(self, position: int) -> Draws:
        """This rank's share of the batch at a position; many positions are drawn at once, which costs little more than one."""
        first, stop = (position + edge for edge in self.world.share(self._schedule.batch_size))
        drawn = self._drawn
        if drawn is None or not self._drawn_from <= first or self._drawn_from + len(drawn.number) < stop:
            drawn = self._schedule.order.draws_at(first, max(stop, first + _DRAWN_AHEAD))
            self._drawn, self._drawn_from = drawn, first  # together: an interrupt between them would shift every sample
        return drawn.part(first - self._drawn_from, stop - self._drawn_from)

    def _begin_filling(self, ahead: _Ahead) -> None:
        clips, count = self.clips, len(ahead.rows)
        last = math.prod(clips.grid) if self._is_placed else clips.voxels
        array, values = self._pool.lend((count, clips.channels, clips.window, last), self._dtype)
        fill = np.empty((count, clips.channels), dtype=np.float32)
        side = self._members[0].side.empty(count, clips.window)
        kept = np.ones((count, clips.window), dtype=bool) if clips.scrubs else None
        buffers = Buffers(values=values, fill=fill, side=side, kept=kept)
        ahead.batch = self._describer.describe(ahead.rows, ahead.draws, ahead.position, buffers)
        for place, (row, arriving) in enumerate(zip(ahead.rows, ahead.arriving, strict=True)):
            own_side = {name: rows[place] for name, rows in side.items()}
            own_kept = None if kept is None else kept[place]
            # The tensor goes along so that its memory is not lent again before the last thread has written to it.
            work = partial(self._fill, ahead.scales, row, array[place], fill[place], own_side, own_kept, values)
            submitted = self._threads.submit(work) if arriving is None else after(arriving, work, self._threads)
            ahead.filling.append(submitted)

    def _fill(
        self,
        scales: dict[tuple[int, str], Scale],
        row: Row,
        values: NDArray[Any],
        fill: NDArray[np.float32],
        side: Mapping[str, NDArray[np.float32]],
        kept: NDArray[np.bool_] | None,
        _lent: torch.Tensor,
        ready: Ready | None = None,
    ) -> None:
        scratch = getattr(self._scratch, "buffers", None)
        if scratch is None:
            scratch = self._scratch.buffers = Scratch()
        reader, length = row.clips.reader, row.clip.length
        target = Target(values[:, :length], self._stretches[row.source])
        if ready is not None:
            prepared = self._fill_from(ready, row, target, scratch)
        else:
            prepared = reader.fill(reader.request(row.run, row.clip), target, scratch)
        fill[:] = prepared.fill
        values[:, length:] = fill[:, None, None]  # whole runs are padded to the longest
        row.clips.side.read(row.clip, {name: known[:length] for name, known in side.items()})
        if kept is not None and prepared.kept is not None:
            kept[:length] = prepared.kept[list(row.clip.frames)]
        if values.dtype == np.int16:
            affine = prepared.affine
            assert affine is not None, "who filled looked at it"
            scales[row.source, row.run.name] = affine

    def _fill_from(self, ready: Ready, row: Row, target: Target, scratch: Scratch) -> Prepared:
        reader, feed = row.clips.reader, self._feeds[row.source]
        try:
            try:
                return reader.fill(ready.request, target, scratch, data=ready.data, prepared=ready.prepared)
            finally:
                ready.release()
        except CorruptDataError:
            # What is damaged on the way, or was kept damaged, comes whole the second time; what is stored damaged does not.
            assert feed is not None
            data = feed.again(ready)
            return reader.fill(ready.request, target, scratch, data=data, prepared=ready.prepared)

    def _state(self, consumed: int) -> StreamState:
        return self.clips.state(consumed)

    def _restart(self, consumed: int) -> None:
        self._is_restarting = True
        planning = self._planning
        if planning is not None and self._began_in == os.getpid() and not planning.cancel():
            wait([planning])
        self._planning = None
        for ahead in list(self._ahead):
            for filling in ahead.filling:
                filling.cancel()
            for feeding in ahead.feedings:
                feeding.cancel()
        self._ahead.clear()
        self._consumed = consumed
        self._is_restarting = False

    def _is_past_end(self, position: int) -> bool:
        return self._schedule.is_past_end(position)


def _world(rank: int | None, world_size: int | None) -> World:
    if (rank is None) != (world_size is None):
        raise UsageError("give both rank and world_size, or neither to take them from torch.distributed")
    if rank is not None and world_size is not None:
        return World(rank=rank, size=world_size)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return World(rank=distributed.get_rank(), size=distributed.get_world_size())
    return World()
