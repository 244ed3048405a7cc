"""A selection of runs, cut into windows: the map-style dataset under every loader. No torch in here."""

import operator
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import UNALIGNED, Run
from fmristream.catalog.run_table import RunTable
from fmristream.errors import SpaceError, UsageError
from fmristream.sampling.clip import Clip
from fmristream.sampling.window import Window, WindowTable
from fmristream.shards.dataset import Dataset, open_dataset
from fmristream.shards.digest import sha256_json
from fmristream.signal.grid import Shape3, target_positions
from fmristream.signal.normalize import fill_of, recipe
from fmristream.storage.cache import CachedStore, DiskCache
from fmristream.storage.local import LocalStore
from fmristream.stream.targets import Target, read_target
from fmristream.stream.window_reader import Scratch, WindowReader


class StreamingDataset:
    """Windows of consecutive frames, streamed from a converted dataset.

    Give it to `StreamingLoader`, or to any torch DataLoader: it has a length and items.

    Args:
        source: URL of a dataset, or an open `Dataset`.
        window: frames of a window.
        stride: frames from one window's start to the next; `window` where not given.
        split: `train`, `val`, `test`; None for all runs.
        seed: shuffles the windows, each epoch anew; None for stored order, one pass (evaluation).
        normalize: `none`, `voxel-zscore`, `global-zscore`, ... (fmristream.signal.normalize.RECIPES).
        targets: columns of the participants table that samples carry.
        grid: (x, y, z) to pad or cut the native grid to, centred; the native grid where not given. Grayordinates have
            none: their windows come packed, (c, t, grayordinates), as `packed` of items and batches.
        exact: z-score by float32 moments even where float16 ones are stored.
        mix_spaces: allow runs of one grid and mask whose voxels do not correspond (unaligned subjects).
        cache: folder in which chunks that were fetched are kept for the next epoch, or for other processes; for remote
            datasets. None: nothing is ever written to a disk.
        cache_bytes: what the folder may hold.

    Raises:
        UsageError: no run is selected, or an argument makes no sense.
        SpaceError: the selected runs share no space, or a grid is asked for where they are grayordinates.
    """

    def __init__(
        self,
        source: str | Dataset,
        *,
        window: int = 20,
        stride: int | None = None,
        split: str | None = None,
        seed: int | None = None,
        normalize: str = "voxel-zscore",
        targets: Sequence[str] = (),
        grid: Shape3 | None = None,
        exact: bool = False,
        mix_spaces: bool = False,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = 64 * 2**30,
    ) -> None:
        dataset = source if isinstance(source, Dataset) else open_dataset(source)
        self.dataset = dataset if cache is None else _behind_cache(dataset, cache, cache_bytes)
        if not isinstance(dataset.store, LocalStore):
            self.dataset.warm(participants=bool(targets))
        window, seed, grid = _whole("window", window), _whole("seed", seed), _whole_grid(grid)
        stride = _whole("stride", stride)
        if isinstance(targets, str):
            raise UsageError(f"targets={targets!r}: expected a list of columns; write targets=[{targets!r}]")
        frames = Window(length=window, stride=window if stride is None else stride)
        self.window = frames.length  # frames
        self.stride = frames.stride
        self.split = split
        self.seed = seed
        self.normalize = normalize
        self.runs = _select(self.dataset, split)
        require_one_grid(self.runs, where=self.dataset.store.name)
        if not mix_spaces:
            require_one_space(self.runs, where=self.dataset.store.name)
        self._table = WindowTable(self.runs.column("frames"), frames)
        self._reader = WindowReader(dataset=self.dataset, normalization=recipe(normalize), exact=exact)
        self._targets = [
            read_target(self.dataset.participants, name, where=self.dataset.store.name) for name in targets
        ]
        # Grayordinates are a list: there is nothing that they could be placed in.
        self.has_grid = not self.dataset.is_grayordinates(self.runs[0])
        self._grid = grid or self.runs[0].shape
        if grid is not None:
            assert self.grid  # raises where there is none

    @property
    def num_windows(self) -> int:
        """Windows in the selection."""
        return self._table.total

    @property
    def grid(self) -> Shape3:
        """(x, y, z) that windows are placed in.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        if not self.has_grid:
            raise SpaceError(
                f"{self.dataset.store.name}: the runs hold {self.voxels} grayordinates (CIFTI-2), which have no grid to be "
                "placed in, so no model of volumes such as SwiFT takes them; use the packed windows (t, grayordinates) of "
                "batch.packed, or convert the volumes of the same runs"
            )
        return self._grid

    @property
    def voxels(self) -> int:
        """In-mask voxels, or grayordinates, of a frame."""
        return self.runs[0].voxels

    @property
    def content_digest(self) -> str:
        """Digest of what the dataset says."""
        return self.dataset.content_digest

    @property
    def generation_digest(self) -> str:
        """Digest of the version that is open."""
        return self.dataset.generation_digest

    @cached_property
    def selection_digest(self) -> str:
        """Digest of the selected runs, in order, and the window: what the order of windows is keyed by."""
        window = {"length": self.window, "stride": self.stride}
        return sha256_json({"runs": self.runs.column("digest"), "window": window})

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
        return tuple(self._targets)

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(v,) where each stored voxel lies in the C-ordered `grid`; -1 where it is cut off.

        Raises:
            SpaceError: the runs are grayordinates.
        """
        grid = self.grid  # raises first, in words about models
        return target_positions(self.dataset.space(self.runs[0]).mask, grid)

    def locate(self, number: int) -> tuple[Run, int]:
        """(run, first frame) of a window number."""
        clip = self.clip(number)
        return self.runs[clip.run], clip.start

    def clip(self, number: int) -> Clip:
        """The frames that a window number means."""
        runs, starts = self._table.locate(np.array([number], dtype=np.int64))
        return Clip(run=int(runs[0]), start=int(starts[0]), length=self.window)

    @property
    def reader(self) -> WindowReader:
        """What reads clips of the dataset."""
        return self._reader

    @property
    def channels(self) -> int:
        """Channels of a window: what the normalisation makes of one signal."""
        return 1

    def fill(self, run: Run) -> NDArray[np.float32]:
        """(c,) what stands outside the mask under this normalisation."""
        return np.array([fill_of(self._reader.normalization, run)], dtype=np.float32)

    def read_packed(self, number: int, packed: NDArray[np.float32], scratch: Scratch) -> None:
        """Fill `packed` (c, t, v) with a window's normalised in-mask values."""
        clip = self.clip(number)
        self._reader.read(self.runs[clip.run], clip, packed, scratch)

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One window by number, placed on the grid: `bold` (c, x, y, z, t) float32 and what it is.

        Grayordinates come as `packed` (c, t, grayordinates) in place of `bold`.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"window {number} was asked for, there are {len(self)}")
        number %= len(self)
        run, start = self.locate(number)
        packed = np.empty((self.channels, self.window, self.voxels), dtype=np.float32)
        self.read_packed(number, packed, Scratch())
        return {
            **({"bold": self._placed(packed, run)} if self.has_grid else {"packed": packed}),
            "run": run.name,
            "start": start,
            "subject": run.subject,
            "targets": {target.name: np.float32(target.of(run.subject)) for target in self._targets},
            "window": number,
        }

    def _placed(self, packed: NDArray[np.float32], run: Run) -> NDArray[np.float32]:
        inside = self.positions >= 0
        bold = np.empty((*packed.shape[:2], int(np.prod(self.grid))), dtype=np.float32)
        bold[:] = self.fill(run)[:, None, None]
        bold[..., self.positions[inside]] = packed[..., inside]
        return np.moveaxis(bold.reshape(*packed.shape[:2], *self.grid), 1, -1)


