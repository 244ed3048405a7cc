"""Stores that watch or hold up what passes through them to a real one."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from fmristream.shards.dataset import Dataset
from fmristream.shards.generation import newest_generation
from fmristream.storage import NewObject, Store, Unfinished, open_store


class PassingStore:
    """A store that hands every call on to another one."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        return self.inner.name

    def put_new(self, key: str, data: bytes) -> None:
        self.inner.put_new(key, data)

    def stream_new(self, key: str) -> NewObject:
        return self.inner.stream_new(key)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self.inner.read_range(key, start, stop)

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def replace_hint(self, key: str, data: bytes) -> None:
        self.inner.replace_hint(key, data)

    def size(self, key: str) -> int:
        return self.inner.size(key)

    def list(self, prefix: str) -> list[str]:
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def unfinished(self) -> Sequence[Unfinished]:
        return self.inner.unfinished()

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        self.inner.discard_unfinished(unfinished)

    def keeps_removed(self) -> bool | None:
        return self.inner.keeps_removed()


class CountingStore(PassingStore):
    """Counts reads by kind and object, those of missing objects too, and the bytes that came."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes = 0
        self._lock = threading.Lock()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self._counted("read_range", key, lambda: self.inner.read_range(key, start, stop))

    def read(self, key: str) -> bytes:
        return self._counted("read", key, lambda: self.inner.read(key))

    def forget(self) -> None:
        """Start counting anew."""
        self.calls.clear()
        self.bytes = 0

    def _counted(self, verb: str, key: str, read: Callable[[], bytes]) -> bytes:
        with self._lock:
            self.calls[verb, key] += 1
        data = read()
        with self._lock:
            self.bytes += len(data)
        return data


class GatedStore(PassingStore):
    """Holds up one read of frames until it is let go; all others pass."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, int, int]] = []  # reads of frames, as they began
        self._passing: set[tuple[str, int, int]] | None = None
        self._lock = threading.Lock()
        self._gate = threading.Event()
        self.is_holding = threading.Event()

    def hold_other_than(self, passing: set[tuple[str, int, int]]) -> None:
        """Hold the first read that is none of these: how many threads read, and which of them is first, does not matter."""
        self._gate.clear()
        self.is_holding.clear()
        with self._lock:
            self._passing = passing

    def let_go(self) -> None:
        """Let the held read pass."""
        self._gate.set()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        if "/c/" in key:
            read = (key, start, stop)
            with self._lock:
                self.seen.append(read)
                is_held = self._passing is not None and read not in self._passing
                if is_held:
                    self._passing = None
            if is_held:
                self.is_holding.set()
                assert self._gate.wait(timeout=60), "the test never let the read go"
        return self.inner.read_range(key, start, stop)


def opened_through(url: str, kind: type[PassingStore]) -> Dataset:
    """The dataset at a URL, read through a store of this kind."""
    store = kind(open_store(url))
    return Dataset(url, store, newest_generation(store))
