"""A batch as it travels: in-mask values packed by time, put on the grid where the model is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from fmristream.errors import SpaceError, UsageError
from fmristream.signal.grid import Shape3
from fmristream.stream.device import Quantized, place

if TYPE_CHECKING:
    from fmristream.stream.augment import Compose

# Stay on the host: they say what to do there, and asking a device would mean waiting for it.
_HOST = frozenset({"positions", "positions_row", "epoch", "sample"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's share of a global batch.

    b counts samples times views: rows [0, n) are the first view of samples 0 to n - 1, rows [n, 2n) the second.

    Attributes:
        packed: (b, c, t, v) in-mask values: normalised, float32 or float16; or int16, to be read with `scale` and
            `offset`. None where the loader gave `placed` alone.
        positions: (v,) int64 on the host, where each voxel lies in the C-ordered grid; negative: cut off. (m, v) where samples
            lie in different spaces. None for grayordinates.
        grid: (x, y, z); None for grayordinates, which have none.
        fill: (b, c) float32, what stands outside the mask.
        valid: (b,) bool; False marks the padding of a last evaluation batch.
        window: (b,) int64, window number in the selection.
        start: (b,) int64, first frame.
        subject: subject label of each sample.
        run: run name of each sample.
        targets: (b,) float32 by name; NaN where unknown.
        source: (b,) int64, which member of a mixture; 0 where there is none.
        global_size: samples of the batch over all ranks.
        position: samples handed out over all ranks before this batch.
        placed: (b, c, t, x, y, z) where the signal has been placed.
        scale: (n, v) float32, of int16 values alone: value = packed x scale[scale_row] + offset[scale_row].
        offset: (n, v) float32.
        scale_row: (b,) int64.
        positions_row: (b,) int64 on the host, which row of (m, v) `positions` each sample has.
        views: views of each sample.
        first_view: which view the first rows are: of a batch that `view` made, its number.
        side: (b, t) or (b, t, k) float32 by name, aligned to the frames; NaN where nothing is known.
        lengths: (b,) int64, how many frames of each sample are its run's; None where all are.
        kept: (b, t) bool, False for frames that the recipe scrubs; None where it scrubs none. See `frames_kept`.
        epoch: (b,) int64 on the host, the epoch that each sample belongs to.
        sample: (b,) int64 on the host, each sample's position in the stream, the same for any number of ranks.
        orientation: where the grid's axes run to, such as `RAS`; "" where nobody knows.
        voxel_sizes_mm: edge lengths of the grid's voxels.
    """

    packed: torch.Tensor | None
    positions: torch.Tensor | None
    grid: Shape3 | None
    fill: torch.Tensor
    valid: torch.Tensor
    window: torch.Tensor
    start: torch.Tensor
    subject: list[str]
    run: list[str]
    targets: Mapping[str, torch.Tensor]
    global_size: int
    position: int
    placed: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    scale_row: torch.Tensor | None = None
    positions_row: torch.Tensor | None = None
    views: int = 1
    first_view: int = 0
    source: torch.Tensor | None = None
    side: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lengths: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    epoch: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    orientation: str = ""
    voxel_sizes_mm: tuple[float, float, float] | None = None

    def __len__(self) -> int:
        return len(self.window)

    @property
    def signal(self) -> torch.Tensor:
        """`packed`, or `placed` where that is all there is: what has the batch's frames."""
        signal = self.placed if self.packed is None else self.packed
        assert signal is not None
        return signal

    @property
    def values(self) -> torch.Tensor:
        """(b, c, t, v) in-mask values as floats, whatever they travel as.

        Raises:
            UsageError: the loader gave placed batches.
        """
        if self.packed is None:
            raise UsageError("this batch was placed by the loader and has no packed values; use output='packed'")
        if self.packed.is_floating_point():
            return self.packed
        if self.scale is None or self.offset is None or self.scale_row is None:
            raise UsageError(f"packed values are {self.packed.dtype} and came without scale, offset and scale_row")
        return Quantized(scale=self.scale, offset=self.offset, row=self.scale_row).values(self.packed)

    @property
    def bold(self) -> torch.Tensor:
        """(b, c, x, y, z, t) floats on the batch's device; a view of memory in which time is the slow axis.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        frames = self._placed(None) if self.placed is None else self.placed
        return frames.movedim(2, -1)

    @property
    def frames_valid(self) -> torch.Tensor:
        """(b, t) bool: False for frames after the end of a run that is shorter than the window, and for padding samples."""
        frames = torch.arange(self.signal.shape[2], device=self.valid.device)
        lengths = len(frames) if self.lengths is None else self.lengths[:, None]
        return self.valid[:, None] & (frames < lengths)

    @property
    def frames_kept(self) -> torch.Tensor:
        """(b, t) bool: False for frames that `confounds:scrub` or `steady` of the recipe leave out of statistics.

        Their values are there like others', and are no good: weigh a loss by `frames_valid & frames_kept`.
        """
        if self.kept is not None:
            return self.kept
        return torch.ones(len(self), self.signal.shape[2], dtype=torch.bool, device=self.valid.device)

    @property
    def side_valid(self) -> dict[str, torch.Tensor]:
        """Where the side series are known, in their shapes."""
        return {name: ~values.isnan() for name, values in self.side.items()}

    def view(self, number: int) -> Self:
        """One view of every sample, as a batch; its tensors share this one's memory.

        Raises:
            UsageError: there are fewer views.
        """
        if not 0 <= number < self.views:
            raise UsageError(f"view {number} was asked for, the batch has {self.views}; count from 0")
        rows = slice(number * len(self) // self.views, (number + 1) * len(self) // self.views)
        shared = ("positions", "scale", "offset")
        mine = self._map(lambda tensor: tensor[rows], but=shared)
        first = self.first_view + number
        return replace(mine, subject=self.subject[rows], run=self.run[rows], views=1, first_view=first)

    def samples(self, start: int, stop: int) -> Self:
        """Samples [start, stop) of this rank's share with all their views, as a batch: a piece of a step.

        `global_size` and `position` stay those of the whole batch. Tensors share this one's memory where there is one view.

        Raises:
            UsageError: there are fewer samples.
        """
        number = len(self) // self.views
        if not 0 <= start < stop <= number:
            raise UsageError(
                f"samples [{start}, {stop}) were asked for, the batch has {number}; ask for one or more of them"
            )

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(self.views, number, *tensor.shape[1:])[:, start:stop].flatten(0, 1)

        mine = self._map(rows, but=("positions", "scale", "offset"))
        places = [view * number + sample for view in range(self.views) for sample in range(start, stop)]
        return replace(mine, subject=[self.subject[i] for i in places], run=[self.run[i] for i in places])

    def to(
        self,
        device: torch.device | str,
        *,
        dtype: torch.dtype | None = None,
        augment: "Compose | None" = None,
        non_blocking: bool = True,
    ) -> Self:
        """The batch on a device, its signal placed on the grid there; packed values cross the bus, empty space does not.

        Grayordinates stay packed.

        Args:
            device: where the model is.
            dtype: of the placed signal; float32 for int16 values, else what they travel as.
            augment: what happens to the placed signal (fmristream.stream.augment).
            non_blocking: do not wait for copies out of pinned memory; their order on the device is kept.

        Raises:
            SpaceError: grayordinates were to be augmented.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking), but=_HOST)
        if self.grid is not None:
            placed = moved._placed(dtype) if moved.placed is None else moved.placed.to(dtype or moved.placed.dtype)
            moved = replace(moved, placed=placed)
        if augment is None:
            return moved
        is_ours = moved.placed is not None and moved.placed is not self.placed
        # Keys come from the host's copy: a device would have to be waited for.
        return cast(Self, augment(moved, keys=augment.keys(self), may_overwrite=is_ours))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, as a DataLoader with `pin_memory=True` wants it."""
        return self._map(lambda tensor: tensor.pin_memory(), but=_HOST)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of the batch."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, Mapping):
                yield from value.values()

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], *, but: Sequence[str] | frozenset[str]) -> Self:
        changed: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in but:
                continue
            if isinstance(value, torch.Tensor):
                changed[one.name] = change(value)
            elif isinstance(value, Mapping):
                changed[one.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **changed)

    def _placed(self, dtype: torch.dtype | None) -> torch.Tensor:
        if self.positions is None or self.grid is None:
            raise SpaceError(
                f"this batch holds {self.signal.shape[-1]} grayordinates (CIFTI-2), parcels or components, which have no grid "
                "to be placed in, so no model of volumes such as SwiFT takes them; use batch.packed (b, c, t, values), or "
                "stream the volumes of the same runs"
            )
        return place(self.values, self.positions, self.grid, self.fill, row=self.positions_row, dtype=dtype)