def _behind_cache(dataset: Dataset, path: str | os.PathLike[str], limit_bytes: int) -> Dataset:
    store = CachedStore(dataset.store, DiskCache(path, limit_bytes))
    return Dataset(dataset.url, store, dataset.generation)


def require_one_grid(runs: RunTable, *, where: str) -> None:
    """Raise SpaceError unless all runs store the same voxels of the same grid: without that there is no batch at all."""
    grids = runs.counts("space_digest")
    if len(grids) > 1:
        raise SpaceError(
            f"{where}: the selected runs lie on {len(grids)} grids or masks (or lists of grayordinates); select runs of one, "
            "or convert them with one --mask"
        )


def require_one_space(runs: RunTable, *, where: str) -> None:
    """Raise SpaceError unless a voxel means the same place in every run's brain."""
    labels = sorted(runs.counts("space"))
    if len(labels) > 1:
        raise SpaceError(
            f"{where}: the selected runs lie in {len(labels)} spaces ({', '.join(label or 'unknown' for label in labels)}); "
            "select runs of one, or pass mix_spaces=True if that is what you want"
        )
    scanned = runs.counts("subject", "session")
    if labels[0] in UNALIGNED and len(scanned) > 1:
        raise SpaceError(
            f"{where}: the runs are in the space {labels[0] or 'unknown'!r}, in which voxels of {len(scanned)} subjects or "
            "sessions do not correspond; convert normalised derivatives, declare --space NAME at conversion if they are "
            "aligned, or pass mix_spaces=True if that is what you want"
        )


def _select(dataset: Dataset, split: str | None) -> RunTable:
    runs = dataset.runs if split is None else dataset.runs.where("split", split)
    if not runs:
        present = ", ".join(sorted(set(dataset.runs.counts("split")) - {""})) or "none: it was not split"
        raise UsageError(f"{dataset.store.name}: no run in split {split!r}; the dataset has the splits {present}")
    return runs


def _whole(name: str, number: Any) -> Any:
    """The number as int (None stays None), or UsageError where it is none: 4.5 frames must not become 4."""
    try:
        return None if number is None else operator.index(number)
    except TypeError as error:
        raise UsageError(f"{name}={number!r}: expected a whole number") from error


def _whole_grid(grid: Any) -> Shape3 | None:
    if grid is None:
        return None
    sizes = tuple(_whole("grid", size) for size in grid) if isinstance(grid, Sequence) else ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise UsageError(f"grid {grid!r}: expected three sizes of 1 or more voxels")
    return sizes
