"""Iterate in a thread: the next items are made while this one is being used."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")

# Items that wait: two even out that a frame takes longer to read than to write one time and shorter the next.
DEPTH = 2
# With so many waiting, one being used and one being made, this many exist at a time.
RING = DEPTH + 2

_JOIN_S = 0.05


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing that comes out of the thread, with what went wrong there."""

    error: BaseException | None = None


class ReadAhead(Generic[Item]):
    """The items of an iterator, in order, made by a thread; a context manager that ends the thread, whatever happened.

    An error of the iterator is raised here, once, in place of the next item. Leaving the block early stops the
    iterator after the item it is at, and waits for that.

    Args:
        items: used by the thread alone until the block is left.
        name: of the thread.
    """

    def __init__(self, items: Iterator[Item], *, name: str = "fmristream-read") -> None:
        self._items = items
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=DEPTH)
        self._is_stopped = threading.Event()
        # A daemon: if the process is torn down without leaving the block, it must not wait for a slow source.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __iter__(self) -> Iterator[Item]:
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_stopped.set()
        while self._thread.is_alive():
            self._drain()  # makes room, in case the thread waits for it
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        end = _End()
        try:
            for item in self._items:
                if self._is_stopped.is_set():
                    break
                self._queue.put(item)
        except BaseException as error:  # raised again by the side that takes the frames, which must not wait for ever
            end = _End(error)
        self._queue.put(end)

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get()
