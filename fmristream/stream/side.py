"""What else is known of a window's frames: confounds, parcels, recordings, events; NaN where nothing is known. numpy only.

A frame lasts from its number times the repetition time to the next; times are in seconds from the start of the first frame,
as BIDS has them.
"""

import difflib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.catalog.run_table import RunTable
from fmristream.errors import UsageError
from fmristream.sampling.clip import Clip
from fmristream.shards.dataset import Dataset
from fmristream.shards.parcels import KIND
from fmristream.shards.side import CONFOUNDS, EVENTS, parcel_spaces_of, read_small_array, read_table

# Series of runs that were read last; one of 400 parcels over 1,200 frames takes 2 MB.
CACHE_BYTES = 32 * 2**20

# SPM12's `spm_hrf` with its defaults (delays of 6 and 16 s, dispersions of 1 s, ratio 6, 32 s long), as in Friston et al. 1998:
# a difference of two gamma densities.
_PEAK, _UNDERSHOOT, _RATIO, _LENGTH_S = 6, 16, 6.0, 32.0
_STEP_S = 0.01

# Runs whose tables are read in search of a column that the first ones lack.
_LOOKED_AT = 64

# Of a frame: sample times are computed from rates, and one that is meant to be on a border must not fall before it.
_BORDER = 1e-9

Series = NDArray[np.float32]


class SideSeries(Protocol):
    """One series of a batch's `side`."""

    @property
    def name(self) -> str: ...

    def columns_in(self, dataset: Dataset, run: Run) -> tuple[str, ...] | None:
        """What of it a run has; None where it has nothing of the kind."""
        ...

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Which columns; None where the dataset tells."""
        ...

    def of(self, dataset: Dataset, run: Run, columns: tuple[str, ...]) -> Series:
        """(frames, k) of a whole run."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Confounds:
    """Columns of the confounds table, which has a row a frame."""

    columns: tuple[str, ...]
    name: str = CONFOUNDS

    def columns_in(self, dataset: Dataset, run: Run) -> tuple[str, ...] | None:
        found = dataset.confounds(run)
        return None if found is None else tuple(found)

    def of(self, dataset: Dataset, run: Run, columns: tuple[str, ...]) -> Series:
        found = dataset.confounds(run) or {}
        return _stacked([_numbers(found.get(column), run.frames) for column in columns])


