"""A selection of runs, cut into clips: the map-style dataset under every loader. No torch in here."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.catalog.split import SplitPart
from fmristream.sampling.clip import Clip
from fmristream.sampling.deal import Draws
from fmristream.sampling.order import Locality
from fmristream.shards.dataset import Dataset, open_dataset
from fmristream.signal.grid import Shape3
from fmristream.signal.parcellate import Atlas
from fmristream.signal.recipes import parse_recipe
from fmristream.storage.cache import CachedStore, DiskCache
from fmristream.storage.local import LocalStore
from fmristream.stream.clip_plan import plan_clips, tell_what_is_left_out
from fmristream.stream.cuts import cut_of
from fmristream.stream.facts import ClipFacts
from fmristream.stream.fitted import Fitted, require_fitted
from fmristream.stream.forks import ForkGuard
from fmristream.stream.items import item_of
from fmristream.stream.placement import placement_of
from fmristream.stream.selection import Weights, require_one_grid, require_one_space, select_runs
from fmristream.stream.side import SideReader, SideSeries
from fmristream.stream.targets import read_targets
from fmristream.stream.values import require_same_inputs
from fmristream.stream.window_reader import Scratch, WindowReader

# Runs of recent rows that stay in memory, 1 kB each.
_RECENT_RUNS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a batch: which clip of which run.

    Attributes:
        clips: the selection that it is from.
        run: its run.
        clip: its frames.
        number: window number of its sample; second views have that of the first.
        source: place of the selection in a mixture; 0 where there is one.
    """

    clips: "StreamingDataset"
    run: Run
    clip: Clip
    number: int
    source: int = 0


