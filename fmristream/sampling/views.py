"""The second view of a sample: another clip of the same run or subject, that shares no frame with the first."""

import numpy as np
from numpy.typing import NDArray

from fmristream.sampling.keys import below
from fmristream.sampling.window import Frames, Numbers, Window

VIEWS = ("same-run", "same-subject")


class Partners:
    """Draws second views: every first frame that leaves the views apart is as likely as any other.

    Args:
        frames: frames of each run.
        window: length and step of a view.
        groups: (runs,) number of the run or subject that both views come from.
    """

    def __init__(self, frames: Frames, window: Window, groups: NDArray[np.int64]) -> None:
        self._span = window.span
        self._legal = np.maximum(0, np.asarray(frames, dtype=np.int64) - window.span + 1)
        self._order = np.argsort(groups, kind="stable")
        self._cum = np.concatenate([[0], np.cumsum(self._legal[self._order])])
        rank = np.empty_like(self._order)
        rank[self._order] = np.arange(len(rank))
        ordered = groups[self._order]
        self._own = self._cum[rank]
        self._base = self._cum[np.searchsorted(ordered, groups, side="left")]
        self._stop = self._cum[np.searchsorted(ordered, groups, side="right")]

    @property
    def is_alone(self) -> NDArray[np.bool_]:
        """(runs,) where no other run of the group is long enough for a view."""
        alone: NDArray[np.bool_] = self._stop - self._base == self._legal
        return alone

    def draw(self, runs: Numbers, starts: Numbers, items: Numbers, *, key: int) -> tuple[Numbers, Numbers]:
        """(runs, first frames) of the second views of some first ones.

        Args:
            runs: of the first views.
            starts: their first frames.
            items: what each is drawn for; equal items under one key get equal draws.
            key: of the epoch.
        """
        low = self._own[runs] - self._base[runs] + np.maximum(0, starts - self._span + 1)
        high = self._own[runs] - self._base[runs] + np.minimum(self._legal[runs], starts + self._span)
        free = self._stop[runs] - self._base[runs] - (high - low)
        assert (free > 0).all(), "windows without room for a second view are not counted"
        drawn = below(free, items, key=key)
        drawn += np.where(drawn >= low, high - low, 0) + self._base[runs]
        places = np.searchsorted(self._cum, drawn, side="right") - 1
        return self._order[places], drawn - self._cum[places]