@dataclass(frozen=True, slots=True, kw_only=True)
class ParcelSeries:
    """The stored series of an atlas's parcels, in the signal's unit.

    Attributes:
        atlas: the first 8 digits or more of its digest; "" where runs have one.
        name: in `Batch.side`.
    """

    atlas: str = ""
    name: str = "parcels"
    columns: None = None

    def columns_in(self, dataset: Dataset, run: Run) -> tuple[str, ...] | None:
        found = self._array(dataset, run)
        return None if found is None else tuple(str(number) for number in range(found[1]))

    def of(self, dataset: Dataset, run: Run, columns: tuple[str, ...]) -> Series:
        found = self._array(dataset, run)
        if found is None:
            return np.full((run.frames, len(columns)), np.nan, dtype=np.float32)
        values = read_small_array(dataset.reader(run), found[0]).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite
            return (values * run.slope + run.inter).astype(np.float32)

    def _array(self, dataset: Dataset, run: Run) -> tuple[str, int] | None:
        """(name of the array, parcels)."""
        documents = {
            array: dataset.generation.document["spaces"][digest]
            for array, digest in parcel_spaces_of(dataset, dataset.reader(run)).items()
        }
        fitting = {
            array: int(document["parcels"])
            for array, document in documents.items()
            if document["kind"] == KIND and str(document["atlas"]).startswith(self.atlas.lower())
        }
        if len(fitting) > 1:
            known = ", ".join(str(documents[array]["atlas"])[:12] for array in fitting)
            raise UsageError(
                f"side {self.name!r}: runs have parcels of several atlases ({known}); write 'parcels:DIGITS' of one"
            )
        return next(iter(fitting.items()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Columns of a recording, brought to the frames' times.

    Attributes:
        recording: its name, such as `physio-cardiac`.
        columns: which of its columns.
        how: `mean` of what was recorded during each frame (no value where that is nothing: a recording slower than the frames
            wants `nearest`), or the sample `nearest` to its middle.
        name: in `Batch.side`.
    """

    recording: str
    columns: tuple[str, ...]
    how: str = "mean"
    name: str = ""

    def __post_init__(self) -> None:
        if self.how not in ("mean", "nearest"):
            raise UsageError(f"side {self.recording!r}: how={self.how!r}: expected 'mean' or 'nearest'")
        object.__setattr__(self, "name", self.name or self.recording)

    def columns_in(self, dataset: Dataset, run: Run) -> tuple[str, ...] | None:
        table = read_table(dataset.reader(run), self.recording)
        return None if table is None else tuple(table.columns)

    def of(self, dataset: Dataset, run: Run, columns: tuple[str, ...]) -> Series:
        table = read_table(dataset.reader(run), self.recording)
        if table is None:
            return _unknown(run.frames, len(columns))
        found = [_numbers(table.columns.get(column), table.rows) for column in columns]
        if "sampling_hz" not in table.facts:
            return _stacked([values[: run.frames] for values in found])
        if run.tr_s is None:
            return _unknown(run.frames, len(columns))
        resample = average_in_frames if self.how == "mean" else nearest_to_frames
        rate, start = table.facts["sampling_hz"], table.facts["start_s"]
        return _stacked(
            [resample(values, sampling_hz=rate, start_s=start, frames=run.frames, tr_s=run.tr_s) for values in found]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """One regressor for each trial type: when it was on, or what blood is expected to do about it.

    A run without an events table gives NaN; one whose table lacks the type gives 0; so do `n/a` in onset or duration of an
    event of the type give NaN for the whole regressor, since nobody knows where it would be.

    Attributes:
        trial_types: one column each; none: all events together.
        hrf: convolve with the canonical response of SPM12, else the share of each frame during which events were on (an event
            without duration counts as one frame).
        name: in `Batch.side`.
    """

    trial_types: tuple[str, ...] = ()
    hrf: bool = False
    name: str = EVENTS

    @property
    def columns(self) -> tuple[str, ...]:
        return self.trial_types or ("",)

    def columns_in(self, dataset: Dataset, run: Run) -> tuple[str, ...] | None:
        table = dataset.events(run)
        return (
            None
            if table is None
            else ("", *sorted({str(kind) for kind in table.get("trial_type", ()) if kind is not None}))
        )

    def of(self, dataset: Dataset, run: Run, columns: tuple[str, ...]) -> Series:
        table = dataset.events(run)
        if table is None or run.tr_s is None:
            return _unknown(run.frames, len(columns))
        onset, duration = (np.asarray(table[name], dtype=np.float64) for name in ("onset", "duration"))
        kinds = np.array(table.get("trial_type", [None] * len(onset)), dtype=object)
        found = []
        for kind in columns:
            mine = np.ones(len(onset), dtype=bool) if kind == "" else kinds == kind
            regressor = hrf_regressor if self.hrf else boxcar_regressor
            found.append(regressor(onset[mine], duration[mine], frames=run.frames, tr_s=run.tr_s))
        return _stacked(found)


class SideReader:
    """Reads the side series of clips; those of the runs used last are kept. Picklable, safe to share between threads.

    Args:
        dataset: where they lie.
        runs: that clips count in.
        series: what is wanted: values, or text that `parse_side` understands.

    Raises:
        UsageError: no run has one of them, or it lacks a column.
    """

    def __init__(self, dataset: Dataset, runs: RunTable, series: Sequence["str | SideSeries"]) -> None:
        if isinstance(series, str):
            raise UsageError(f"side={series!r}: expected a list; write side=[{series!r}]")
        self._dataset, self._runs = dataset, runs
        self._series = {one.name: one for one in (parse_side(it) if isinstance(it, str) else it for it in series)}
        if len(self._series) < len(series):
            raise UsageError(
                "two side series have one name; give one of them another: side=[Confounds(columns=..., name=...)]"
            )
        self.columns: Mapping[str, tuple[str, ...]] = {
            name: _require_columns(dataset, runs, one) for name, one in self._series.items()
        }
        self._kept: OrderedDict[tuple[str, int], Series] = OrderedDict()
        self._lock = Lock()

    @property
    def wanted(self) -> dict[str, tuple[SideSeries, tuple[str, ...]]]:
        """What each name stands for."""
        return {name: (one, self.columns[name]) for name, one in self._series.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept, self._lock = OrderedDict(), Lock()

    def empty(self, count: int, frames: int) -> dict[str, Series]:
        """Room for `count` clips of each series, NaN: (b, t), or (b, t, k) of several columns."""
        return {name: np.full((count, *self._shape(name, frames)), np.nan, dtype=np.float32) for name in self._series}

    def read(self, clip: Clip, rows: Mapping[str, Series]) -> None:
        """Fill (t,) or (t, k) arrays with a clip's series; frames after the run's end stay as they are.

        Raises:
            CorruptDataError: a stored table has changed.
        """
        frames = np.asarray(clip.frames)
        frames = frames[frames < self._runs[clip.run].frames] if self._series else frames
        for name in self._series:
            found = self._whole(name, clip.run)[frames]
            rows[name][: len(frames)] = found if rows[name].ndim == 2 else found[:, 0]

    def _shape(self, name: str, frames: int) -> tuple[int, ...]:
        columns = len(self.columns[name])
        return (frames,) if columns == 1 and self._series[name].columns is not None else (frames, columns)

    def _whole(self, name: str, run: int) -> Series:
        with self._lock:
            if (name, run) in self._kept:
                self._kept.move_to_end((name, run))
                return self._kept[name, run]
        found = self._series[name].of(self._dataset, self._runs[run], self.columns[name])
        with self._lock:
            self._kept[name, run] = found
            held = sum(kept.nbytes for kept in self._kept.values())
            while held > CACHE_BYTES and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                held -= dropped.nbytes
        return found


def parse_side(text: str) -> SideSeries:
    """A series from text.

    `confounds:trans_x,rot_x`, `parcels`, `parcels:DIGITS`, `events`, `events:face,house`, `hrf:face`, `physio-cardiac:pulse`.

    Raises:
        UsageError: it lacks columns.
    """
    kind, _, rest = text.partition(":")
    names = tuple(name.strip() for name in rest.split(",") if name.strip())
    if kind == "parcels" and len(names) <= 1:
        return ParcelSeries(atlas="".join(names))
    if kind in (EVENTS, "hrf"):
        return Events(trial_types=names, hrf=kind == "hrf", name=kind)
    if not kind or not names:
        raise UsageError(
            f"side {text!r}: expected NAME:COLUMN,COLUMN such as 'confounds:trans_x,rot_x' or 'physio-cardiac:pulse', 'parcels', "
            "'events:TYPE' or 'hrf:TYPE'"
        )
    return Confounds(columns=names) if kind == CONFOUNDS else Recording(recording=kind, columns=names)


def average_in_frames(
    values: NDArray[np.float64], *, sampling_hz: float, start_s: float, frames: int, tr_s: float
) -> Series:
    """(frames,) mean of the finite samples that lie in each frame; NaN where there is none."""
    frame = np.floor((start_s + np.arange(len(values)) / sampling_hz) / tr_s + _BORDER).astype(np.int64)
    used = (frame >= 0) & (frame < frames) & np.isfinite(values)
    count = np.bincount(frame[used], minlength=frames)
    total = np.bincount(frame[used], weights=values[used], minlength=frames)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def nearest_to_frames(
    values: NDArray[np.float64], *, sampling_hz: float, start_s: float, frames: int, tr_s: float
) -> Series:
    """(frames,) the sample nearest to each frame's middle; NaN where the recording had not begun or was over."""
    wanted = np.rint(((np.arange(frames) + 0.5) * tr_s - start_s) * sampling_hz).astype(np.int64)
    inside = (wanted >= 0) & (wanted < len(values))
    found = np.full(frames, np.nan)
    found[inside] = values[wanted[inside]]
    return found.astype(np.float32)


def boxcar_regressor(
    onset_s: NDArray[np.float64], duration_s: NDArray[np.float64], *, frames: int, tr_s: float
) -> Series:
    """(frames,) share of each frame during which events were on, added up where they overlap."""
    if not _are_known(onset_s, duration_s):
        return np.full(frames, np.nan, dtype=np.float32)
    start = np.arange(frames) * tr_s
    found = np.zeros(frames)
    for onset, duration in zip(onset_s, duration_s, strict=True):
        if duration > 0:
            found += np.clip(np.minimum(onset + duration, start + tr_s) - np.maximum(onset, start), 0, None) / tr_s
        elif 0 <= (frame := math.floor(onset / tr_s + _BORDER)) < frames:
            found[frame] += 1
    return found.astype(np.float32)


def hrf_regressor(onset_s: NDArray[np.float64], duration_s: NDArray[np.float64], *, frames: int, tr_s: float) -> Series:
    """(frames,) response to events at each frame's middle; 1 is what an endless event would reach.

    An event without duration is an impulse of one second's area, whatever the repetition time.
    """
    if not _are_known(onset_s, duration_s):
        return np.full(frames, np.nan, dtype=np.float32)
    middle = (np.arange(frames) + 0.5) * tr_s
    times = np.arange(0, _LENGTH_S + _STEP_S / 2, _STEP_S)
    response = canonical_hrf(times)
    reached = np.concatenate([[0.0], np.cumsum((response[1:] + response[:-1]) / 2 * _STEP_S)])
    found = np.zeros(frames)
    for onset, duration in zip(onset_s, duration_s, strict=True):
        since = middle - onset
        if duration > 0:
            found += np.interp(since, times, reached) - np.interp(since - duration, times, reached)
        else:
            found += np.interp(since, times, response, left=0, right=0)
    return found.astype(np.float32)


def canonical_hrf(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """SPM12's response to an impulse at time 0, per second; its integral is 1."""
    t = np.maximum(times_s, 0)
    peak, undershoot = (t ** (shape - 1) * np.exp(-t) / math.factorial(shape - 1) for shape in (_PEAK, _UNDERSHOOT))
    found: NDArray[np.float64] = (peak - undershoot / _RATIO) / (1 - 1 / _RATIO)
    return found


def _require_columns(dataset: Dataset, runs: RunTable, series: SideSeries) -> tuple[str, ...]:
    """The columns of a series; those of the first run that has it, where the series leaves it to the data.

    Runs may lack columns that others have, as fMRIPrep's do; a name that is in none would be NaN in silence.
    """
    found: dict[str, None] = {}
    for looked_at, columns in enumerate(_present(dataset, runs, series)):
        found |= dict.fromkeys(columns)
        if series.columns is None or set(series.columns) <= set(found):
            return columns if series.columns is None else series.columns
        if looked_at >= _LOOKED_AT:
            break
    if not found:
        raise UsageError(
            f"{dataset.store.name}: side {series.name!r}: no selected run has it; leave it out, or convert the runs with it"
        )
    column = next(column for column in series.columns or () if column not in found)
    near = ", ".join(difflib.get_close_matches(column, found, n=3) or sorted(found)[:8])
    raise UsageError(f"{dataset.store.name}: side {series.name!r}: no run has {column!r}; there are {near}")


def _present(dataset: Dataset, runs: RunTable, series: SideSeries) -> Iterator[tuple[str, ...]]:
    for run in runs:
        columns = series.columns_in(dataset, run)
        if columns is not None:
            yield columns


def _are_known(onset_s: NDArray[np.float64], duration_s: NDArray[np.float64]) -> bool:
    return bool(np.isfinite(onset_s).all() and np.isfinite(duration_s).all())


def _numbers(values: Any, rows: int) -> NDArray[np.float64]:
    """A column of numbers; NaN where a table has none of this name, or words."""
    if isinstance(values, np.ndarray):
        return values
    return np.full(rows, np.nan)


def _unknown(frames: int, columns: int) -> Series:
    return np.full((frames, columns), np.nan, dtype=np.float32)


def _stacked(columns: Sequence[NDArray[Any]]) -> Series:
    return np.stack(columns, axis=1).astype(np.float32)
