"""Runs and arrays of a dataset as columns: what 100,000 of them cost to hold, and rows made when they are asked for."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fmristream.catalog.run import IDENTITY, Run, StoredArray
from fmristream.catalog.tables import ArraysFile, RunsFile, release_memory, to_numbers, to_python, type_of_column

# Rows that are handled at once.
_BATCH_ROWS = 4096

Positions = NDArray[np.int64]


class RunTable(Sequence[Run]):
    """The runs of a dataset in base order: a sequence whose items are made on access, and columns that are not.

    Columns and row groups are decoded when they are asked for first, and kept. Safe to share between threads.
    """

    def __init__(self, source: "_Segments", rows: Positions) -> None:
        self._source = source
        self._rows = rows  # of the source, one for each run

    @classmethod
    def of_segments(cls, segments: Iterable[bytes]) -> "RunTable":
        """From the runs tables of a dataset's segments.

        Raises:
            CorruptDataError: one of them is no runs table.
        """
        source = _Segments([RunsFile(data) for data in segments])
        rows = source.base_order()  # decodes ten columns
        release_memory()
        return cls(source, rows)

    def column(self, name: str) -> list[Any]:
        """A column of every run, as the values that `Run` has."""
        return to_python(self._chunks(name), name)

    def cells(self, name: str) -> Iterator[Any]:
        """The same one after the other, made some thousands at a time."""
        return (row[0] for row in _tuples({name: self._chunks(name)}))

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers; NaN where there is none."""
        return to_numbers(self._chunks(name))

    def counts(self, *names: str) -> dict[Any, int]:
        """How many runs have each value (of one column), or each tuple of values; the most frequent first."""
        # Some thousands of rows at a time: grouping by pyarrow takes tens of megabytes for 100,000 of them.
        rows = _tuples({name: self._chunks(name) for name in names})
        found = Counter(row[0] for row in rows) if len(names) == 1 else Counter(rows)
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], str(pair[0]))))

    def distinct(self, name: str) -> int:
        """How many values a column has."""
        return len(pc.unique(self._chunks(name)))

    @property
    def repeated_name(self) -> str | None:
        """A name that two runs have, if there is one: no dataset is so."""
        # By hashes first: pyarrow's count_distinct takes 68 MB for 100,000 names, a set of them 20 MB.
        hashes = np.fromiter((hash(row) for row in _tuples({"name": self._chunks("name", kept=False)})), dtype=np.int64)
        release_memory()
        if len(np.unique(hashes)) == len(self):
            return None
        name, count = next(iter(self.counts("name").items()))
        return str(name) if count > 1 else None

    def alike(self, name: str) -> list[list[int]]:
        """Positions of the runs that share a value of a column of digests: each group, in base order."""
        if len(self) < 2:
            return []
        values = self._chunks(name).combine_chunks()
        # As bytes: what pyarrow offers for equal values takes tens of megabytes for 100,000 of them.
        data = np.frombuffer(values.buffers()[1], dtype=f"S{values.type.byte_width}")[values.offset :][: len(self)]
        order = np.argsort(data, kind="stable")
        is_first = np.concatenate([[True], data[order[1:]] != data[order[:-1]], [True]])
        edges = np.flatnonzero(is_first)
        return [order[start:stop].tolist() for start, stop in pairwise(edges) if stop - start > 1]

    def identities(self) -> Iterator[tuple[str, ...]]:
        """What of each run enters the content digest, in base order."""
        return _tuples({name: self._chunks(name) for name in IDENTITY})

    def select(self, chosen: NDArray[np.bool_]) -> "RunTable":
        """The runs that are marked, in the same order."""
        return RunTable(self._source, self._rows[chosen])

    def where(self, name: str, value: str) -> "RunTable":
        """The runs that have this value in a column of text."""
        return self.select(np.array([cell == value for cell in self.column(name)], dtype=bool))

    def place(self, position: int) -> tuple[int, int]:
        """(segment, row in it) of the run at a position."""
        return self._source.place(int(self._rows[position]))

    @overload
    def __getitem__(self, position: int) -> Run: ...

    @overload
    def __getitem__(self, position: slice) -> tuple[Run, ...]: ...

    def __getitem__(self, position: int | slice) -> Run | tuple[Run, ...]:
        if isinstance(position, slice):
            return tuple(self._source.run(row) for row in self._rows[position].tolist())
        if not -len(self) <= position < len(self):
            raise IndexError(f"run {position} was asked for, there are {len(self)}")
        return self._source.run(int(self._rows[position]))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Run]:
        # Rows that follow one another are made together, some thousands at a time.
        edges = np.flatnonzero(np.diff(self._rows, prepend=-2) != 1)
        for start, stop in pairwise([*edges.tolist(), len(self._rows)]):
            if stop > start:
                yield from self._source.runs(int(self._rows[start]), int(self._rows[start]) + stop - start)

    def _chunks(self, name: str, *, kept: bool = True) -> pa.ChunkedArray:
        column = self._source.column(name, kept=kept)
        return column if self._source.is_in_order(self._rows) else column.take(self._places)

    @cached_property
    def _places(self) -> pa.Array:
        """The rows for pyarrow; not by `pa.array`, which imports pandas wherever that is installed."""
        return pa.Array.from_buffers(pa.int64(), len(self._rows), [None, pa.py_buffer(self._rows.astype("<i8"))])


