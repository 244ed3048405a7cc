"""A run as recipes see it: its frames and statistics, and what is stored beside them."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.shards.dataset import Dataset
from fmristream.shards.parcels import array_name
from fmristream.shards.run_reader import RunReader
from fmristream.shards.side import parcel_spaces_of, read_parcel_space, read_small_array
from fmristream.signal.prepared import Layout, StoredParcels
from fmristream.stream.parcel_choice import the_only_parcels


class RunSource:
    """One run of a dataset; light until it is asked for something.

    Args:
        dataset: where the run lies.
        run: which.
    """

    def __init__(self, dataset: Dataset, run: Run) -> None:
        self._dataset = dataset
        self.run = run

    @property
    def reader(self) -> RunReader:
        """The run's arrays; asked for each time, so that what the dataset lets go is not held here."""
        return self._dataset.reader(self.run)

    @property
    def where(self) -> str:
        """Dataset and run."""
        return f"{self._dataset.store.name}: run {self.run.name}"

    @property
    def is_difference(self) -> bool:
        """Whether frames come as residuals."""
        return self.reader.is_difference

    @property
    def reference(self) -> NDArray[Any]:
        """(v,) in the stored dtype."""
        return self.reader.reference

    @property
    def moments(self) -> NDArray[Any]:
        """(2, v) as stored."""
        return self.reader.moments

    @property
    def exact_moments(self) -> NDArray[Any]:
        """(2, v) in full precision."""
        return self.reader.exact_moments

    def read_stored(self, start: int, stop: int) -> NDArray[Any]:
        """Frames as the source stored them."""
        return self.reader.read_stored(start, stop)

    @cached_property
    def layout(self) -> Layout:
        """The voxels of the run's space."""
        if self._dataset.is_grayordinates(self.run):
            return Layout(voxels=self.run.voxels)
        space = self._dataset.space(self.run)
        return Layout(voxels=self.run.voxels, mask=space.mask, affine=self.run.affine_matrix)

    def confounds(self) -> Mapping[str, Any] | None:
        """Columns with one row a frame."""
        return self._dataset.confounds(self.run)

    def parcel_digest(self, atlas: str) -> str:
        """Digest of the space of an atlas's parcels.

        Raises:
            UsageError: the run has none of it, or of several.
        """
        return the_only_parcels(self._dataset, self.run, parcel_spaces_of(self._dataset, self.reader), atlas)

    def parcels(self, atlas: str) -> StoredParcels:
        """Series and weights of an atlas.

        Raises:
            UsageError: the run has none of it, or of several.
        """
        reader = self.reader
        space = read_parcel_space(self._dataset, self.parcel_digest(atlas))
        series = read_small_array(reader, array_name(space.atlas)).astype(np.float64)
        return StoredParcels(weights=space.weights, series=series * self.run.slope + self.run.inter)
