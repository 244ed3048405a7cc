"""Where clips begin that are locked to events: the frame nearest to the onset plus a delay. One small read a run."""

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.catalog.run_table import RunTable
from fmristream.catalog.where import Column, Condition, nearest
from fmristream.errors import UsageError
from fmristream.sampling.window import Window
from fmristream.shards.dataset import Dataset

# Tables that are asked for at once: they are small, and what they cost is latency.
_THREADS = 8
_RUNS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventStarts:
    """First frames of clips.

    Attributes:
        starts: of each run, in order; equal ones where events share a frame.
        left_out: what there is none of, in words, and how many.
    """

    starts: tuple[NDArray[np.int64], ...]
    left_out: Counter[str]


def event_starts(dataset: Dataset, runs: RunTable, condition: str, *, window: Window, delay_s: float) -> EventStarts:
    """First frames of the clips that follow events.

    Args:
        dataset: where the runs' events lie.
        runs: the selection.
        condition: over the columns of events, such as `trial_type == 'face'`.
        window: frames of a clip.
        delay_s: seconds from an event's onset to the clip's first frame; 4 to 6 for the peak of a haemodynamic response.

    Raises:
        UsageError: the condition is none, no run has such a column, or the delay is no number.
        CorruptDataError: a table of events has changed.
    """
    if not math.isfinite(delay_s):
        raise UsageError(f"delay_s={delay_s!r}: expected seconds")
    wanted = Condition.parse(condition)
    left_out: Counter[str] = Counter()
    names: set[str] = set()
    starts = []
    for run, columns in _tables(dataset, runs):
        names |= set(columns)
        starts.append(_starts(run, columns, wanted, window, delay_s, left_out))
    unknown = sorted(wanted.names - names)
    if names and unknown:
        raise UsageError(
            f"events={condition!r}: no run's events have a column {unknown[0]!r}{nearest(unknown[0], sorted(names))}"
        )
    return EventStarts(starts=tuple(starts), left_out=left_out)


def _tables(dataset: Dataset, runs: RunTable) -> Iterator[tuple[Run, dict[str, Column]]]:
    remaining = iter(runs)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fmristream-events") as pool:
        while some := list(islice(remaining, _RUNS_AT_ONCE)):
            for run, columns in zip(some, pool.map(dataset.events, some), strict=True):
                made = {
                    name: Column.of_words(cells) if isinstance(cells, list) else Column(values=cells)
                    for name, cells in (columns or {}).items()
                }
                yield run, made


def _starts(
    run: Run, columns: dict[str, Column], wanted: Condition, window: Window, delay_s: float, left_out: Counter[str]
) -> NDArray[np.int64]:
    none = np.zeros(0, dtype=np.int64)
    if not columns or not len(columns["onset"].values):
        left_out["runs without events"] += 1
        return none
    if not run.tr_s:
        left_out["runs whose repetition time is not known"] += 1
        return none
    onsets = columns["onset"].values
    missing = Column(values=np.full(len(onsets), np.nan))
    mask = wanted.mask(
        lambda name: columns.get(name, missing), known=sorted({*columns, *wanted.names}), rows=len(onsets)
    )
    if not mask.any():
        left_out["runs without an event of this kind"] += 1
        return none
    onsets = onsets[mask]
    left_out["events without an onset"] += int(np.isnan(onsets).sum())
    first = np.floor((onsets[~np.isnan(onsets)] + delay_s) / run.tr_s + 0.5)
    fits = (first >= 0) & (first + window.span <= run.frames)
    left_out["events whose clip does not fit into their run"] += int((~fits).sum())
    return np.sort(first[fits].astype(np.int64))
