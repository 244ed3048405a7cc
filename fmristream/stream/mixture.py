"""Several selections streamed as one, each with its share: clips of all of them in every batch. No torch in here."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import UNALIGNED
from fmristream.errors import SpaceError, UsageError
from fmristream.sampling.deal import Draws, MixedOrder, ShuffledOrder
from fmristream.sampling.mixing import Turns
from fmristream.sampling.state import StreamState
from fmristream.shards.digest import sha256_json
from fmristream.signal.grid import Shape3
from fmristream.stream.clips import Row, StreamingDataset
from fmristream.stream.targets import Target


class Mixture:
    """Several `StreamingDataset`s as one stream, each sample from one of them.

    Whose turn it is says a table of largest deficits, so that any stretch of the stream has the shares that were asked
    for; each member goes through its own epochs, in the order that it would have alone. An epoch of the mixture has as
    many samples as its members have together. Window numbers and subjects are those of the member: `Batch.source` says
    which.

    Args:
        members: (clips, weight) of each; weights are relative, and count to one in 10,000.
        mix_spaces: allow members of one grid and mask whose voxels do not correspond.

    Raises:
        UsageError: members differ in window, views, channels or targets, have no seed, or a weight makes no sense.
        SpaceError: they share no grid, mask and space.
    """

    def __init__(self, members: Sequence[tuple[StreamingDataset, float]], *, mix_spaces: bool = False) -> None:
        if not members:
            raise UsageError("a mixture of nothing; give [(clips, weight), ...]")
        self.members = tuple(clips for clips, _ in members)
        self.weights = tuple(float(weight) for _, weight in members)
        for number, clips in enumerate(self.members):
            self._require_fit(number, clips)
        self._require_one_space(mix_spaces)
        self._turns = Turns(self.weights)

    def _require_fit(self, number: int, clips: StreamingDataset) -> None:
        if clips.seed is None:
            raise UsageError(
                f"member {number} of the mixture has no seed; stored order is one pass, which cannot be mixed"
            )
        if not clips.num_windows:
            raise UsageError(f"member {number} of the mixture holds no window; leave it out or choose a shorter one")
        first = self.members[0]
        for name in ("window", "views", "channels", "target_labels", "side"):
            here, there = getattr(first, name), getattr(clips, name)
            if name == "side":
                here, there = here.wanted, there.wanted
            if here != there:
                raise UsageError(
                    f"member {number} of the mixture has {name} {there}, member 0 has {here}; batches need the same of all"
                )

    def _require_one_space(self, mix_spaces: bool) -> None:
        if not self.shares_mask and len({clips.has_grid and clips.grid for clips in self.members} | {False}) != 2:
            raise SpaceError(
                "the members of the mixture lie on different grids, so no batch can hold them; give all the same target "
                "grid and let the loader place them (output='placed'), or leave members out"
            )
        turned = {
            (clips.orientation, *(round(size, 2) for size in clips.voxel_sizes_mm or ())) for clips in self.members
        }
        if len(turned) > 1:
            shown = "; ".join(sorted(f"{code or 'unknown'} {sizes} mm" for code, *sizes in turned))
            raise SpaceError(
                f"the members of the mixture have grids of different axes or voxels ({shown}), so that left would be right in "
                "some rows; give all one orientation=..., and convert with --resample-mm where voxels differ"
            )
        labels = sorted({str(clips.runs[0].space) for clips in self.members})
        is_one = len(labels) == 1 and (labels[0] not in UNALIGNED or len(self.members) == 1)
        if not is_one and not mix_spaces:
            shown = ", ".join(label or "unknown" for label in labels)
            raise SpaceError(
                f"the members of the mixture lie in the space {shown}, in which voxels of several datasets need not "
                "correspond; pass mix_spaces=True if that is what you want"
            )

    @cached_property
    def order(self) -> MixedOrder:
        """What positions of the stream mean."""
        orders = [clips.order for clips in self.members]
        return MixedOrder(members=tuple(one for one in orders if isinstance(one, ShuffledOrder)), turns=self._turns)

    @cached_property
    def selection_digest(self) -> str:
        """Digest of the members' selections, seeds and turns."""
        members = [[clips.selection_digest, clips.seed] for clips in self.members]
        return sha256_json({"members": members, "turns": self._turns.quotas.tolist()})

    def state(self, consumed: int) -> StreamState:
        """Where the stream is after some samples."""
        first = self.members[0]
        settings: dict[str, str] = {}
        values: dict[str, str] = {}
        for number, clips in enumerate(self.members):
            own = clips.state(0)
            facts = {"window": own.window, "stride": own.stride, "seed": own.seed, "windows": own.windows}
            told = {**{name: str(value) for name, value in facts.items()}, **own.settings}
            settings |= {f"{name} of member {number}": value for name, value in told.items()}
            values |= {f"{name} of member {number}": words for name, words in own.values.items()}
        settings["mixture"] = ":".join(map(str, self._turns.quotas.tolist()))
        return StreamState(
            consumed=consumed,
            seed=first.seed,
            window=first.state(0).window,
            stride=first.stride,
            windows=self.num_windows,
            selection=self.selection_digest,
            settings=settings,
            values=values,
        )

    def rows(self, draws: Draws) -> list[Row]:
        """The rows of a batch, or of a rank's share: first views of all samples, then the second ones of all."""
        count = len(draws.number)
        found: dict[int, Row] = {}
        for source in np.unique(draws.source).tolist():
            mine = np.flatnonzero(draws.source == source)
            own = Draws(
                number=draws.number[mine],
                slot=draws.slot[mine],
                epoch=draws.epoch[mine],
                source=draws.source[mine],
                valid=draws.valid[mine],
            )
            places = [view * count + place for view in range(self.views) for place in mine.tolist()]
            for place, row in zip(places, self.members[source].rows(own), strict=True):
                found[place] = Row(clips=row.clips, run=row.run, clip=row.clip, number=row.number, source=source)
        return [found[place] for place in range(count * self.views)]

    def __len__(self) -> int:
        return self.num_windows

    @property
    def num_windows(self) -> int:
        """Samples of an epoch of the mixture."""
        return self.order.samples

    @property
    def seed(self) -> int | None:
        """Of the first member; each has its own."""
        seed: int | None = self.members[0].seed
        return seed

    @property
    def shares_mask(self) -> bool:
        """Whether a value of a frame is the same place for all members, as packed batches need it."""
        return len({clips.packed_as for clips in self.members}) == 1

    @property
    def scrubs(self) -> bool:
        """Whether a member's recipe may leave frames out."""
        return any(clips.scrubs for clips in self.members)

    @property
    def has_windows(self) -> bool:
        """Whether all clips have as many frames; those of whole runs have not."""
        return all(clips.has_windows for clips in self.members)

    @property
    def orientation(self) -> str:
        """Where the axes of `grid` run to; "" where members differ."""
        found = {clips.orientation for clips in self.members}
        return found.pop() if len(found) == 1 else ""

    @property
    def voxel_sizes_mm(self) -> tuple[float, float, float] | None:
        """Edge lengths of a voxel; None where members differ."""
        found = {clips.voxel_sizes_mm for clips in self.members}
        return found.pop() if len(found) == 1 else None

    @property
    def window(self) -> int:
        """Frames of a clip."""
        return self.members[0].window

    @property
    def views(self) -> int:
        """Rows that a sample has."""
        return self.members[0].views

    @property
    def voxels(self) -> int:
        """In-mask voxels, or grayordinates, of a frame."""
        return self.members[0].voxels

    @property
    def channels(self) -> int:
        """Channels of a window."""
        return self.members[0].channels

    @property
    def has_grid(self) -> bool:
        """Whether there is a grid to be placed in."""
        return self.members[0].has_grid

    @property
    def grid(self) -> Shape3:
        """(x, y, z) that windows are placed in."""
        return self.members[0].grid

    @property
    def positions(self) -> NDArray[np.int64]:
        """(v,) where each stored voxel lies in the C-ordered `grid`; -1 where it is cut off."""
        return self.members[0].positions

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that samples carry; their values are those of each row's own dataset."""
        return self.members[0].targets

    @property
    def target_labels(self) -> Mapping[str, tuple[str, ...]]:
        """The words behind a target's codes, the same for all members."""
        return self.members[0].target_labels
