"""A forked process has its parent's network clients and none of the threads that they live by: said before it hangs."""

import os
from typing import Any

from fmristream.errors import UsageError
from fmristream.storage.urls import scheme_of

# Files and this process's own memory survive a fork; sockets, event loops and their threads do not.
_SAFE = frozenset({"file", "memory"})


class ForkGuard:
    """Remembers which process opened a store. Pickled, as spawn and forkserver do, it starts anew."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return ForkGuard, (self._url,)

    def check(self) -> None:
        """Raise UsageError where the store is remote and another process opened it."""
        if self._process != os.getpid() and scheme_of(self._url) not in _SAFE:
            raise UsageError(
                f"{self._url}: opened in process {self._process} and read in {os.getpid()}, which was forked from it: network "
                "clients do not survive a fork; pass multiprocessing_context='forkserver' (or 'spawn') to the DataLoader"
            )