class StreamingDataset(ClipFacts):
    """Clips of runs, streamed from a converted dataset.

    Give it to `StreamingLoader`, or to any torch DataLoader: it has a length and items.

    Args:
        source: URL of a dataset, or an open `Dataset`, which may be a `where` of one.
        window: frames of a window; None for whole runs, which come padded to the longest (`Batch.lengths`, `Batch.frames_valid`).
        stride: frames from one window's start to the next; what a window spans where not given.
        step: frames from one frame of a window to the next (dilation).
        random_phase: shift the windows of each run by a number of frames below the stride, drawn anew for every epoch.
        split: `train`, `val`, `test` as stored, or a part of a `fmristream.split`; None for all runs.
        where: a condition over columns of runs and participants, such as `age > 60 and task == 'rest'`.
        seed: shuffles the windows, each epoch anew; None for stored order, one pass (evaluation).
        views: `same-run` or `same-subject`: samples have a second view that shares no frame with the first.
        events: a condition over columns of BIDS events, such as `trial_type == 'face'`: clips begin at these events.
        delay_s: seconds from an event's onset to the first frame of its clip.
        weights: `subject` or `column:NAME` for equal shares of each, or a number for each of `runs`: how often its
            windows come.
        locality: windows of a run that stay together, to spare reads; a number, or a `Locality`.
        normalize: a recipe: steps joined by ` | `, as `voxel-zscore` or `detrend | confounds:motion24 | voxel-zscore`
            (docs/recipes.md).
        stats: what a run's statistics may see: `run` (all of it), for whoever predicts the future `prefix` (frames before the
            end of the clip's context) or `context` (the context's frames).
        context: frames at a clip's beginning that are known, for `prefix` and `context`.
        fitted: statistics of the training runs, from `fmristream.fit`, for steps that need some.
        fitted_elsewhere: take them although they were fitted to other data: those of a trained network, which is applied here.
        atlases: what `parcels:NAME` means, where the parcels are not stored with the runs.
        targets: columns of the participants table that samples carry.
        grid: (x, y, z) to pad or cut the native grid to, centred; the native grid where not given. Grayordinates have
            none: their windows come packed, (c, t, grayordinates), as `packed` of items and batches.
        orientation: which way the grid's axes are to run, such as `RAS`; as stored where not given. Axes are turned before
            `grid` pads or cuts them; nothing is interpolated.
        side: what else is known of the frames, aligned to each window: `confounds:trans_x,rot_x`, `parcels`,
            `physio-cardiac:pulse`, `events:face,house`, or values of fmristream.stream.side.
        exact: z-score by float32 moments even where float16 ones are stored.
        mix_spaces: allow runs of one grid and mask whose voxels do not correspond (unaligned subjects).
        cache: folder in which chunks that were fetched are kept for the next epoch, or for other processes; for remote
            datasets. None: nothing is ever written to a disk.
        cache_bytes: what the folder may hold.

    Attributes:
        left_out: what is not streamed, in words, and how many: runs shorter than the window, whole runs no longer than the
            context, and the like.

    Raises:
        UsageError: no run is selected, or an argument makes no sense.
        SpaceError: the selected runs share no space, or a grid is asked for where they are grayordinates.
    """

    def __init__(
        self,
        source: str | Dataset,
        *,
        window: int | None = 20,
        stride: int | None = None,
        step: int = 1,
        random_phase: bool = False,
        split: str | SplitPart | None = None,
        where: str | None = None,
        seed: int | None = None,
        views: str | None = None,
        events: str | None = None,
        delay_s: float = 0.0,
        weights: Weights | None = None,
        locality: int | Locality | None = None,
        normalize: str = "voxel-zscore",
        targets: Sequence[str] = (),
        grid: Shape3 | None = None,
        orientation: str | None = None,
        side: Sequence[str | SideSeries] = (),
        exact: bool = False,
        mix_spaces: bool = False,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = 64 * 2**30,
        stats: str = "run",
        context: int | None = None,
        fitted: Sequence[Fitted] = (),
        atlases: Mapping[str, Atlas] | None = None,
        fitted_elsewhere: bool = False,
    ) -> None:
        self.dataset = _opened(source, cache, cache_bytes, has_targets=bool(targets))
        if where is not None:
            self.dataset = self.dataset.where(where)
        self.split, self.normalize = split, normalize
        cut = cut_of(
            window=window,
            stride=stride,
            step=step,
            random_phase=random_phase,
            views=views,
            events=events,
            delay_s=delay_s,
            weights=weights,
            locality=locality,
            seed=seed,
            context=context,
        )
        self.seed = cut.seed
        self._targets = read_targets(self.dataset, targets)
        self.runs = select_runs(self.dataset, split)
        require_one_grid(self.runs, where=self.dataset.store.name)
        if not mix_spaces:
            require_one_space(self.runs, where=self.dataset.store.name)
        require_fitted(fitted, self.dataset, split, is_frozen=fitted_elsewhere)
        values = [one.values for one in fitted]
        self.recipe = parse_recipe(normalize, stats=stats, context=cut.context, fitted=values, atlases=atlases)
        require_same_inputs(self.recipe, where=self.dataset.store.name)
        self._plan = plan_clips(self.dataset, self.runs, cut, split=split)
        self.left_out = self._plan.left_out
        tell_what_is_left_out(self._plan, where=self.dataset.store.name)
        self._exact = exact
        self._reader = WindowReader(dataset=self.dataset, recipe=self.recipe, exact=exact)
        self._placement = placement_of(
            self.dataset, self.runs[0], self.recipe, normalize=normalize, grid=grid, orientation=orientation
        )
        self.side = SideReader(self.dataset, self.runs, side)
        self._guard = ForkGuard(self.dataset.store.name)
        self._recent: dict[int, Run] = {}

    def rows(self, draws: Draws) -> list[Row]:
        """The rows of a batch, or of a rank's share: first views of all samples, then the second ones of all.

        Raises:
            UsageError: the process was forked from one that had read from a remote store.
        """
        self._guard.check()
        found: list[list[Row]] = [[] for _ in range(self.views)]
        # Positions of an epoch lie together.
        edges = [0, *(np.flatnonzero(np.diff(draws.epoch)) + 1).tolist(), len(draws.epoch)]
        for start, stop in pairwise(edges):
            if stop > start:
                mine = slice(start, stop)
                for view, rows in enumerate(self._rows(draws.number[mine], draws.slot[mine], int(draws.epoch[start]))):
                    found[view] += rows
        return [row for rows in found for row in rows]

    def _rows(self, numbers: NDArray[np.int64], slots: NDArray[np.int64], epoch: int) -> list[list[Row]]:
        """The views of some samples of one epoch."""
        step = self._plan.cut.step
        return [
            [
                Row(
                    clips=self,
                    run=self._run_at(run),
                    clip=Clip(run=run, start=start, length=length, step=step),
                    number=number,
                )
                for run, start, length, number in zip(*(column.tolist() for column in (*view, numbers)), strict=True)
            ]
            for view in self._plan.locate(numbers, slots, epoch)
        ]

    def _run_at(self, position: int) -> Run:
        """A row of the table, which costs 50 us to take out; those taken last are kept."""
        run = self._recent.get(position)
        if run is None:
            if len(self._recent) >= _RECENT_RUNS:
                self._recent.clear()
            run = self._recent[position] = self.runs[position]
        return run

    def clip(self, number: int, epoch: int = 0) -> Clip:
        """The frames that a window number means in an epoch."""
        ((row,), *_) = self._rows(*(np.array([number], dtype=np.int64),) * 2, epoch)
        return row.clip

    def locate(self, number: int, epoch: int = 0) -> tuple[Run, int]:
        """(run, first frame) of a window number in an epoch."""
        clip = self.clip(number, epoch)
        return self.runs[clip.run], clip.start

    @property
    def reader(self) -> WindowReader:
        """What reads clips of the dataset."""
        return self._reader

    def frames_kept(self, row: Row) -> NDArray[np.bool_]:
        """(t,) of a clip, False for frames that the recipe scrubs."""
        kept, frames = np.ones(self.window, dtype=bool), row.clip.frames
        of_run = self._reader.prepared(row.run).kept
        if of_run is not None:
            kept[: len(frames)] = of_run[list(frames)]
        return kept

    def fill(self, run: Run) -> NDArray[np.float32]:
        """(c,) what stands outside the mask under this normalisation."""
        known = self.recipe.fill(run)
        return self._reader.prepared(run).fill if known is None else known

    def read_clip(self, run: Run, clip: Clip, packed: NDArray[np.float32], scratch: Scratch) -> None:
        """Fill `packed` (c, t, v) with a clip's normalised in-mask values; frames behind its last one with background."""
        self._guard.check()
        self._reader.read(run, clip, packed[:, : clip.length], scratch)
        packed[:, clip.length :] = self.fill(run)[:, None, None]

    def read_packed(self, number: int, packed: NDArray[np.float32], scratch: Scratch) -> None:
        """Fill `packed` (c, t, v) with a window's normalised in-mask values."""
        clip = self.clip(number)
        self.read_clip(self.runs[clip.run], clip, packed, scratch)

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One window by number, placed on the grid: `bold` (c, x, y, z, t) float32 and what it is.

        Grayordinates come as `packed` (c, t, grayordinates) in place of `bold`.
        """
        return self.item(number)

    def item(self, number: int, epoch: int = 0) -> dict[str, Any]:
        """The same of an epoch, which matters to random phases and views; two views have a leading axis (2, c, ...)."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"window {number} was asked for, there are {len(self)}")
        number %= len(self)
        rows = [row for (row,) in self._rows(*(np.array([number], dtype=np.int64),) * 2, epoch)]
        return item_of(self, rows)

    @property
    def side_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each side series of a window."""
        return {name: rows.shape[1:] for name, rows in self.side.empty(1, self.window).items()}

    def read_side(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """Side series of a clip, (t,) or (t, k); NaN behind its last frame."""
        side = {name: rows[0] for name, rows in self.side.empty(1, self.window).items()}
        self.side.read(clip, {name: rows[: clip.length] for name, rows in side.items()})
        return side


def _opened(
    source: str | Dataset, cache: str | os.PathLike[str] | None, cache_bytes: int, *, has_targets: bool
) -> Dataset:
    """The dataset, behind its cache; what will be asked of a remote one is asked for at once."""
    dataset = source if isinstance(source, Dataset) else open_dataset(source)
    if cache is not None:
        store = CachedStore(dataset.store, DiskCache(cache, cache_bytes))
        dataset = Dataset(dataset.url, store, dataset.generation, filters=dataset.filters)
    if not isinstance(dataset.store, LocalStore):
        dataset.warm(participants=has_targets)
    return dataset
