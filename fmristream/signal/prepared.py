"""What becomes of stored values: the seam between the recipes of normalisation and those who read frames."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run


class RunSource(Protocol):
    """What a recipe may ask of a run."""

    @property
    def run(self) -> Run: ...

    @property
    def is_difference(self) -> bool:
        """Whether frames come as residuals against `reference`: for integers."""
        ...

    @property
    def reference(self) -> NDArray[Any]:
        """(v,) in the stored dtype."""
        ...

    @property
    def moments(self) -> NDArray[Any]:
        """(2, v): temporal mean minus reference (mean for floats), temporal SD; stored units."""
        ...

    @property
    def exact_moments(self) -> NDArray[Any]:
        """(2, v) float32: the same in full precision."""
        ...

    def read_stored(self, start: int, stop: int) -> NDArray[Any]:
        """Frames [start, stop) as the source stored them, (t, v), reference added, unscaled."""
        ...


class Prepared(Protocol):
    """A recipe made ready for one run; any number of threads may call it."""

    @property
    def channels(self) -> int: ...

    @property
    def fill(self) -> NDArray[np.float32]:
        """(c,) what stands outside the mask."""
        ...

    @property
    def is_framewise(self) -> bool:
        """Whether what becomes of a frame depends on that frame alone, so that frames may come one by one."""
        ...

    def __call__(self, stored: NDArray[Any], frames: range, out: NDArray[np.float32]) -> None:
        """Write what becomes of frames.

        Args:
            stored: (t, v) residuals where the run has a reference, else values; may be overwritten.
            frames: their numbers in the run.
            out: (c, t, v).
        """
        ...
