"""Runs and arrays of a dataset as columns: what 100,000 of them cost to hold, and rows made when they are asked for."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fmristream.catalog.run import IDENTITY, Run, StoredArray
from fmristream.catalog.tables import (
    arrays_of,
    empty_runs,
    python_column,
    read_arrays,
    read_file_sizes,
    read_runs,
    runs_of,
)

# Rows that iteration makes at once.
_BATCH_ROWS = 4096
# Rows that are kept once made; 2 kB each.
_KEPT_ROWS = 8192
Places = NDArray[np.int32]  # (2, runs): segment, and row in it, that each run came from


class RunTable(Sequence[Run]):
    """The runs of a dataset in base order; a sequence whose items are made on access, and columns that are not.

    Safe to share between threads.
    """

    def __init__(self, table: pa.Table, places: Places) -> None:
        self._table = table
        self._places = places
        self._made: dict[int, Run] = {}  # rows that were asked for one by one: making one takes 90 us

    @classmethod
    def of_segments(cls, segments: Iterable[bytes]) -> "RunTable":
        """From the runs tables of a dataset's segments.

        Raises:
            CorruptDataError: one of them is no runs table.
        """
        tables = [read_runs(data) for data in segments]
        places = np.concatenate(
            [np.zeros((2, 0), np.int32)]
            + [
                np.stack([np.full(len(t), n, np.int32), np.arange(len(t), dtype=np.int32)])
                for n, t in enumerate(tables)
            ],
            axis=1,
        )
        table = pa.concat_tables(tables) if tables else empty_runs()
        order = _base_order(table)
        if not np.array_equal(order, np.arange(len(order))):  # a copy of everything, which one segment never needs
            table, places = table.take(pa.array(order)), places[:, order]
        return cls(table, places)

    def column(self, name: str) -> list[Any]:
        """A column of every run, as the values that `Run` has."""
        return python_column(self._table, name)

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers; NaN where there is none."""
        values: NDArray[Any] = self._table.column(name).to_numpy()
        return values

    def counts(self, *names: str) -> dict[Any, int]:
        """How many runs have each value (of one column), or each tuple of values; the most frequent first."""
        groups = self._table.group_by(list(names)).aggregate([([], "count_all")])
        columns = [python_column(groups, name) for name in names]
        keys = columns[0] if len(names) == 1 else list(zip(*columns, strict=True))
        found = zip(keys, groups.column("count_all").to_pylist(), strict=True)
        return dict(sorted(found, key=lambda pair: (-pair[1], str(pair[0]))))

    @property
    def repeated_name(self) -> str | None:
        """A name that two runs have, if there is one: no dataset is so."""
        if len(pc.unique(self._table.column("name"))) == len(self):
            return None
        return str(next(iter(self.counts("name"))))

    def identities(self) -> Iterator[tuple[str, ...]]:
        """What of each run enters the content digest, in base order."""
        for start in range(0, len(self), _BATCH_ROWS):
            batch = self._table.slice(start, _BATCH_ROWS)
            yield from zip(*(python_column(batch, name) for name in IDENTITY), strict=True)

    def select(self, chosen: NDArray[np.bool_]) -> "RunTable":
        """The runs that are marked, in the same order."""
        return RunTable(self._table.filter(pa.array(chosen)), self._places[:, chosen])

    def where(self, name: str, value: str) -> "RunTable":
        """The runs that have this value in a column of text."""
        return self.select(pc.equal(self._table.column(name), value).to_numpy())

    def place(self, position: int) -> tuple[int, int]:
        """(segment, row in it) of the run at a position."""
        segment, row = self._places[:, position].tolist()
        return segment, row

    @overload
    def __getitem__(self, position: int) -> Run: ...

    @overload
    def __getitem__(self, position: slice) -> tuple[Run, ...]: ...

    def __getitem__(self, position: int | slice) -> Run | tuple[Run, ...]:
        if isinstance(position, slice):
            wanted = np.arange(len(self))[position]
            return tuple(runs_of(self._table.take(pa.array(wanted))))
        if not -len(self) <= position < len(self):
            raise IndexError(f"run {position} was asked for, there are {len(self)}")
        position %= len(self)
        run = self._made.get(position)
        if run is None:
            run = runs_of(self._table.slice(position, 1))[0]
            if len(self._made) >= _KEPT_ROWS:
                self._made.clear()
            self._made[position] = run
        return run

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[Run]:
        for start in range(0, len(self), _BATCH_ROWS):
            yield from runs_of(self._table.slice(start, _BATCH_ROWS))


class ArrayTable:
    """The arrays of one segment, found by the row of their run. Decoded when the first of them is asked for."""

    def __init__(self, data: bytes, *, runs: int) -> None:
        self._data = data
        self._runs = runs

    def of(self, row: int) -> dict[str, StoredArray]:
        """The arrays of the run in a row of the segment's runs table, by name."""
        table, first = self._decoded
        start, stop = int(first[row]), int(first[row + 1])
        return {array.name: array for array in arrays_of(table.slice(start, stop - start))}

    @property
    def runs(self) -> int:
        """How many runs have arrays."""
        return len(pc.unique(self._decoded[0].column("run_row")))

    def keys(self) -> Iterator[str]:
        """Every object of all of them."""
        table, _ = self._decoded
        for start in range(0, len(table), _BATCH_ROWS):
            for array in arrays_of(table.slice(start, _BATCH_ROWS)):
                yield from (file.key_in(array.object) for file in array.files)

    def stored(self) -> tuple[int, int]:
        """(bytes, objects) of all of them."""
        sizes = read_file_sizes(self._data)
        return int(pc.sum(sizes).as_py() or 0), len(sizes)

    @cached_property
    def _decoded(self) -> tuple[pa.Table, NDArray[np.int64]]:
        """The table by row of the run, and where in it each run begins."""
        table = read_arrays(self._data)
        rows = table.column("run_row").to_numpy()
        if (np.diff(rows) < 0).any():
            table = table.sort_by("run_row")
            rows = table.column("run_row").to_numpy()
        return table, np.searchsorted(rows, np.arange(self._runs + 1))


def _base_order(table: pa.Table) -> NDArray[np.int64]:
    """Positions of the rows, sorted as runs are everywhere: by labels, by code point, then by digest."""
    keys = [(name, "ascending") for name in IDENTITY]
    order: NDArray[np.int64] = pc.sort_indices(table.select([name for name, _ in keys]), sort_keys=keys).to_numpy()
    return order
