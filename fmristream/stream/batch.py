"""A batch as it travels: in-mask values packed by time, put on the grid where the model is. One of two importers of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from fmristream.errors import SpaceError
from fmristream.signal import kernels
from fmristream.signal.grid import Shape3


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's share of a global batch.

    Attributes:
        packed: (b, c, t, v) float32, normalised in-mask values.
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
    """

    packed: torch.Tensor
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

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def bold(self) -> torch.Tensor:
        """(b, c, x, y, z, t) float32 on the batch's device; a view of memory in which time is the slow axis.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        if self.positions is None or self.grid is None:
            raise SpaceError(
                f"this batch holds {self.packed.shape[-1]} grayordinates (CIFTI-2), which have no grid to be placed in, so no "
                "model of volumes such as SwiFT takes them; use batch.packed (b, c, t, grayordinates), or convert the volumes "
                "of the same runs"
            )
        frames = place(self.packed, self.positions, self.grid, self.fill) if self.placed is None else self.placed
        return frames.movedim(2, -1)

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device, its signal placed on the grid there; packed values cross the bus, empty space does not.

        Grayordinates stay packed.
        """
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("packed", "positions", "fill", "valid", "window", "start", "frames_valid", "source")
            if getattr(self, name) is not None
        }
        targets = {name: values.to(device, non_blocking=True) for name, values in self.targets.items()}
        if self.grid is None:
            return replace(self, **moved, targets=targets)
        placed = place(moved["packed"], moved["positions"], self.grid, moved["fill"])
        return replace(self, **moved, targets=targets, placed=placed)


def place(packed: torch.Tensor, positions: torch.Tensor, grid: Shape3, fill: torch.Tensor) -> torch.Tensor:
    """Scatter (b, c, t, v) onto (b, c, t, x, y, z), each sample and channel filled with its own background."""
    scatter = _scatter_on_host if packed.device.type == "cpu" else scatter_by_torch
    size = grid[0] * grid[1] * grid[2]
    return scatter(packed, positions, size, fill).view(*packed.shape[:3], *grid)


def _scatter_on_host(packed: torch.Tensor, positions: torch.Tensor, size: int, fill: torch.Tensor) -> torch.Tensor:
    placed = torch.empty((*packed.shape[:3], size), dtype=packed.dtype)
    placed[:] = fill[:, :, None, None]
    target, source, where = placed.numpy(), packed.numpy(), positions.numpy()
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
