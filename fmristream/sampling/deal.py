"""Who gets which position: batches are dealt by global position, so that no world size changes what is in batch k."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.order import order_key, permute


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UsageError(f"rank {self.rank} of a world of {self.size}: expected 0 <= rank < world size")

    def share(self, count: int) -> tuple[int, int]:
        """[start, stop) of `count` consecutive samples that this rank takes; shares differ by one at most."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Positions 0, 1, 2, ... mean windows: epoch after epoch in shuffled order, or once in stored order.

    Attributes:
        windows: windows in the selection.
        batch_size: global: samples of one batch over all ranks.
        seed: None for stored order, one pass, last batch padded with invalid samples.
        selection_digest: what the order is keyed by.
    """

    windows: int
    batch_size: int
    seed: int | None
    selection_digest: str

    def epoch_of(self, position: int) -> int:
        """Epoch that a position lies in."""
        return position // self.windows if self.seed is not None else 0

    def batches_in(self, epoch: int, *, consumed: int = 0) -> int:
        """Batches that start in an epoch, never cut at its end: the same on every rank.

        Args:
            epoch: which one.
            consumed: a position at which a batch starts; others do a whole number of batches away.
        """
        phase = consumed % self.batch_size
        first, last = (-((phase - e * self.windows) // self.batch_size) for e in (epoch, epoch + 1))
        return last - first

    def windows_at(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(window number, valid) of positions [start, stop)."""
        positions = np.arange(start, stop, dtype=np.int64)
        if self.seed is None:
            valid = positions < self.windows
            return np.where(valid, positions, self.windows - 1), valid
        epochs = positions // self.windows
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            key = order_key(self.selection_digest, seed=self.seed, epoch=epoch)
            numbers[inside] = permute(positions[inside] % self.windows, size=self.windows, key=key)
        return numbers, np.ones(len(positions), dtype=bool)

    def batch(self, position: int, world: World) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(window number, valid) of this rank's share of the batch that starts at a position."""
        start, stop = world.share(self.batch_size)
        return self.windows_at(position + start, position + stop)


def check_schedule(schedule: Schedule, sizes: Sequence[int]) -> None:
    """Raise UsageError where a world could not be served equally.

    Args:
        schedule: what is going to be dealt.
        sizes: world sizes that will be used.
    """
    if schedule.windows < 1:
        raise UsageError(
            "the selection holds no window: its runs are shorter than the window, or the split is empty; "
            "choose a shorter window or another split"
        )
    for size in sizes:
        if schedule.batch_size < size:
            raise UsageError(
                f"batch_size {schedule.batch_size} is global and smaller than the world of {size} ranks: some would get "
                f"nothing; use batch_size >= {size}"
            )
