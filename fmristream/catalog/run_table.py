"""Runs and arrays of a dataset as columns: what 100,000 of them cost to hold, and rows made when they are asked for."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fmristream.catalog.run import ENTITIES, IDENTITY, Run, StoredArray
from fmristream.catalog.tables import arrays_of, empty_runs, python_column, read_arrays, read_runs, runs_of

# Rows that iteration makes at once.
_BATCH_ROWS = 4096
# Rows that are kept once made; 2 kB each.
_KEPT_ROWS = 8192
# Where a row came from: not columns of the format, and named so that no column of a later release is called the same.
_SEGMENT, _ROW = "#segment", "#row"


class RunTable(Sequence[Run]):
    """The runs of a dataset in base order; a sequence whose items are made on access, and columns that are not.

    Safe to share between threads.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._made: dict[int, Run] = {}  # rows that were asked for one by one: making one takes 90 us

    @classmethod
    def of_segments(cls, segments: Sequence[bytes]) -> "RunTable":
        """From the runs tables of a dataset's segments.

        Raises:
            CorruptDataError: one of them is no runs table.
        """
        tables = [_placed(empty_runs(), 0)]
        for number, data in enumerate(segments):
            tables.append(_placed(read_runs(data), number))
        return cls(_in_base_order(pa.concat_tables(tables)))

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

    def identities(self) -> list[tuple[str, ...]]:
        """What of each run enters the content digest."""
        return list(zip(*(self.column(name) for name in IDENTITY), strict=True))

    def select(self, chosen: NDArray[np.bool_]) -> "RunTable":
        """The runs that are marked, in the same order."""
        return RunTable(self._table.filter(pa.array(chosen)))

    def where(self, name: str, value: str) -> "RunTable":
        """The runs that have this value in a column of text."""
        return RunTable(self._table.filter(pc.equal(self._table.column(name), value)))

    def place(self, position: int) -> tuple[int, int]:
        """(segment, row in it) of the run at a position."""
        return self._table.column(_SEGMENT)[position].as_py(), self._table.column(_ROW)[position].as_py()

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
    """The arrays of one segment, found by the row of their run."""

    def __init__(self, data: bytes, *, runs: int) -> None:
        table = read_arrays(data).sort_by("run_row")
        self._table = table
        self._first = np.searchsorted(table.column("run_row").to_numpy(), np.arange(runs + 1))

    def of(self, row: int) -> dict[str, StoredArray]:
        """The arrays of the run in a row of the segment's runs table, by name."""
        start, stop = int(self._first[row]), int(self._first[row + 1])
        return {array.name: array for array in arrays_of(self._table.slice(start, stop - start))}

    @property
    def runs(self) -> int:
        """How many runs have arrays."""
        return len(pc.unique(self._table.column("run_row")))

    def keys(self) -> Iterator[str]:
        """Every object of all of them."""
        for start in range(0, len(self._table), _BATCH_ROWS):
            for array in arrays_of(self._table.slice(start, _BATCH_ROWS)):
                yield from (file.key_in(array.object) for file in array.files)

    def stored(self) -> tuple[int, int]:
        """(bytes, objects) of all of them."""
        files = self._table.column("files").combine_chunks().flatten()
        return int(pc.sum(files.field("bytes")).as_py() or 0), len(files)


def _placed(table: pa.Table, segment: int) -> pa.Table:
    """The table and, for each row, where it came from."""
    rows = np.arange(len(table), dtype=np.int32)
    return table.append_column(_ROW, pa.array(rows)).append_column(_SEGMENT, pa.array(np.full_like(rows, segment)))


def _in_base_order(table: pa.Table) -> pa.Table:
    """Sorted as runs are everywhere: by labels, by code point, then by digest."""
    keys = [(name, "ascending") for name in (*ENTITIES, "digest")]
    plain = table.select([name for name, _ in keys])
    return table.take(pc.sort_indices(plain, sort_keys=keys)).combine_chunks()
