"""Windows of consecutive frames: how many a run holds, and which one a number means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Which frames make one clip: `length` of them, a new clip every `stride` frames."""

    length: int
    stride: int

    def __post_init__(self) -> None:
        if self.length < 1 or self.stride < 1:
            raise UsageError(f"window {self.length} with stride {self.stride}: expected 1 or more frames each")

    def count_in(self, frames: int) -> int:
        """Windows that fit into a run; 0 where it is shorter than one."""
        return max(0, (frames - self.length) // self.stride + 1)


class WindowTable:
    """Windows of many runs, numbered 0 to `total` - 1 in the order of the runs.

    Args:
        frames: frames of each run.
        window: their common length and stride.
    """

    def __init__(self, frames: Sequence[int], window: Window) -> None:
        self.window = window
        self.counts = np.array([window.count_in(count) for count in frames], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def total(self) -> int:
        """Number of windows."""
        return int(self._first[-1])

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(run positions, first frames) of window numbers."""
        runs: NDArray[Any] = np.searchsorted(self._first, numbers, side="right") - 1
        return runs, (numbers - self._first[runs]) * self.window.stride
