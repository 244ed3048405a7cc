"""Checkpoints are written while training goes on: one at a time, and what goes wrong is known to all ranks at the next step."""

import os
import secrets
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
import torch.distributed as dist

from fmristream.errors import FmriStreamError, StorageError, UsageError
from train.checkpoint_shelf import open_shelf
from train.checkpoint_writing import Keep, Snapshot, alone, mark_best, said, write
from train.fence import Fence, SupersededError
from train.launch import World

T = TypeVar("T")

# Between two words of a rank that is not done: below any group's timeout, so that slow storage ends no run.
_BEAT_S = 0.5
# Of ranks that wait for each other's files. Who dies or hangs is noticed by the training's own group long before.
_PATIENCE_S = 3600.0
# Of one of several ranks, for its own writing, when the run is failing: the others shall be gone within 30 s.
_LAST_WAIT_S = 10.0
# How ranks tell each other of this error, which is another one than a failure to write.
_SUPERSEDED = "superseded: "
# Between two looks for a newer attempt: a lost world must not train for hours until its next checkpoint is refused.
_LOOK_S = 15.0


class Job(Generic[T]):
    """Work in a thread of its own, with what came of it."""

    def __init__(self, work: Callable[[], T], *, name: str) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: list[T] = []
        self.error: BaseException | None = None
        # A daemon: one that waits for a dead rank must not keep the process; `wait` is what ends it in order.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # handed to who waits
            self.error = error
        finally:
            self._done.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is done, after so long at most."""
        if self._done.wait(seconds):
            self._thread.join()
            return True
        return False

    @property
    def has_failed(self) -> bool:
        """Whether it is known to have failed by now."""
        return self._done.is_set() and self.error is not None

    @property
    def result(self) -> T:
        """What it gave; it is done and has not failed."""
        return self._result[0]


def finish_together(job: Job[T], world: World, *, what: str) -> T:
    """Wait until every rank's job is done, however long that takes as long as all ranks live; what this rank's gave.

    Args:
        job: this rank's.
        world: all ranks.
        what: was being done, for the error of other ranks.

    Raises:
        SupersededError: a rank knows that this attempt is superseded; every rank raises it.
        StorageError: it failed on another rank; who did raises the error itself.
    """
    while True:
        is_done = job.wait(_BEAT_S if world.size > 1 else None)
        if bool(world.stack(torch.tensor([int(is_done)])).all()):
            break
    failed = world.stack(torch.tensor([int(job.error is not None)])).flatten().tolist()
    if any(failed):
        reasons = gather_texts("" if job.error is None else _reason(job.error), world)
        if job.error is not None:
            raise job.error
        for reason in reasons:
            if reason.startswith(_SUPERSEDED):
                raise SupersededError(reason.removeprefix(_SUPERSEDED))
        told = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
        raise StorageError(f"{what} failed: {told}")
    return job.result


def together(work: Callable[[], T], world: World, *, what: str) -> T:
    """Do something on every rank that may take long; an error on one is an error on all."""
    return finish_together(Job(work, name="checkpoint-reader"), world, what=what)


def shared_token(world: World) -> str:
    """A name for one attempt to write a checkpoint, the same on every rank."""
    return f"{world.from_main(secrets.randbits(32)):08x}"


def gather_texts(text: str, world: World, group: Any = None) -> list[str]:
    """One text from every rank, in rank order, on every rank."""
    if world.size == 1:
        return [text]
    data = text.encode()
    lengths = _all_gather(torch.tensor([len(data)]), world, group)
    longest = max(1, *(int(length) for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    parts = _all_gather(padded, world, group)
    return [part[: int(length)].numpy().tobytes().decode() for part, length in zip(parts, lengths, strict=True)]


def _all_gather(tensor: torch.Tensor, world: World, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor, group=group)
    return parts


def _reason(error: BaseException) -> str:
    if isinstance(error, SupersededError):
        return f"{_SUPERSEDED}{error}"
    return said(error) if isinstance(error, Exception) else type(error).__name__


class Saver:
    """Writes the checkpoints of a run; leaving the `with` block waits for the last one.

    Args:
        place: folder or URL.
        world: all ranks; each makes its own.
        keep: which ones stay.
    """

    def __init__(self, place: str | os.PathLike[str], world: World, *, keep: Keep) -> None:
        self.shelf = open_shelf(place)
        self._world = world
        self._keep = keep
        self._job: Job[None] | None = None
        self._group: Any = None
        self.saved_step: int | None = None
        self.seen: list[int] = []  # steps that were there when rank 0 looked for the newest one
        self.fence: Fence | None = None  # rank 0's, as soon as the attempt has begun
        self._watch: Watch | None = None
        self._is_best = False
        if world.size > 1 and self.shelf.where.startswith("memory://"):
            raise UsageError(
                f"{self.shelf.where}: is the memory of one process, and this run has {world.size}; give a folder or s3://"
            )

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that writing failed, or would be wrong; the others hear of it from `settle`."""
        if self._watch is not None and self._watch.is_superseded:
            return True
        return self._job is not None and self._job.has_failed

    def begin(self, fence: Fence | None) -> None:
        """Write as this attempt from now on, and look for newer ones; rank 0 has the fence."""
        self.fence = fence
        self._watch = Watch(fence) if fence is not None else None

    def require_current(self) -> None:
        """Raise SupersededError on every rank where a newer attempt has begun; all ranks call it together."""
        together(self._look, self._world, what=f"{self.shelf.where}: looking for newer attempts")

    def _look(self) -> None:
        if self.fence is not None:
            self.fence.check()

    def start(self, snapshot: Snapshot) -> None:
        """Write a snapshot from now on; the one before is settled. All ranks call it together."""
        assert self._job is None
        self.saved_step, self._is_best = snapshot.step, snapshot.is_best
        if snapshot.is_shared and self._group is None:
            # Its messages come from another thread than those of training, and must not meet them.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE_S))
        if snapshot.is_shared or self._world.is_main:
            self._job = Job(lambda: self._write(snapshot), name="checkpoint-writer")

    def _write(self, snapshot: Snapshot) -> None:
        exchange = (lambda text: gather_texts(text, self._world, self._group)) if snapshot.is_shared else alone
        write(self.shelf, snapshot, keep=self._keep, exchange=exchange, fence=self.fence)

    def settle(self) -> None:
        """Wait until what was started is there; all ranks call it together.

        Raises:
            StorageError: it could not be written, on whichever rank.
        """
        is_superseded = self._watch is not None and self._watch.is_superseded
        job = self._job or Job(self._look if is_superseded else _nothing, name="checkpoint-none")
        what = f"{self.shelf.where}: writing the checkpoint of step {self.saved_step}"
        try:
            finish_together(job, self._world, what=what)
        finally:
            if job.wait(0):  # else another rank died, and leaving waits for this one's writing
                self._job = None

    def mark_best(self) -> None:
        """Say that the one that was saved last, and is settled, is the best so far; all ranks call it together."""
        assert self.saved_step is not None
        if self._is_best:
            return
        self._is_best = True
        if self._world.is_main:
            step = self.saved_step
            self._job = Job(
                lambda: mark_best(self.shelf, step, keep=self._keep, fence=self.fence), name="checkpoint-writer"
            )
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._job is None:
            return
        if kind is None:
            self.settle()
        else:  # what went wrong first is what people have to know
            self._job.wait(_LAST_WAIT_S if self._world.size > 1 else None)


class Watch:
    """Looks now and then, in a thread of its own, whether an attempt is superseded."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence
        self._closed = threading.Event()
        self.is_superseded = False
        threading.Thread(target=self._run, name="checkpoint-watch", daemon=True).start()

    def _run(self) -> None:
        while not self._closed.wait(_LOOK_S) and not self.is_superseded:
            try:
                self._fence.check()
            except SupersededError:
                self.is_superseded = True
            except (FmriStreamError, OSError):  # a look that fails says nothing; the next checkpoint will
                continue

    def close(self) -> None:
        """Look no more."""
        self._closed.set()


def _nothing() -> None:
    return None
