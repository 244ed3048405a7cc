"""Where the values of a frame lie: on which grid, turned which way, padded or cut to which size; or that they are a list."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import SpaceError, UsageError
from fmristream.shards.dataset import Dataset
from fmristream.signal.grid import Shape3, voxel_sizes_mm
from fmristream.signal.orientation import Turn, axes_of_codes, axis_codes, placed_positions, tells_directions, turn_to
from fmristream.signal.prepared import Layout
from fmristream.signal.recipes import Recipe
from fmristream.stream.run_source import RunSource
from fmristream.stream.selection import whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """The places of a selection's values.

    Attributes:
        voxels: in-mask voxels, grayordinates, parcels or components of a frame.
        has_grid: whether they lie on a grid.
        size: (x, y, z) of the grid that they are placed in.
        turn: of the stored axes to those of the grid.
        affine: (4, 4) voxel to mm, before anything is turned, padded or cut.
        mask: (x, y, z) of values that are not the stored voxels; None where they are.
        called: what they are, for errors.
    """

    voxels: int
    has_grid: bool
    size: Shape3
    turn: Turn
    affine: NDArray[np.float64]
    mask: NDArray[np.bool_] | None
    called: str

    @property
    def grid(self) -> Shape3:
        """The size of the grid.

        Raises:
            SpaceError: there is none.
        """
        if not self.has_grid:
            raise SpaceError(
                f"{self.called}, which have no grid to be placed in, so no model of "
                "volumes such as SwiFT takes them; use the packed windows of batch.packed, or volumes of the same runs"
            )
        return self.size

    @cached_property
    def orientation(self) -> str:
        """Where the axes of the grid run to, such as `LAS`; "" without a grid and where the affine does not tell."""
        affine = self.turn.matrix(self.affine)
        return axis_codes(affine) if self.has_grid and tells_directions(affine) else ""

    @cached_property
    def voxel_sizes_mm(self) -> tuple[float, float, float] | None:
        """Edge lengths of a voxel along the axes of the grid; None without one."""
        return voxel_sizes_mm(self.turn.matrix(self.affine)) if self.has_grid else None

    def positions(self, dataset: Dataset, run: Run) -> NDArray[np.int64]:
        """(v,) where each value lies in the C-ordered grid; -1 where it is cut off. Reads the stored mask."""
        return placed_positions(self.mask_of(dataset, run), self.grid, self.turn)

    def mask_of(self, dataset: Dataset, run: Run) -> NDArray[np.bool_]:
        """(x, y, z) bool, where the values lie before the grid is turned, padded or cut. Reads the stored mask."""
        assert self.grid  # raises first, in words about models
        return dataset.space(run).mask if self.mask is None else self.mask


def placement_of(
    dataset: Dataset, run: Run, recipe: Recipe, *, normalize: str, grid: Any, orientation: str | None
) -> Placement:
    """Where a recipe's values of runs like this one are placed.

    Args:
        dataset: where the run lies.
        run: any of the selection: all lie on one grid.
        recipe: of normalisation, which may reduce voxels to others.
        normalize: how it was written, for errors.
        grid: (x, y, z) that was asked for; None for the native one.
        orientation: that was asked for; None for the stored one.

    Raises:
        UsageError: the grid is no grid, or the orientation none.
        SpaceError: they are asked for where values have no grid.
    """
    asked = _whole_grid(grid)
    layout: Layout | None = recipe.layout(RunSource(dataset, run)) if recipe.reduces else None
    # Grayordinates are a list: there is nothing that they could be placed in.
    has_grid = not (dataset.is_grayordinates(run) if layout is None else layout.mask is None)
    voxels = run.voxels if layout is None else layout.voxels
    affine = run.affine_matrix if layout is None or layout.affine is None else layout.affine
    turn = _turn_to(orientation, affine, has_grid=has_grid)
    shape = run.shape if layout is None or layout.mask is None else layout.mask.shape
    held = f"the runs hold {voxels} grayordinates (CIFTI-2)"
    called = held if layout is None else f"normalize={normalize!r} gives {voxels} values a frame"
    placement = Placement(
        voxels=voxels,
        has_grid=has_grid,
        size=asked or turn.shape((shape[0], shape[1], shape[2])),
        turn=turn,
        affine=affine,
        mask=None if layout is None else layout.mask,
        called=f"{dataset.store.name}: {called}",
    )
    if grid is not None or orientation is not None:
        assert placement.grid  # raises where there is none
    return placement


def _turn_to(orientation: str | None, affine: NDArray[np.float64], *, has_grid: bool) -> Turn:
    if orientation is None:
        return Turn()
    axes_of_codes(orientation)
    return turn_to(orientation, affine) if has_grid else Turn()


def _whole_grid(grid: Any) -> Shape3 | None:
    if grid is None:
        return None
    sizes = tuple(whole("grid", size) for size in grid) if isinstance(grid, Sequence) else ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise UsageError(f"grid {grid!r}: expected three sizes of 1 or more voxels")
    return sizes
