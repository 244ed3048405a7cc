"""What is kept of runs between their windows: recipes made ready, under a bound in bytes."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")

# How far below a value arrays are looked for: a recipe holds vectors, and the reader of its run, which holds others.
_DEPTH = 3


class Kept(Generic[T]):
    """The values used last, by name; any number of threads may ask, and whoever comes first computes.

    Args:
        limit_bytes: what the arrays of all values may hold together; the newest value stays whatever it holds.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._values: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._held_bytes = 0
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._limit_bytes,)  # another process computes its own

    @property
    def held_bytes(self) -> int:
        """What the arrays of all values held when they were last looked at."""
        return self._held_bytes

    def get(self, name: str, compute: Callable[[], T]) -> T:
        """The value of this name."""
        with self._lock:
            held = self._values.get(name)
            if held is not None:
                self._values.move_to_end(name)
                return held[0]
        value = compute()  # beside the lock: it reads
        with self._lock:
            if name not in self._values:
                self._measure_newest()  # what it has read since is counted now
                self._values[name] = value, 0
                self._measure_newest()
                while self._held_bytes > self._limit_bytes and len(self._values) > 1:
                    self._held_bytes -= self._values.popitem(last=False)[1][1]
            return self._values[name][0]

    def drop(self, name: str) -> None:
        """Forget a value."""
        with self._lock:
            if name in self._values:
                self._held_bytes -= self._values.pop(name)[1]

    def _measure_newest(self) -> None:
        if self._values:
            name = next(reversed(self._values))
            value, counted = self._values[name]
            held = held_bytes(value)
            self._values[name] = value, held
            self._held_bytes += held - counted


def held_bytes(value: Any) -> int:
    """Bytes of all arrays that a value holds, in its fields and theirs."""
    found: dict[int, int] = {}
    _look(value, found, set(), _DEPTH)
    return sum(found.values())


def _look(value: Any, found: dict[int, int], seen: set[int], depth: int) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        owner = value if value.base is None or not isinstance(value.base, np.ndarray) else value.base
        found[id(owner)] = owner.nbytes
    elif depth and isinstance(value, (tuple, list)):
        for part in value:
            _look(part, found, seen, depth - 1)
    elif depth and type(value).__module__.startswith("fmristream."):
        for name in getattr(type(value), "__slots__", ()):
            _look(getattr(value, name, None), found, seen, depth - 1)
        for part in list(getattr(value, "__dict__", {}).values()):
            _look(part, found, seen, depth - 1)
