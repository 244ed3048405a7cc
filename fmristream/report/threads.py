"""The same question put to many objects or runs at once, with bounded memory and a way to stop."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Reading, hashing and decoding release the GIL; eight in flight hide the latency of a bucket as well.
THREADS = max(2, min(8, os.cpu_count() or 1))


class Stopped(Exception):
    """Raised in a worker whose result nobody waits for any more."""


class Counter:
    """Adds up what workers did and tells one listener, one call at a time; raises `Stopped` once work was called off."""

    def __init__(self, listener: Callable[[int], None] | None) -> None:
        self.stop = threading.Event()
        self._listener = listener
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: int) -> None:
        """Count work that was just done."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._done += count
            if self._listener is not None:
                self._listener(self._done)


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], counter: Counter, *, threads: int = THREADS
) -> Iterator[Result]:
    """Yield each item's result in the order of the items; at most twice as many items as threads are under way."""
    waiting: deque[Future[Result]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fmristream-report")
    try:
        for item in islice(remaining, 2 * threads):
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
            for item in islice(remaining, 1):
                waiting.append(pool.submit(function, item))
    except BaseException:
        counter.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
