"""What is stored beside the voxels of one run: found before it is read, measured in the same pass, written at its end."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.ingest.resampling import Resampling
from fmristream.ingest.run_stream import RunHeader
from fmristream.ingest.side_tables import read_side_tables
from fmristream.ingest.sources import SourceRun
from fmristream.shards.digest import sha256, sha256_json
from fmristream.shards.parcels import ParcelSpace, read_parcels
from fmristream.shards.side import SideWriter, Table
from fmristream.shards.spaces import AnySpace, Space
from fmristream.signal.parcellate import ParcelSeries, robust_statistics
from fmristream.signal.sketch import RunSketch
from fmristream.storage import Store

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SideTask:
    """What is wanted beside the voxels of a run.

    Attributes:
        parcels: documents of the spaces of parcels by digest; they lie in the dataset already.
        tables: whether confounds, events and recordings are stored where there are some.
        sketch: whether a fingerprint is.
    """

    parcels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: bool = False
    sketch: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What is known before the first frame.

    Attributes:
        task: what is wanted.
        frames: of the run.
        tables: what will be stored, by name.
        notes: what was left out of them, without names of files or people.
    """

    task: SideTask
    frames: int
    tables: Mapping[str, Table]
    notes: tuple[str, ...]

    @property
    def decided(self) -> dict[str, Any]:
        """What makes another run of it, for its record."""
        tables = {name: _digest(table) for name, table in sorted(self.tables.items())}
        return {
            **({"parcels": sorted(self.task.parcels)} if self.task.parcels else {}),
            **({"sketch": True} if self.task.sketch else {}),
            **({"tables": tables} if tables else {}),
        }

    def measures(self, store: Store, space: AnySpace) -> "Measures":
        """What takes the run's frames."""
        spaces = [
            read_parcels(store, digest=digest, document=document)
            for digest, document in sorted(self.task.parcels.items())
        ]
        return Measures(
            series=[(one, ParcelSeries(one.weights, frames=self.frames)) for one in spaces],
            sketch=RunSketch(space.grid, space.mask, frames=self.frames)
            if self.task.sketch and isinstance(space, Space)
            else None,
            tables=self.tables,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Takes every frame once, then stores what came of it."""

    series: list[tuple[ParcelSpace, ParcelSeries]]
    sketch: RunSketch | None
    tables: Mapping[str, Table]

    def add(self, values: NDArray[Any]) -> None:
        """Count one frame, (v,) stored values."""
        for _, series in self.series:
            series.add(values)
        if self.sketch is not None:
            self.sketch.add(values)

    def store(self, side: SideWriter) -> None:
        """Write all of it."""
        for space, series in self.series:
            values = series.finish()
            side.put_parcels(space, values, robust_statistics(values))
        if self.sketch is not None:
            side.put_sketch(self.sketch.finish().encode())
        for name, table in self.tables.items():
            side.put_table(name, table)


def read_beside(task: SideTask, run: SourceRun, header: RunHeader, resampling: Resampling | None = None) -> Beside:
    """Read what lies beside a run; tables are about its source, however it is resampled.

    Args:
        task: what is wanted.
        run: where its tables lie.
        header: of what is stored.
        resampling: from the source to that.

    Raises:
        StorageError: a remote store failed.
    """
    tables: Mapping[str, Table] = {}
    notes: tuple[str, ...] = ()
    if task.tables:
        tables, notes = read_side_tables(
            run.side,
            frames=header.frames if resampling is None else resampling.source.frames,
            subject=run.subject,
            is_pseudonymous=run.is_pseudonymous,
            is_resampled_in_time=resampling is not None and resampling.new_tr_s is not None,
        )
    return Beside(task=task, frames=header.frames, tables=tables, notes=notes)


def grouped_notes(of_runs: Iterable[tuple[str, tuple[str, ...]]]) -> list[str]:
    """The notes of (name of a run, its notes), each once with the runs that it is about."""
    runs: dict[str, list[str]] = defaultdict(list)
    for name, notes in of_runs:
        for note in notes:
            runs[note].append(name)
    return [f"{_named(names)}: {note}" for note, names in runs.items()]


def _named(names: list[str]) -> str:
    names = sorted(names)
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{len(names)} runs ({', '.join(names[:_SHOWN])}, ...)"


def _digest(table: Table) -> str:
    columns = {
        name: sha256(np.asarray(values, dtype="<f8").tobytes()) if isinstance(values, np.ndarray) else list(values)
        for name, values in table.columns.items()
    }
    return sha256_json({"columns": columns, "facts": dict(table.facts), "order": list(columns)})
