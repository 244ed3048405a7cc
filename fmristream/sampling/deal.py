"""Who gets which position: batches are dealt by global position, so that no world size changes what is in batch k."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.sampling.mixing import Turns
from fmristream.sampling.order import Locality, order_key, permute, permute_locally
from fmristream.sampling.weights import Quotas


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """What lies at some positions.

    Attributes:
        number: (n,) window number in its selection.
        slot: (n,) place in the epoch's list of samples: differs even where weights repeat a window.
        epoch: (n,) of its selection.
        source: (n,) which selection of a mixture; 0 where there is one.
        valid: (n,) False for the padding of a last batch.
    """

    number: NDArray[np.int64]
    slot: NDArray[np.int64]
    epoch: NDArray[np.int64]
    source: NDArray[np.int64]
    valid: NDArray[np.bool_]

    def part(self, start: int, stop: int) -> "Draws":
        """Those at places [start, stop)."""
        names = ("number", "slot", "epoch", "source", "valid")
        return Draws(**{name: getattr(self, name)[start:stop] for name in names})


class Order(Protocol):
    """What positions 0, 1, 2, ... mean."""

    @property
    def samples(self) -> int:
        """Of an epoch."""
        ...

    @property
    def is_shuffled(self) -> bool:
        """Whether epochs follow one another without end; else one pass."""
        ...

    def draws_at(self, start: int, stop: int) -> Draws:
        """What lies at positions [start, stop)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffledOrder:
    """Epoch after epoch, each in an order of its own.

    Attributes:
        samples: of an epoch: windows of the selection, or those that quotas give.
        seed: with the digest and the epoch the key of the order.
        selection_digest: what the order is keyed by.
        quotas: how often each window comes; once each where not given.
        locality: which windows stay together; none where not given.
    """

    samples: int
    seed: int
    selection_digest: str
    quotas: Quotas | None = None
    locality: Locality | None = None

    @property
    def is_shuffled(self) -> bool:
        return True

    def draws_at(self, start: int, stop: int) -> Draws:
        """What lies at positions [start, stop)."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs, inside = np.divmod(positions, self.samples)
        slots, numbers = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            key = order_key(self.selection_digest, seed=self.seed, epoch=epoch)
            if self.locality is None:
                slots[mine] = permute(inside[mine], size=self.samples, key=key)
            else:
                slots[mine] = permute_locally(inside[mine], size=self.samples, key=key, locality=self.locality)
            numbers[mine] = slots[mine] if self.quotas is None else self.quotas.windows(slots[mine], key=key)
        return Draws(
            number=numbers,
            slot=slots,
            epoch=epochs,
            source=np.zeros_like(positions),
            valid=np.ones(len(positions), dtype=bool),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredOrder:
    """Every window once in stored order; what lies behind the last one is padding."""

    samples: int

    @property
    def is_shuffled(self) -> bool:
        return False

    def draws_at(self, start: int, stop: int) -> Draws:
        """What lies at positions [start, stop)."""
        positions = np.arange(start, stop, dtype=np.int64)
        numbers, none = np.minimum(positions, self.samples - 1), np.zeros_like(positions)
        return Draws(number=numbers, slot=numbers, epoch=none, source=none, valid=positions < self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedOrder:
    """Several orders, taken in turns; each goes through its own epochs.

    Attributes:
        members: the orders.
        turns: whose turn it is.
    """

    members: tuple[ShuffledOrder, ...]
    turns: Turns

    @property
    def samples(self) -> int:
        """As many as all members have in one epoch of theirs."""
        return sum(member.samples for member in self.members)

    @property
    def is_shuffled(self) -> bool:
        return True

    def draws_at(self, start: int, stop: int) -> Draws:
        """What lies at positions [start, stop)."""
        sources, positions = self.turns.at(np.arange(start, stop, dtype=np.int64))
        number, slot, epoch = (np.empty_like(positions) for _ in range(3))
        for source in np.unique(sources).tolist():
            mine = sources == source
            own = positions[mine]  # they follow one another: nobody else has turns of this member
            drawn = self.members[source].draws_at(int(own[0]), int(own[-1]) + 1)
            number[mine], slot[mine], epoch[mine] = drawn.number, drawn.slot, drawn.epoch
        return Draws(number=number, slot=slot, epoch=epoch, source=sources, valid=np.ones(len(positions), dtype=bool))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Batches of an order.

    Attributes:
        order: what positions mean.
        batch_size: global: samples of one batch over all ranks.
    """

    order: Order
    batch_size: int

    def epoch_of(self, position: int) -> int:
        """Epoch that a position lies in."""
        return position // self.order.samples if self.order.is_shuffled else 0

    def batches_in(self, epoch: int, *, consumed: int = 0) -> int:
        """Batches that start in an epoch, never cut at its end: the same on every rank.

        Args:
            epoch: which one.
            consumed: a position at which a batch starts; others do a whole number of batches away.
        """
        return self._batches_before(epoch + 1, consumed) - self._batches_before(epoch, consumed)

    def start_of(self, epoch: int, *, consumed: int = 0) -> int:
        """Position of the first batch that starts in an epoch, counted as in `batches_in`."""
        return consumed % self.batch_size + self._batches_before(epoch, consumed) * self.batch_size

    def is_past_end(self, position: int) -> bool:
        """Whether nothing lies there any more."""
        return not self.order.is_shuffled and position >= self.order.samples

    def batch(self, position: int, world: World) -> Draws:
        """This rank's share of the batch that starts at a position."""
        start, stop = world.share(self.batch_size)
        return self.order.draws_at(position + start, position + stop)

    def _batches_before(self, epoch: int, consumed: int) -> int:
        """Batches, from the first position at which one could start, that start before an epoch does."""
        return max(0, -((consumed % self.batch_size - epoch * self.order.samples) // self.batch_size))


def check_schedule(schedule: Schedule, sizes: Sequence[int]) -> None:
    """Raise UsageError where a world could not be served equally.

    Args:
        schedule: what is going to be dealt.
        sizes: world sizes that will be used.
    """
    if schedule.order.samples < 1:
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