class _Segments:
    """The rows of several runs tables, one after the other."""

    def __init__(self, files: Sequence[RunsFile]) -> None:
        self._files = files
        self._first = np.concatenate([[0], np.cumsum([file.rows for file in files])]).astype(np.int64)
        self._columns: dict[str, pa.ChunkedArray] = {}

    def column(self, name: str, *, kept: bool = True) -> pa.ChunkedArray:
        """A column of all of them; decoded anew the next time unless it is kept."""
        found = self._columns.get(name)
        if found is None:
            chunks = [chunk for file in self._files for chunk in file.column(name).chunks]
            found = pa.chunked_array(chunks, type_of_column(name))
            if kept:
                self._columns[name] = found
        return found

    def place(self, row: int) -> tuple[int, int]:
        """(file, row in it)."""
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        return number, row - int(self._first[number])

    def run(self, row: int) -> Run:
        """The run in a row."""
        number, row = self.place(row)
        return self._files[number].run(row)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The runs in rows [start, stop)."""
        for file, first in zip(self._files, self._first.tolist(), strict=False):
            if start < first + file.rows and stop > first:
                yield from file.runs(max(0, start - first), min(file.rows, stop - first))

    def base_order(self) -> Positions:
        """The rows, sorted as runs are everywhere: by labels, by code point, then by digest."""
        columns = {name: self.column(name, kept=False) for name in IDENTITY}
        if all(before <= after for before, after in pairwise(_tuples(columns))):  # so our writer leaves one segment
            return np.arange(self._first[-1], dtype=np.int64)
        keys = [(name, "ascending") for name in IDENTITY]
        found = pa.chunked_array([pc.sort_indices(pa.table(columns), sort_keys=keys)])
        order: Positions = to_numbers(found).astype(np.int64)
        return order

    def is_in_order(self, rows: Positions) -> bool:
        """Whether these are all rows, as they stand."""
        return len(rows) == self._first[-1] and bool((np.diff(rows) == 1).all())


def _tuples(columns: Mapping[str, pa.ChunkedArray]) -> Iterator[tuple[Any, ...]]:
    """The rows of some columns, made a batch at a time."""
    rows = len(next(iter(columns.values())))
    for start in range(0, rows, _BATCH_ROWS):
        batch = [to_python(column.slice(start, _BATCH_ROWS), name) for name, column in columns.items()]
        yield from zip(*batch, strict=True)


class ArrayTable:
    """The arrays of one segment, found by the row of their run; decoded by row group when one of it is asked for."""

    def __init__(self, data: bytes, *, runs: int, bulk_digest: str) -> None:
        self._file = ArraysFile(data, bulk_digest=bulk_digest)
        self._runs = runs

    def of(self, row: int) -> dict[str, StoredArray]:
        """The arrays of the run in a row of the segment's runs table, by name."""
        order, first = self._places
        start, stop = int(first[row]), int(first[row + 1])
        rows = range(start, stop) if order is None else order[start:stop].tolist()
        return {array.name: array for array in self._file.arrays(rows)}

    @property
    def runs(self) -> int:
        """How many runs have arrays."""
        return len(np.unique(self._file.run_rows))

    @property
    def encodings(self) -> frozenset[str]:
        """How arrays are stored, each way once."""
        return self._file.encodings()

    def keys(self) -> Iterator[str]:
        """Every object of all of them."""
        for array in self._file.all_arrays():
            yield from (file.key_in(array.object) for file in array.files)

    def stored(self) -> tuple[int, int]:
        """(bytes, objects) of all of them."""
        sizes = self._file.file_sizes()
        return int(pc.sum(sizes).as_py() or 0), len(sizes)

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
        """The rows of the table by run, None where they stand so, and where in that order each run begins."""
        rows, runs = self._file.run_rows, np.arange(self._runs + 1, dtype=np.int32)
        if (rows[:-1] <= rows[1:]).all():  # so our writer leaves them
            return None, np.searchsorted(rows, runs)
        order = np.argsort(rows, kind="stable")
        return order, np.searchsorted(rows[order], runs)
