"""Which frames make clips: windows at equal distances, clips at events, whole runs; and what their numbers mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.keys import below

Numbers = NDArray[np.int64]
Frames = Sequence[int] | Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Which frames make one clip: `length` of them, `step` apart, a new clip every `stride` frames."""

    length: int
    stride: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.stride < 1 or self.step < 1:
            raise UsageError(
                f"window {self.length} with stride {self.stride} and step {self.step}: expected 1 or more frames each"
            )

    @property
    def span(self) -> int:
        """Frames from the first to behind the last one."""
        return (self.length - 1) * self.step + 1

    def count_in(self, frames: int) -> int:
        """Windows that fit into a run; 0 where it is shorter than one."""
        return max(0, (frames - self.span) // self.stride + 1)


class ClipTable(Protocol):
    """Clips of many runs, numbered 0 to `total` - 1 in the order of the runs."""

    counts: Numbers  # (runs,)
    first: Numbers  # (runs + 1,) number of each run's first clip; the last entry is the total

    @property
    def total(self) -> int: ...

    @property
    def longest(self) -> int:
        """Frames of the longest clip."""
        ...

    def locate(self, numbers: Numbers, *, phase_key: int | None = None) -> tuple[Numbers, Numbers, Numbers]:
        """(run positions, first frames, lengths) of clip numbers; with a key, first frames are shifted by it."""
        ...


class WindowTable:
    """Windows at equal distances.

    Shifted windows stay inside their run, and no two numbers can mean the same frames: each legal first frame belongs to
    one number. Memory is a few numbers a run, however many windows there are.

    Args:
        frames: frames of each run.
        window: their common length, stride and step.
        is_alone: (runs,) where a second view has to come from the same run: windows that leave no room for one beside them
            are not counted, and shifted ones keep that room.
    """

    def __init__(self, frames: Frames, window: Window, *, is_alone: NDArray[np.bool_] | None = None) -> None:
        self.window = window
        stored = np.asarray(frames, dtype=np.int64)
        span, stride = window.span, window.stride
        fitting = np.maximum(0, (stored - span) // stride + 1)
        self._last = stored - span
        self._low, self._skip, self._is_tight = fitting, np.zeros_like(fitting), np.zeros(len(fitting), dtype=bool)
        if is_alone is not None:
            # From 3 spans - 1 on, there is room beside a window wherever it lies.
            self._is_tight = is_alone & (stored < 3 * span - 1)
            low = np.clip((stored - 2 * span) // stride + 1, 0, fitting)  # with room behind them
            high = np.minimum(-(-span // stride), fitting)  # the first with room before it
            self._low = np.where(self._is_tight, low, fitting)
            self._skip = np.where(self._is_tight, np.maximum(0, high - low), 0)
        self.counts = fitting - self._skip
        self.first = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def total(self) -> int:
        """Number of windows."""
        return int(self.first[-1])

    @property
    def longest(self) -> int:
        """Frames of a window."""
        return self.window.length

    def locate(self, numbers: Numbers, *, phase_key: int | None = None) -> tuple[Numbers, Numbers, Numbers]:
        """(run positions, first frames, lengths) of window numbers.

        Args:
            numbers: in [0, total).
            phase_key: shifts all windows of a run by one number of frames below the stride, the last of a run by as
                much less as there is less room behind it.
        """
        runs: Numbers = np.searchsorted(self.first, numbers, side="right") - 1
        inside = numbers - self.first[runs]
        is_low = inside < self._low[runs]
        starts = np.where(is_low, inside, inside + self._skip[runs]) * self.window.stride
        if phase_key is not None:
            last = self._last[runs] - np.where(is_low & self._is_tight[runs], self.window.span, 0)
            phases = below(np.array([self.window.stride]), runs, key=phase_key)
            starts = starts + phases * np.minimum(self.window.stride, last - starts + 1) // self.window.stride
        return runs, starts, np.full_like(runs, self.window.length)


class EventTable:
    """Clips that begin at given frames.

    Args:
        starts: of each run, first frames in order.
        window: length and step.
    """

    def __init__(self, starts: Sequence[Numbers], window: Window) -> None:
        self.window = window
        self.counts = np.array([len(some) for some in starts], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.starts = np.concatenate([np.zeros(0, dtype=np.int64), *starts])

    @property
    def total(self) -> int:
        """Number of clips."""
        return int(self.first[-1])

    @property
    def longest(self) -> int:
        """Frames of a clip."""
        return self.window.length

    def locate(self, numbers: Numbers, *, phase_key: int | None = None) -> tuple[Numbers, Numbers, Numbers]:
        """(run positions, first frames, lengths) of clip numbers; nothing shifts them."""
        runs: Numbers = np.searchsorted(self.first, numbers, side="right") - 1
        return runs, self.starts[numbers], np.full_like(runs, self.window.length)


class WholeRuns:
    """Each run as one clip.

    Args:
        frames: frames of each run.
        step: frames from one to the next.
        longer_than: frames of a clip that are not enough: a context that leaves nothing to predict.
    """

    def __init__(self, frames: Frames, *, step: int = 1, longer_than: int = 0) -> None:
        self._lengths = -(-np.asarray(frames, dtype=np.int64) // step)
        self.counts = (self._lengths > longer_than).astype(np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def total(self) -> int:
        """Number of runs that are long enough."""
        return int(self.first[-1])

    @property
    def longest(self) -> int:
        """Frames of the longest clip."""
        return int(self._lengths[self.counts > 0].max(initial=0))

    def locate(self, numbers: Numbers, *, phase_key: int | None = None) -> tuple[Numbers, Numbers, Numbers]:
        """(run positions, first frames, lengths): all of the run; nothing shifts it."""
        runs: Numbers = np.searchsorted(self.first, numbers, side="right") - 1
        return runs, np.zeros_like(runs), self._lengths[runs]
