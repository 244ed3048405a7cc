"""What is known of a selection of clips before any of them is read: how many, how long, on which grid, in which order."""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run_table import RunTable
from fmristream.sampling.deal import Order
from fmristream.sampling.state import StreamState
from fmristream.shards.dataset import Dataset
from fmristream.signal.grid import Shape3
from fmristream.signal.recipes import Recipe
from fmristream.stream.clip_plan import ClipPlan
from fmristream.stream.placement import Placement
from fmristream.stream.run_source import RunSource
from fmristream.stream.targets import Target
from fmristream.stream.values import inputs_of, words_of_values


class ClipFacts:
    """Facts of a selection; `StreamingDataset` fills them in and reads.

    Attributes:
        dataset: where the runs lie.
        runs: the selected ones, in order.
        recipe: what becomes of stored values.
        seed: of the order; None for stored order.
        left_out: what is not streamed, in words, and how many.
    """

    dataset: Dataset
    runs: RunTable
    recipe: Recipe
    seed: int | None
    left_out: Counter[str]
    _plan: ClipPlan
    _placement: Placement
    _targets: tuple[Target, ...]
    _exact: bool

    @property
    def window(self) -> int:
        """Frames of a clip; of whole runs those of the longest."""
        return self._plan.table.longest

    @property
    def stride(self) -> int:
        """Frames from one window's start to the next; 1 where there are no windows."""
        return self._plan.cut.stride

    @property
    def has_windows(self) -> bool:
        """Whether all clips have as many frames; those of whole runs have not."""
        return self._plan.cut.window is not None

    @property
    def views(self) -> int:
        """Rows that a sample has in a batch: 2 for contrastive tasks."""
        return 1 if self._plan.partners is None else 2

    @property
    def num_windows(self) -> int:
        """Windows in the selection."""
        return self._plan.table.total

    @property
    def selection_digest(self) -> str:
        """Digest of the selected runs, in order, and of what makes clips of them: what the order is keyed by."""
        return self._plan.digest

    @property
    def order(self) -> Order:
        """What positions of a stream mean."""
        return self._plan.order

    def state(self, consumed: int) -> StreamState:
        """Where a stream is after some samples."""
        return StreamState(
            consumed=consumed,
            seed=self.seed,
            window=self._plan.cut.length,
            stride=self.stride,
            windows=self.num_windows,
            selection=self.selection_digest,
            settings=self._plan.settings,
            values=self._values,
        )

    @cached_property
    def _values(self) -> dict[str, str]:
        """What the values of windows are made with, in words."""
        return words_of_values(
            self.recipe,
            RunSource(self.dataset, self.runs[0]),
            exact=self._exact,
            grid=self.grid if self.has_grid else None,
            orientation=self.orientation,
        )

    @property
    def content_digest(self) -> str:
        """Digest of what the dataset says."""
        return self.dataset.content_digest

    @property
    def generation_digest(self) -> str:
        """Digest of the version that is open."""
        return self.dataset.generation_digest

    @property
    def has_grid(self) -> bool:
        """Whether values lie on a grid; grayordinates, parcels and components are lists."""
        return self._placement.has_grid

    @property
    def grid(self) -> Shape3:
        """(x, y, z) that windows are placed in.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        return self._placement.grid

    @property
    def voxels(self) -> int:
        """In-mask voxels, grayordinates, parcels or components of a frame, as they come."""
        return self._placement.voxels

    @cached_property
    def parcel_centres_mm(self) -> NDArray[np.float64] | None:
        """(p, 3) where the parcels of a packed frame lie, the mean position of their stored voxels, NaN for those without.

        None where the values are no parcels of volumes.
        """
        return self.recipe.parcel_centres_mm(RunSource(self.dataset, self.runs[0]))

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4) voxel to mm of the grid of `mask`: before it was turned, padded or cut."""
        return self._placement.affine

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(v,) where each stored voxel lies in the C-ordered `grid`; -1 where it is cut off.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        return self._placement.positions(self.dataset, self.runs[0])

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """(x, y, z) bool, where the voxels of a packed frame lie before the grid is turned, padded or cut; see `affine`.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        return self._placement.mask_of(self.dataset, self.runs[0])

    @property
    def orientation(self) -> str:
        """Where the axes of `grid` run to, such as `LAS`; "" for grayordinates and where the affine does not tell."""
        return self._placement.orientation

    @property
    def voxel_sizes_mm(self) -> tuple[float, float, float] | None:
        """Edge lengths of a voxel along the axes of `grid`; None for grayordinates."""
        return self._placement.voxel_sizes_mm

    @property
    def packed_as(self) -> tuple[Any, ...]:
        """What the values of a packed frame are: equal where those of two selections are the same places.

        Reductions by parcels and components have their own: of another dataset they are other values.
        """
        grid = self.has_grid and self.grid
        given = inputs_of(self.recipe)  # atlases that are passed, and what was fitted
        own = (self.recipe.text, self.content_digest if not grid else "", given)
        reduced = own if self.recipe.reduces else ()
        return (self.runs[0].space_digest, self.voxels, grid, self.orientation, *reduced)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subject of each selected run."""
        return tuple(self.runs.column("subject"))

    @property
    def target_labels(self) -> Mapping[str, tuple[str, ...]]:
        """The words behind a target's codes; empty for numbers."""
        return {target.name: target.labels for target in self._targets}

    @property
    def target_values(self) -> Mapping[str, tuple[float, ...]]:
        """Each target's value for every selected subject once, in sorted order of labels; NaN where it is missing."""
        subjects = sorted(set(self.subjects))
        return {target.name: tuple(target.of(subject) for subject in subjects) for target in self._targets}

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that samples carry."""
        return self._targets

    @property
    def channels(self) -> int:
        """Channels of a window: what the normalisation makes of one signal."""
        return self.recipe.channels

    @property
    def scrubs(self) -> bool:
        """Whether the recipe may leave frames out of statistics (`Batch.frames_kept`)."""
        return self.recipe.scrubs
