"""Batches in a fixed global order, fetched ahead by threads inside the rank's process. One of two importers of torch."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import local
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.deal import Schedule, World, check_schedule
from fmristream.sampling.state import StreamState
from fmristream.stream.batch import Batch
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.pool import BatchPool
from fmristream.stream.window_reader import Scratch


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A batch being fetched."""

    batch: Batch
    filling: list[Future[None]]


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
        threads: fetching and decoding threads of this process.
        prefetch_batches: how many batches may be under way.

    Raises:
        UsageError: no window, or a batch smaller than the world.
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
    ) -> None:
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
        self._positions = torch.from_numpy(clips.positions) if clips.has_grid else None
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
            self._ahead.clear()
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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
        self._consumed = ahead.batch.position + self._schedule.batch_size
        self._fetch_ahead()
        return ahead.batch

    def _fetch_ahead(self) -> None:
        position = self._ahead[-1].batch.position + self._schedule.batch_size if self._ahead else self._consumed
        while len(self._ahead) < self._prefetch and not self._is_past_end(position):
            self._ahead.append(self._start(position))
            position += self._schedule.batch_size

    def _start(self, position: int) -> _Ahead:
        numbers, valid = self._schedule.batch(position, self.world)
        array, packed = self._pool.lend((len(numbers), self.clips.channels, self.clips.window, self.clips.voxels))
        fill = np.empty((len(numbers), self.clips.channels), dtype=np.float32)
        side = self.clips.side.empty(len(numbers), self.clips.window)
        filling = [
            # The tensor goes along so that its memory is not lent again before the last thread has written to it.
            self._threads.submit(
                self._fill, number, array[row], fill[row], {name: rows[row] for name, rows in side.items()}, packed
            )
            for row, number in enumerate(numbers.tolist())
        ]
        return _Ahead(self._describe(numbers, valid, packed, torch.from_numpy(fill), side, position), filling)

    def _fill(
        self,
        number: int,
        packed: NDArray[np.float32],
        fill: NDArray[np.float32],
        side: Mapping[str, NDArray[np.float32]],
        _lent: torch.Tensor,
    ) -> None:
        scratch = getattr(self._scratch, "buffers", None)
        if scratch is None:
            scratch = self._scratch.buffers = Scratch()
        self.clips.read_packed(number, packed, scratch)
        fill[:] = self.clips.fill(self.clips.locate(number)[0])
        self.clips.side.read(self.clips.clip(number), side)

    def _describe(
        self,
        numbers: NDArray[np.int64],
        valid: NDArray[np.bool_],
        packed: torch.Tensor,
        fill: torch.Tensor,
        side: Mapping[str, NDArray[np.float32]],
        position: int,
    ) -> Batch:
        places = torch.arange(len(numbers)) + position + self.world.share(self._schedule.batch_size)[0]
        located = [self.clips.locate(number) for number in numbers.tolist()]
        runs = [run for run, _ in located]
        return Batch(
            packed=packed,
            positions=self._positions,
            grid=self.clips.grid if self.clips.has_grid else None,
            fill=fill,
            valid=torch.from_numpy(valid),
            window=torch.from_numpy(numbers),
            start=torch.tensor([start for _, start in located], dtype=torch.int64),
            subject=[run.subject for run in runs],
            run=[run.name for run in runs],
            targets={
                target.name: torch.tensor([target.of(run.subject) for run in runs], dtype=torch.float32)
                for target in self.clips.targets
            },
            global_size=self._schedule.batch_size,
            position=position,
            side={name: torch.from_numpy(rows) for name, rows in side.items()},
            epoch=torch.tensor([self._epoch_at(place) for place in places.tolist()], dtype=torch.int64),
            sample=places,
            orientation=self.clips.orientation,
            voxel_sizes_mm=self.clips.voxel_sizes_mm,
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
        self._ahead.clear()
        self._consumed = consumed

    def _epoch_at(self, position: int) -> int:
        return self._schedule.epoch_of(position)

    def _is_past_end(self, position: int) -> bool:
        return self.clips.seed is None and position >= self._schedule.windows


def _world(rank: int | None, world_size: int | None) -> World:
    if (rank is None) != (world_size is None):
        raise UsageError("give both rank and world_size, or neither to take them from torch.distributed")
    if rank is not None and world_size is not None:
        return World(rank=rank, size=world_size)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return World(rank=distributed.get_rank(), size=distributed.get_world_size())
    return World()
