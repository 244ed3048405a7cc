"""A selection of runs, cut into clips: the map-style dataset under every loader. No torch in here."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.columns import JoinedColumns
from fmristream.catalog.run import Run
from fmristream.catalog.split import SplitPart
from fmristream.errors import SpaceError, UsageError
from fmristream.sampling.clip import Clip
from fmristream.sampling.deal import Draws, Order, ShuffledOrder, StoredOrder
from fmristream.sampling.keys import key_of
from fmristream.sampling.order import Locality
from fmristream.sampling.state import StreamState
from fmristream.sampling.views import VIEWS, Partners
from fmristream.sampling.weights import Quotas
from fmristream.sampling.window import ClipTable, EventTable, WholeRuns, Window, WindowTable
from fmristream.shards.dataset import Dataset, open_dataset
from fmristream.shards.digest import sha256, sha256_json
from fmristream.signal.grid import Shape3, voxel_sizes_mm
from fmristream.signal.orientation import Turn, axes_of_codes, axis_codes, placed_positions, tells_directions, turn_to
from fmristream.signal.parcellate import Atlas
from fmristream.signal.recipes import parse_recipe
from fmristream.storage.cache import CachedStore, DiskCache
from fmristream.storage.local import LocalStore
from fmristream.stream.events import event_starts
from fmristream.stream.fitted import Fitted, require_fitted
from fmristream.stream.forks import ForkGuard
from fmristream.stream.run_source import RunSource
from fmristream.stream.selection import (
    Weights,
    quotas_of,
    require_one_grid,
    require_one_space,
    select_runs,
    whole,
    words_of,
)
from fmristream.stream.side import SideReader, SideSeries
from fmristream.stream.targets import Target, read_target
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


class StreamingDataset:
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
        left_out: what is not streamed, in words, and how many: runs shorter than the window and the like.

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
    ) -> None:
        dataset = source if isinstance(source, Dataset) else open_dataset(source)
        dataset = dataset if cache is None else _behind_cache(dataset, cache, cache_bytes)
        if not isinstance(dataset.store, LocalStore):
            dataset.warm(participants=bool(targets))
        self.dataset = dataset if where is None else dataset.where(where)
        self.seed, grid = whole("seed", seed), _whole_grid(grid)
        if isinstance(targets, str):
            raise UsageError(f"targets={targets!r}: expected a list of columns; write targets=[{targets!r}]")
        self._frames = _window(whole("window", window), whole("stride", stride), whole("step", step))
        self._step, self.split, self.normalize = step, split, normalize
        self._phase, self._views, self._events, self._delay_s = bool(random_phase), views, events, delay_s
        self._locality = (
            locality if isinstance(locality, Locality | None) else Locality(windows=whole("locality", locality))
        )
        self._require_sense(stride, weights)
        self.runs = select_runs(self.dataset, split)
        require_one_grid(self.runs, where=self.dataset.store.name)
        if not mix_spaces:
            require_one_space(self.runs, where=self.dataset.store.name)
        self._recent: dict[int, Run] = {}
        self.left_out: Counter[str] = Counter()
        self._partners: Partners | None = None
        self._table = self._make_table()
        self._weights, self._quotas = weights, self._make_quotas(weights)
        self._tell_what_is_left_out()
        require_fitted(fitted, self.dataset, split)
        self.recipe = parse_recipe(
            normalize,
            stats=stats,
            context=whole("context", context),
            fitted=[one.values for one in fitted],
            atlases=atlases,
        )
        if context is not None and context >= self.window:
            raise UsageError(
                f"context={context}: expected fewer frames than the window's {self.window}, to predict the rest"
            )
        self._reader = WindowReader(dataset=self.dataset, recipe=self.recipe, exact=exact)
        self._targets = [
            read_target(self.dataset.participants, name, where=self.dataset.store.name) for name in targets
        ]
        # Grayordinates are a list: there is nothing that they could be placed in.
        layout = self.recipe.layout(RunSource(self.dataset, self.runs[0])) if self.recipe.reduces else None
        self._layout = layout  # None where the output has the stored voxels
        is_list = layout.mask is None if layout is not None else self.dataset.is_grayordinates(self.runs[0])
        self.has_grid = not is_list
        shape = self.runs[0].shape if layout is None or layout.mask is None else layout.mask.shape
        self._turn = self._turn_to(orientation)
        self._grid: Shape3 = grid or self._turn.shape((shape[0], shape[1], shape[2]))
        if grid is not None or orientation is not None:
            assert self.grid  # raises where there is none
        self.side = SideReader(self.dataset, self.runs, side)
        self._guard = ForkGuard(self.dataset.store.name)

    def _require_sense(self, stride: int | None, weights: Weights | None) -> None:
        """Raise UsageError for arguments that exclude each other."""
        if self._views is not None and self._views not in VIEWS:
            raise UsageError(f"views={self._views!r}: expected {' or '.join(map(repr, VIEWS))}")
        if self._events is None and self._delay_s != 0:
            raise UsageError(f"delay_s={self._delay_s}: a delay of events, but no events are asked for")
        if self.seed is None and (self._phase or weights is not None or self._locality is not None):
            raise UsageError("random_phase, weights and locality are of a shuffled order; give a seed")
        kind = (
            "whole runs (window=None)"
            if self._frames is None
            else "clips at events"
            if self._events is not None
            else ""
        )
        others = {"stride": stride, "random_phase": self._phase or None, "views": self._views}
        given = [name for name, value in others.items() if value is not None]
        if kind and given:
            raise UsageError(
                f"{kind} have no {' and no '.join(given)}; leave {'it' if len(given) == 1 else 'them'} away"
            )
        if self._frames is None and self._events is not None:
            raise UsageError("events with window=None: clips at events need a length; give window")

    def _make_table(self) -> ClipTable:
        """What there is to number: windows, clips at events, or runs."""
        frames = self.runs.numbers("frames").astype(np.int64)
        if self._frames is None:
            return WholeRuns(frames, step=self._step)
        self.left_out["runs shorter than the window"] = int((frames < self._frames.span).sum())
        if self._events is not None:
            found = event_starts(self.dataset, self.runs, self._events, window=self._frames, delay_s=self._delay_s)
            del self.left_out["runs shorter than the window"]  # told by their events
            self.left_out.update(found.left_out)
            return EventTable(found.starts, self._frames)
        if self._views is None:
            return WindowTable(frames, self._frames)
        self._partners = Partners(frames, self._frames, self._groups_of_views())
        table = WindowTable(frames, self._frames, is_alone=self._partners.is_alone)
        every = WindowTable(frames, self._frames)
        self.left_out["windows that leave no room for a second view"] = every.total - table.total
        self.left_out["runs too short for two views"] = int(((every.counts > 0) & (table.counts == 0)).sum())
        return table

    def _groups_of_views(self) -> NDArray[np.int64]:
        if self._views == "same-run":
            return np.arange(len(self.runs), dtype=np.int64)
        return self._columns.column("subject").values

    def _make_quotas(self, weights: Weights | None) -> Quotas | None:
        if weights is None:
            return None
        quotas, without = quotas_of(weights, self._columns, self._table)
        self.left_out["runs without a value to balance by"] = without
        return quotas

    def _tell_what_is_left_out(self) -> None:
        self.left_out = Counter({what: count for what, count in self.left_out.items() if count})
        if self.left_out:
            told = ", ".join(f"{count} {what}" for what, count in self.left_out.items())
            warnings.warn(
                f"{self.dataset.store.name}: left out of {len(self.runs)} selected runs: {told}", stacklevel=3
            )

    @cached_property
    def _columns(self) -> JoinedColumns:
        return JoinedColumns(self.runs, self.dataset.participant_columns)

    @property
    def window(self) -> int:
        """Frames of a clip; of whole runs those of the longest."""
        return self._table.longest

    @property
    def packed_as(self) -> tuple[Any, ...]:
        """What the values of a packed frame are: equal where those of two selections are the same places.

        Reductions by parcels and components have their own: of another dataset they are other values.
        """
        grid = self.has_grid and self.grid
        own = (self.recipe.text, self.content_digest if not grid else "", id(self.recipe) if self.recipe.fitted else 0)
        reduced = own if self.recipe.reduces else ()
        return (self.runs[0].space_digest, self.voxels, grid, self.orientation, *reduced)

    @property
    def has_windows(self) -> bool:
        """Whether all clips have as many frames; those of whole runs have not."""
        return self._frames is not None

    @property
    def stride(self) -> int:
        """Frames from one window's start to the next; 1 where there are no windows."""
        return 1 if self._frames is None else self._frames.stride

    @property
    def views(self) -> int:
        """Rows that a sample has in a batch: 2 for contrastive tasks."""
        return 1 if self._partners is None else 2

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
                f"{self.dataset.store.name}: {self._called}, which have no grid to be placed in, so no model of "
                "volumes such as SwiFT takes them; use the packed windows of batch.packed, or volumes of the same runs"
            )
        return self._grid

    @property
    def _called(self) -> str:
        if self._layout is None:
            return f"the runs hold {self.voxels} grayordinates (CIFTI-2)"
        return f"normalize={self.normalize!r} gives {self.voxels} values a frame"

    @property
    def voxels(self) -> int:
        """In-mask voxels, grayordinates, parcels or components of a frame, as they come."""
        return self.runs[0].voxels if self._layout is None else self._layout.voxels

    @cached_property
    def parcel_centres_mm(self) -> NDArray[np.float64] | None:
        """(p, 3) where the parcels of a packed frame lie, the mean position of their stored voxels, NaN for those without.

        None where the values are no parcels of volumes.
        """
        return self.recipe.parcel_centres_mm(RunSource(self.dataset, self.runs[0]))

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4) voxel to mm of the grid before it was padded or cut."""
        found = None if self._layout is None else self._layout.affine
        return self.runs[0].affine_matrix if found is None else found

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
        """Digest of the selected runs, in order, and of what makes clips of them: what the order is keyed by."""
        window = {"length": None if self._frames is None else self._frames.length, "stride": self.stride}
        selection = {"runs": self.runs.column("digest"), "window": window}
        # Nothing of this where nothing of it was asked for: digests of the first release stay what they were.
        sampling = self._sampling()
        return sha256_json({**selection, "sampling": sampling} if sampling else selection)

    def _sampling(self) -> dict[str, Any]:
        """What decides which samples come, beside runs, length and stride."""
        told: dict[str, Any] = {}
        if self._step != 1:
            told["step"] = self._step
        if self._phase:
            told["random_phase"] = True
        if self._views is not None:
            told["views"] = self._views
        if isinstance(self._table, EventTable):
            told["events"] = sha256(
                self._table.first.astype("<i8").tobytes() + self._table.starts.astype("<i8").tobytes()
            )
        if self._quotas is not None:
            told["weights"] = self._quotas.digest
        if self._locality is not None:
            told["locality"] = [self._locality.windows, self._locality.visits]
        if isinstance(self.split, SplitPart):
            told["split"] = [self.split.split.digest, self.split.part]
        return told

    @cached_property
    def order(self) -> Order:
        """What positions of a stream mean."""
        if self.seed is None:
            return StoredOrder(samples=self.num_windows)
        return ShuffledOrder(
            samples=self.num_windows if self._quotas is None else self._quotas.samples,
            seed=self.seed,
            selection_digest=self.selection_digest,
            quotas=self._quotas,
            locality=self._locality,
        )

    def state(self, consumed: int) -> StreamState:
        """Where a stream is after some samples."""
        return StreamState(
            consumed=consumed,
            seed=self.seed,
            window=None if self._frames is None else self._frames.length,
            stride=self.stride,
            windows=self.num_windows,
            selection=self.selection_digest,
            settings=self._settings,
        )

    @cached_property
    def _settings(self) -> dict[str, str]:
        """What was asked for, in words; what was not is not there."""
        asked = {
            "split": None if self.split is None else str(self.split),
            "where": " and ".join(f"({one})" for one in self.dataset.filters) or None,
            "step": None if self._step == 1 else str(self._step),
            "random_phase": "yes" if self._phase else None,
            "views": self._views,
            "events": None if self._events is None else f"{self._events}, {self._delay_s:g} s later",
            "weights": None if self._quotas is None or self._weights is None else words_of(self._weights, self._quotas),
            "locality": None
            if self._locality is None
            else f"{self._locality.windows} windows, {self._locality.visits} visits",
            "dataset": str(self.dataset.generation.document["content_digest"]),
        }
        return {name: words for name, words in asked.items() if words is not None}

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
        reduced = None if self._layout is None else self._layout.mask
        mask = self.dataset.space(self.runs[0]).mask if reduced is None else reduced
        return placed_positions(mask, grid, self._turn)

    @cached_property
    def orientation(self) -> str:
        """Where the axes of `grid` run to, such as `LAS`; "" for grayordinates and where the affine does not tell."""
        affine = self._turn.matrix(self._affine)
        return axis_codes(affine) if self.has_grid and tells_directions(affine) else ""

    @cached_property
    def voxel_sizes_mm(self) -> tuple[float, float, float] | None:
        """Edge lengths of a voxel along the axes of `grid`; None for grayordinates."""
        return voxel_sizes_mm(self._turn.matrix(self._affine)) if self.has_grid else None

    @property
    def _affine(self) -> NDArray[np.float64]:
        """(4, 4) of what is placed, before it is turned."""
        reduced = None if self._layout is None else self._layout.affine
        return self.runs[0].affine_matrix if reduced is None else reduced

    def _turn_to(self, orientation: str | None) -> Turn:
        if orientation is None:
            return Turn()
        axes_of_codes(orientation)
        return turn_to(orientation, self._affine) if self.has_grid else Turn()

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
        phase_key = self._key("phase", epoch) if self._phase else None
        runs, starts, lengths = self._table.locate(numbers, phase_key=phase_key)
        views = [(runs, starts)]
        if self._partners is not None:
            views.append(self._partners.draw(runs, starts, slots, key=self._key("view", epoch)))
        return [
            [
                Row(
                    clips=self,
                    run=self._run_at(run),
                    clip=Clip(run=run, start=start, length=length, step=self._step),
                    number=n,
                )
                for run, start, length, n in zip(
                    some.tolist(), first.tolist(), lengths.tolist(), numbers.tolist(), strict=True
                )
            ]
            for some, first in views
        ]

    def _run_at(self, position: int) -> Run:
        """A row of the table, which costs 50 us to take out; those taken last are kept."""
        run = self._recent.get(position)
        if run is None:
            if len(self._recent) >= _RECENT_RUNS:
                self._recent.clear()
            run = self._recent[position] = self.runs[position]
        return run

    def _key(self, what: str, epoch: int) -> int:
        return key_of(f"fmristream-{what}-v1", self.selection_digest, self.seed, epoch)

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

    @property
    def channels(self) -> int:
        """Channels of a window: what the normalisation makes of one signal."""
        return self.recipe.channels

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
        read = [self._read_item(row) for row in rows]
        side = [self.read_side(row.clip) for row in rows]
        first, is_one = rows[0], len(rows) == 1
        return {
            "bold" if self.has_grid else "packed": read[0] if is_one else np.stack(read),
            "run": first.run.name if is_one else tuple(row.run.name for row in rows),
            "start": first.clip.start if is_one else tuple(row.clip.start for row in rows),
            **({} if self._frames is not None else {"length": first.clip.length}),
            **({"side": side[0] if is_one else _stacked(side)} if side[0] else {}),
            "subject": first.run.subject,
            "targets": {target.name: np.float32(target.of(first.run.subject)) for target in self._targets},
            "window": number,
        }

    def _read_item(self, row: Row) -> NDArray[np.float32]:
        packed = np.empty((self.channels, self.window, self.voxels), dtype=np.float32)
        self.read_clip(row.run, row.clip, packed, Scratch())
        return self._placed(packed, row.run) if self.has_grid else packed

    @property
    def side_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each side series of a window."""
        return {name: rows.shape[1:] for name, rows in self.side.empty(1, self.window).items()}

    def read_side(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """Side series of a clip, (t,) or (t, k); NaN behind its last frame."""
        side = {name: rows[0] for name, rows in self.side.empty(1, self.window).items()}
        self.side.read(clip, {name: rows[: clip.length] for name, rows in side.items()})
        return side

    def _placed(self, packed: NDArray[np.float32], run: Run) -> NDArray[np.float32]:
        inside = self.positions >= 0
        bold = np.empty((*packed.shape[:2], int(np.prod(self.grid))), dtype=np.float32)
        bold[:] = self.fill(run)[:, None, None]
        bold[..., self.positions[inside]] = packed[..., inside]
        return np.moveaxis(bold.reshape(*packed.shape[:2], *self.grid), 1, -1)


def _behind_cache(dataset: Dataset, path: str | os.PathLike[str], limit_bytes: int) -> Dataset:
    store = CachedStore(dataset.store, DiskCache(path, limit_bytes))
    return Dataset(dataset.url, store, dataset.generation)


def _stacked(side: Sequence[Mapping[str, NDArray[np.float32]]]) -> dict[str, NDArray[np.float32]]:
    return {name: np.stack([one[name] for one in side]) for name in side[0]}


def _window(length: int | None, stride: int | None, step: int) -> Window | None:
    if length is None:
        Window(length=1, stride=1, step=step)  # refuses a step below 1
        return None
    spanned = Window(length=length, stride=1 if stride is None else stride, step=step)
    return spanned if stride is not None else Window(length=length, stride=spanned.span, step=step)


def _whole_grid(grid: Any) -> Shape3 | None:
    if grid is None:
        return None
    sizes = tuple(whole("grid", size) for size in grid) if isinstance(grid, Sequence) else ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise UsageError(f"grid {grid!r}: expected three sizes of 1 or more voxels")
    return sizes
