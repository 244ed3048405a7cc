"""One clip: which frames of which run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Frames `start`, `start + step`, ... of a run, `length` of them.

    Attributes:
        run: position of the run in the selection.
        start: first frame.
        length: frames of the clip.
        step: frames from one to the next: 1 for consecutive ones.
    """

    run: int
    start: int
    length: int
    step: int = 1

    @property
    def frames(self) -> range:
        """The frames' numbers in their run."""
        return range(self.start, self.start + self.length * self.step, self.step)

    @property
    def stop(self) -> int:
        """The frame after the last one."""
        return self.frames[-1] + 1
