"""A store whose k-th call fails, once: before anything happened, or after it happened and only the answer was lost."""

from collections.abc import Sequence
from typing import Self

from fmristream.errors import StorageError
from fmristream.storage import NewObject, Store, Unfinished


class FailingStore:
    """Hands calls on to another store; call number `fail_at` (from 1) raises StorageError."""

    def __init__(self, inner: Store, *, fail_at: int = 0, answer_lost: bool = False) -> None:
        self._inner = inner
        self._fail_at = fail_at
        self._answer_lost = answer_lost
        self.calls = 0

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def has_failed(self) -> bool:
        return 0 < self._fail_at <= self.calls

    def call(self, verb: str, action, *arguments):
        """Run a call, or fail in its place."""
        self.calls += 1
        fails = self.calls == self._fail_at
        if fails and not self._answer_lost:
            raise StorageError(f"{self.name}: call {self.calls}, {verb}, failed as the test wanted")
        result = action(*arguments)
        if fails:
            raise StorageError(f"{self.name}: call {self.calls}, {verb}, was done and its answer lost")
        return result

    def put_new(self, key: str, data: bytes) -> None:
        self.call("put_new", self._inner.put_new, key, data)

    def stream_new(self, key: str) -> NewObject:
        self.call("stream_new", lambda: None)  # asks no server anything: there is no answer to lose
        return FailingNewObject(self, self._inner.stream_new(key))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self.call("read_range", self._inner.read_range, key, start, stop)

    def read(self, key: str) -> bytes:
        return self.call("read", self._inner.read, key)

    def replace_hint(self, key: str, data: bytes) -> None:
        self.call("replace_hint", self._inner.replace_hint, key, data)

    def size(self, key: str) -> int:
        return self.call("size", self._inner.size, key)

    def list(self, prefix: str) -> list[str]:
        return self.call("list", self._inner.list, prefix)

    def delete(self, key: str) -> None:
        self.call("delete", self._inner.delete, key)

    def unfinished(self) -> Sequence[Unfinished]:
        return self.call("unfinished", self._inner.unfinished)

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        self.call("discard_unfinished", self._inner.discard_unfinished, unfinished)

    def keeps_removed(self) -> bool | None:
        return self.call("keeps_removed", self._inner.keeps_removed)


class FailingNewObject:
    """An object being written through a failing store."""

    def __init__(self, store: FailingStore, inner: NewObject) -> None:
        self._store = store
        self._inner = inner

    def write(self, data: bytes | memoryview) -> None:
        self._store.call("write", self._inner.write, data)

    def commit(self) -> None:
        self._store.call("commit", self._inner.commit)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._inner.__exit__(*exc)
