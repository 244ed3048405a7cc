"""Rows for every window, batch by batch in stored order, the same on any number of ranks, and their means group by group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.beyond.opened import Opened
from train.beyond.places import together
from train.evaluate import NonFiniteError

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Some windows that follow each other.

    Attributes:
        window: their numbers.
        run: places of their runs in the selection.
        values: (n, width) what was computed of each.
    """

    window: NDArray[np.int64]
    run: NDArray[np.int64]
    values: NDArray[Any]


def in_order(opened: Opened, compute: Callable[["Batch"], torch.Tensor]) -> Iterator[Rows]:
    """What is computed of all windows, on every rank; where that fails on one, every rank raises before an exchange.

    Args:
        opened: a network before data.
        compute: (samples, width) on the host, of a batch on the device; called without gradients.

    Raises:
        NonFiniteError: a number is not finite.
    """
    number = {run.name: place for place, run in enumerate(opened.clips.runs)}
    batches, seen = opened.batches(), 0
    while (found := together(opened.world, lambda: _computed(next(batches, None), compute, number))) is not None:
        # Ranks hold consecutive shares of a batch: in their order, rows are in that of the windows.
        keys, rows = (opened.world.gather(part) for part in found)
        window, run = np.ascontiguousarray(keys.numpy().T)
        assert np.array_equal(window, np.arange(seen, seen + len(window))), "windows come once, in order"
        seen += len(window)
        values = rows.numpy()
        if not np.isfinite(values).all():
            bad = window[~np.isfinite(values).all(axis=1)]
            raise NonFiniteError(f"what the network gives for windows {bad[:8].tolist()} is not finite; look at them")
        yield Rows(window=window, run=run, values=values)
    assert seen == opened.clips.num_windows, "every window has come"


def _computed(
    batch: "Batch | None", compute: Callable[["Batch"], torch.Tensor], number: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if batch is None:
        return None
    with torch.inference_mode():
        rows = compute(batch)
    valid = batch.valid.cpu()
    runs = torch.tensor([number[name] for name in batch.run], dtype=torch.int64)
    return torch.stack([batch.window.cpu(), runs], dim=1)[valid], rows[valid]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """The mean of the rows of one run or one subject."""

    of: Any
    rows: int
    mean: Floats


class Means:
    """The mean of rows that come group by group, in float64."""

    def __init__(self, width: int) -> None:
        self._sum, self._count = np.zeros(width), 0
        self._group: Any = None

    def take(self, group: Any, row: NDArray[Any]) -> Group | None:
        """Take in a row; gives the group before, where this one is another."""
        done = self.finish() if self._count and group != self._group else None
        self._group = group
        self._sum += row
        self._count += 1
        return done

    def finish(self) -> Group | None:
        """What was taken since the last one."""
        if not self._count:
            return None
        done = Group(of=self._group, rows=self._count, mean=self._sum / self._count)
        self._sum, self._count = np.zeros(len(self._sum)), 0
        return done
