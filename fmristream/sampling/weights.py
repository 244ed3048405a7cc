"""How often each window comes in an epoch, as whole numbers that add up: quotas by systematic rounding."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.keys import below, key_of
from fmristream.sampling.window import Numbers

# Shares are rounded to 2^-40 of a group or of all: below one sample in 10^12.
_BITS = 40
# A batch may reach over the ends of some epochs.
_EPOCHS_KEPT = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quotas:
    """Shares of an epoch's samples.

    Each run gets its share of the samples, rounded down or up, so that any stretch of `order` gets its share rounded
    down or up as well; each of its windows comes as often as any other of it, or once more. Which are rounded up changes
    from epoch to epoch, so that over many of them everything comes as often as its weight says.

    Attributes:
        samples: of an epoch.
        order: (runs,) in which shares are added up: those that are to be balanced lie together.
        edges: (runs + 1,) added shares, in whole units.
        counts: (runs,) windows of each run.
        first: (runs,) number of each run's first window.
    """

    samples: int
    order: Numbers
    edges: Numbers
    counts: Numbers
    first: Numbers
    _kept: dict[int, Numbers] = field(default_factory=dict, repr=False)  # of the epochs used last

    @property
    def digest(self) -> str:
        """Of the shares and the runs they belong to."""
        parts = (self.order.astype("<i8"), self.edges.astype("<i8"))
        head = f"fmristream-quotas-v1|{self.samples}|{len(self.order)}|".encode()
        return hashlib.sha256(head + b"".join(part.tobytes() for part in parts)).hexdigest()

    def windows(self, slots: Numbers, *, key: int) -> Numbers:
        """Window numbers of places in [0, samples) of an epoch, the places of a run next to each other."""
        ends = self._ends(key)
        places = np.searchsorted(ends, slots, side="right") - 1
        runs = self.order[places]
        quota, count = ends[places + 1] - ends[places], self.counts[runs]
        # Points at equal distances over the windows, from a random beginning.
        begin = below(count, runs, key=key)
        inside: Numbers = ((slots - ends[places]) * count + begin) // quota
        return self.first[runs] + inside

    def _ends(self, key: int) -> Numbers:
        """(runs + 1,) samples of an epoch up to each run: shares rounded at one random offset for all."""
        ends = self._kept.get(key)
        if ends is None:
            total = int(self.edges[-1])
            offset = key_of("fmristream-rounding-v1", key) * total >> 64
            # Python's integers: products of shares and samples do not fit 64 bits.
            ends = np.array([(edge * self.samples + offset) // total for edge in self.edges.tolist()], dtype=np.int64)
            if len(self._kept) >= _EPOCHS_KEPT:
                self._kept.clear()
            self._kept[key] = ends
        return ends


def balanced(groups: NDArray[np.int64], counts: Numbers, first: Numbers) -> Quotas:
    """Equal shares for every group that has windows, by windows within it.

    Args:
        groups: (runs,) number of each run's group, -1 for none: such runs get nothing.
        counts: (runs,) windows.
        first: (runs,) number of each run's first window.
    """
    used = (groups >= 0) & (counts > 0)
    order = np.flatnonzero(used)[np.argsort(groups[used], kind="stable")]
    _, own = np.unique(groups[order], return_inverse=True)
    totals = np.bincount(own, weights=counts[order]).astype(np.int64) if len(order) else np.zeros(0, dtype=np.int64)
    edges, inside, group = [0], 0, -1
    for mine, count in zip(own.tolist(), counts[order].tolist(), strict=True):
        inside = count if mine != group else inside + count
        group = mine
        edges.append((mine << _BITS) + (inside << _BITS) // int(totals[mine]))
    shares = np.array(edges, dtype=np.int64)
    return Quotas(samples=int(counts[used].sum()), order=order, edges=shares, counts=counts, first=first)


def weighted(weights: Sequence[float] | NDArray[np.float64], counts: Numbers, first: Numbers) -> Quotas:
    """Shares by a weight of each run's windows.

    Args:
        weights: (runs,) how often a window of the run comes, relative to the others; 0 for never.
        counts: (runs,) windows.
        first: (runs,) number of each run's first window.

    Raises:
        UsageError: they are not one finite number of 0 or more a run, or all 0.
    """
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != counts.shape or not np.isfinite(given).all() or (given < 0).any():
        raise UsageError(
            f"weights of shape {given.shape}: expected one finite number of 0 or more for each of the {len(counts)} runs "
            "of the selection, in the order of clips.runs"
        )
    mass = given * counts
    order = np.flatnonzero(mass > 0)
    if not len(order):
        raise UsageError("the weights of all runs that have a window are 0; give some run a weight")
    added = np.cumsum(mass[order])
    edges = np.concatenate([[0], np.rint(added / added[-1] * 2.0 ** (_BITS + 12))]).astype(np.int64)
    return Quotas(samples=int(counts[order].sum()), order=order, edges=edges, counts=counts, first=first)
