"""A batch as it travels: in-mask values packed by time, put on the grid where the model is. One of two importers of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from fmristream.errors import SpaceError, UsageError
from fmristream.signal import kernels
from fmristream.signal.grid import Shape3


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's share of a global batch.

    Attributes:
        packed: (b, c, t, v) normalised in-mask values, float32 or float16; int16: residuals, see `scale`. None where the
            loader has placed them.
        positions: (v,) int64, where each voxel lies in the C-ordered grid; negative: cut off. None for grayordinates.
        grid: (x, y, z); None for grayordinates, which have none.
        fill: (b, c) float32, what stands outside the mask.
        valid: (b,) bool; False marks the padding of a last evaluation batch.
        window: (b,) int64, window number in the selection.
        start: (b,) int64, first frame.
        subject: subject label of each sample.
        run: run name of each sample.
        targets: (b,) float32 by name; NaN where unknown.
        views: rows of a sample: rows [0, b / views) are first views, the same number after them second ones, and so on.
        frames_valid: (b,) int64, frames of the clip; those behind are background (whole runs of several lengths).
        source: (b,) int64, which member of a mixture; 0 where there is none.
        global_size: samples of the batch over all ranks.
        position: samples handed out over all ranks before this batch.
        placed: (b, c, t, x, y, z), the same on the grid; None where nobody has placed them.
        scale: (n, v) float32 of the n runs of an int16 batch: value = packed x scale[row] + offset[row]; else None.
        offset: (n, v) float32, see scale.
        scale_row: (b,) int64, which row of `scale` is each sample's.
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
    views: int = 1
    frames_valid: torch.Tensor | None = None
    source: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    scale_row: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def bold(self) -> torch.Tensor:
        """(b, c, x, y, z, t) float32 on the batch's device; a view of memory in which time is the slow axis.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        if self.placed is not None:
            return self.placed.movedim(2, -1)
        packed = self.values
        if self.positions is None or self.grid is None:
            raise SpaceError(
                f"this batch holds {packed.shape[-1]} grayordinates (CIFTI-2), which have no grid to be placed in, so no "
                "model of volumes such as SwiFT takes them; use batch.packed (b, c, t, grayordinates), or convert the volumes "
                "of the same runs"
            )
        return place(packed, self.positions, self.grid, self.fill).movedim(2, -1)

    @property
    def values(self) -> torch.Tensor:
        """(b, c, t, v) normalised values, packed; residuals are scaled.

        Raises:
            UsageError: the batch came placed.
        """
        if self.packed is None:
            raise UsageError(
                "this batch was placed by the loader (output='placed'); use batch.bold, or output='packed'"
            )
        if self.scale is None or self.offset is None or self.scale_row is None:
            return self.packed
        scale, offset = self.scale[self.scale_row], self.offset[self.scale_row]
        return self.packed * scale[:, None, None] + offset[:, None, None]

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device, its signal placed on the grid there; packed values cross the bus, empty space does not.

        Grayordinates stay packed.
        """
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in (
                "packed",
                "positions",
                "fill",
                "valid",
                "window",
                "start",
                "placed",
                "scale",
                "offset",
                "scale_row",
                "frames_valid",
                "source",
            )
            if getattr(self, name) is not None
        }
        targets = {name: values.to(device, non_blocking=True) for name, values in self.targets.items()}
        there = replace(self, **moved, targets=targets)
        if there.grid is None or there.placed is not None or there.positions is None:
            return there
        return replace(there, placed=place(there.values, there.positions, there.grid, there.fill))


def place(packed: torch.Tensor, positions: torch.Tensor, grid: Shape3, fill: torch.Tensor) -> torch.Tensor:
    """Scatter (b, c, t, v) onto (b, c, t, x, y, z), each sample and channel filled with its own background."""
    scatter = _scatter_on_host if packed.device.type == "cpu" else scatter_by_torch
    size = grid[0] * grid[1] * grid[2]
    return scatter(packed, positions, size, fill).view(*packed.shape[:3], *grid)


def _scatter_on_host(packed: torch.Tensor, positions: torch.Tensor, size: int, fill: torch.Tensor) -> torch.Tensor:
    placed = torch.empty((*packed.shape[:3], size), dtype=packed.dtype)
    placed[:] = fill[:, :, None, None]
    target, source, where = placed.numpy(), packed.numpy(), positions.numpy()
    if packed.dtype == torch.float16:  # numba has none: elements are moved, whatever they are
        target, source = target.view("u2"), source.view("u2")
    for sample in range(len(packed)):  # ten times torch's index_copy_, which does not run along the last axis
        for channel in range(packed.shape[1]):
            kernels.place(source[sample, channel], where, target[sample, channel])
    return placed


def scatter_by_torch(packed: torch.Tensor, positions: torch.Tensor, size: int, fill: torch.Tensor) -> torch.Tensor:
    """(b, c, t, v) to (b, c, t, size) on any device."""
    placed = fill[:, :, None, None].expand(*packed.shape[:3], size).contiguous()
    inside = positions >= 0
    placed[..., positions[inside]] = packed[..., inside]
    return placed
