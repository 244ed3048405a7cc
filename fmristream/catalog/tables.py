"""The Parquet tables: rows of frozen values in, bytes out, and back. With `run_table` the only importer of pyarrow."""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fmristream.catalog.run import Run, StoredArray, StoredFile
from fmristream.errors import CorruptDataError

Participant = dict[str, str | float | None]
# Name to values: float64 with NaN, or text with None, where nothing is known.
Columns = Mapping[str, NDArray[np.float64] | list[str | None]]

# Of a file's digest, in bytes: with 1e6 objects the odds that one exchanged object passes are 1 to 1e8.
PREFIX_BYTES = 6

_RUNS = pa.schema(
    [
        *((name, pa.string()) for name in ("name", "subject", "session", "task", "acq", "run", "echo", "space")),
        ("split", pa.string()),
        ("group", pa.string()),
        ("frames", pa.int32()),
        ("tr_s", pa.float64()),
        ("shape", pa.list_(pa.int32(), 3)),
        ("voxels", pa.int64()),
        ("space_digest", pa.binary(32)),
        ("affine", pa.list_(pa.float64(), 16)),
        ("dtype", pa.string()),
        ("slope", pa.float64()),
        ("inter", pa.float64()),
        ("digest", pa.binary(32)),
        ("object", pa.string()),
        ("objects_digest", pa.binary(32)),
        ("residual_wraps", pa.bool_()),
        ("valid_min", pa.float64()),
        ("valid_max", pa.float64()),
        ("nonfinite", pa.int64()),
        ("foreground_count", pa.int64()),
        ("foreground_mean", pa.float64()),
        ("foreground_sd", pa.float64()),
        ("foreground_min", pa.float64()),
        ("foreground_max", pa.float64()),
        ("outside", pa.int64()),
        ("source_bytes", pa.int64()),
        ("source_crc", pa.string()),
    ]
)

_ARRAYS = pa.schema(
    [
        ("run_row", pa.int32()),
        ("name", pa.string()),
        ("object", pa.string()),
        ("space_digest", pa.binary(32)),
        ("dtype", pa.string()),
        ("encoding", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("frames_per_shard", pa.int32()),
        ("index_offset", pa.int64()),
        ("index_bytes", pa.int64()),
    ]
)

_DIGESTS = frozenset({"digest", "space_digest", "objects_digest"})

# Numbers that rise from row to row: their steps take a tenth of the bytes.
_RISING = frozenset({"run_row", "index_offset"})

# Values as Python has them, from and to what a column holds.
_TO_COLUMN: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_DIGESTS, bytes.fromhex),
    "shape": list,
    "affine": list,
}
_FROM_COLUMN: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_DIGESTS, bytes.hex),
    "shape": tuple,
    "affine": tuple,
}


_NUMPY_TYPES = {"double": "f8", "int32": "i4", "int64": "i8", "uint8": "u1", "uint64": "u8"}


class RunsEncoder:
    """A runs table, written in batches."""

    def __init__(self) -> None:
        self._writer = _Writer(_RUNS)

    def add(self, runs: Sequence[Run]) -> None:
        """The next rows."""
        self._writer.add(pa.table({name: _values(runs, name) for name in _RUNS.names}, schema=_RUNS))

    def finish(self) -> bytes:
        """The table."""
        return self._writer.finish()


def encode_runs(runs: Sequence[Run]) -> bytes:
    """The runs table of one segment."""
    encoder = RunsEncoder()
    encoder.add(runs)
    return encoder.finish()


def decode_runs(data: bytes) -> list[Run]:
    """Rows of a runs table."""
    file = RunsFile(data)
    return list(file.runs(0, file.rows))


# Rows of runs that are kept as such, of each table: a row is some 2 kB of Python values, and 60 us to make.
_MAX_MADE = 4096


class RunsFile:
    """A runs table that is decoded in parts: a column, or the row group that a row is in, which is kept as columns.

    Raises:
        CorruptDataError: it is no Parquet, or columns are missing or of other types.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._file = _Parquet(data, _RUNS)
        self._first: list[int] = self._file.first_rows
        self._groups: dict[int, pa.Table] = {}
        self._made: dict[int, Run] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return RunsFile, (self._data,)

    @property
    def rows(self) -> int:
        """How many runs it holds."""
        return self._first[-1]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows."""
        return self._file.table([name]).column(name)

    def run(self, row: int) -> Run:
        """The run in a row."""
        made = self._made.get(row)
        if made is None:
            group = bisect_right(self._first, row) - 1
            table = self._groups.get(group)
            if table is None:
                table = self._groups[group] = self._file.table(row_group=group)
                release_memory()
            (made,) = _runs_of(table.slice(row - self._first[group], 1))
            if len(self._made) >= _MAX_MADE:  # all at once: threads may be at it, and an order of use would need a lock
                self._made = {}
            self._made[row] = made
        return made

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The runs in rows [start, stop); nothing is kept."""
        for group, (first, last) in enumerate(pairwise(self._first)):
            low, high = max(start, first), min(stop, last)
            if low < high:
                table = self._groups.get(group)
                table = self._file.table(row_group=group) if table is None else table
                yield from _runs_of(table.slice(low - first, high - low))


def _runs_of(table: pa.Table) -> list[Run]:
    columns = [to_python(table.column(name), name) for name in _RUNS.names]
    return [Run(**dict(zip(_RUNS.names, values, strict=True))) for values in zip(*columns, strict=True)]


def to_python(column: pa.ChunkedArray, name: str) -> list[Any]:
    """A column of the runs table as the values that `Run` has."""
    values = column.to_pylist()
    convert = _FROM_COLUMN.get(name)
    return values if convert is None else [convert(value) for value in values]


def to_numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers or truth values as numpy has them; NaN where there is none.

    From its buffers: pyarrow's `to_numpy`, and whatever takes a Python value, imports pandas wherever that is installed,
    which costs a second and 30 MB.
    """
    if pa.types.is_boolean(column.type):
        truths: NDArray[np.bool_] = to_numbers(column.cast(pa.uint8())).astype(bool)
        return truths
    array = column.combine_chunks()
    if not len(array):
        return np.zeros(0, dtype=_NUMPY_TYPES[str(column.type)])
    valid, data = array.buffers()
    values = np.frombuffer(data, dtype=_NUMPY_TYPES[str(column.type)])[array.offset :][: len(array)]
    if array.null_count:
        known = np.unpackbits(np.frombuffer(valid, dtype=np.uint8), bitorder="little")[array.offset :][: len(array)]
        values = np.where(known, values, np.nan)
    return values


def release_memory() -> None:
    """Give back what decoding needed for a moment: columns of 100,000 runs take tens of megabytes."""
    pa.default_memory_pool().release_unused()


def type_of_column(name: str) -> pa.DataType:
    """The type of a column of the runs table."""
    return _RUNS.field(name).type


def _file_type(bulk_digest: str) -> pa.StructType:
    """What a table says of an object; the name of its digest is in that of the field, so that none passes for another."""
    prefix = (f"{bulk_digest}_prefix", pa.binary(PREFIX_BYTES))
    return pa.struct([("name", pa.string()), ("bytes", pa.int64()), prefix])


def _arrays_schema(bulk_digest: str) -> pa.Schema:
    return _ARRAYS.append(pa.field("files", pa.list_(_file_type(bulk_digest))))


class ArraysEncoder:
    """An arrays table, written in batches.

    Args:
        bulk_digest: name of the digest that the objects have.
    """

    def __init__(self, *, bulk_digest: str) -> None:
        self._file_type = _file_type(bulk_digest)
        self._schema = _arrays_schema(bulk_digest)
        self._writer = _Writer(self._schema)

    def add(self, arrays: Sequence[tuple[int, StoredArray]]) -> None:
        """The next rows: (row of the run in the runs table, array)."""
        rows = [array for _, array in arrays]
        columns = {name: _values(rows, name) for name in _ARRAYS.names if name != "run_row"}
        columns["run_row"] = [row for row, _ in arrays]
        columns["files"] = _files_column([array.files for array in rows], self._file_type)
        self._writer.add(pa.table({name: columns[name] for name in self._schema.names}, schema=self._schema))

    def finish(self) -> bytes:
        """The table."""
        return self._writer.finish()


def encode_arrays(arrays: Sequence[tuple[int, StoredArray]], *, bulk_digest: str) -> bytes:
    """The arrays table of one segment: (row of the run in the runs table, array)."""
    encoder = ArraysEncoder(bulk_digest=bulk_digest)
    encoder.add(arrays)
    return encoder.finish()


def decode_arrays(data: bytes, *, bulk_digest: str) -> list[tuple[int, StoredArray]]:
    """Rows of an arrays table, with the row of their run."""
    file = ArraysFile(data, bulk_digest=bulk_digest)
    return list(zip(file.run_rows.tolist(), file.all_arrays(), strict=True))


class ArraysFile:
    """An arrays table that is decoded by row group; what was decoded is kept as columns.

    Args:
        data: the table.
        bulk_digest: name of the digest that the objects have.

    Raises:
        CorruptDataError: it is no Parquet, or columns are missing or of other types, or of another digest.
    """

    def __init__(self, data: bytes, *, bulk_digest: str) -> None:
        self._data, self._bulk_digest = data, bulk_digest
        self._file = _Parquet(data, _arrays_schema(bulk_digest))
        self._file.require_field("files", f"{bulk_digest}_prefix")
        self._first: list[int] = self._file.first_rows
        self._groups: dict[int, pa.Table] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ArraysFile, bulk_digest=self._bulk_digest), (self._data,)

    @cached_property
    def run_rows(self) -> NDArray[np.int32]:
        """Row of its run of every array."""
        values: NDArray[np.int32] = to_numbers(self._file.table(["run_row"]).column("run_row"))
        return values

    def encodings(self) -> frozenset[str]:
        """What stands in that column; nothing else of the table is decoded."""
        return frozenset(str(one) for one in self._file.table(["encoding"]).column("encoding").unique().to_pylist())

    def file_sizes(self) -> pa.Array:
        """Size of every object that the table names; nothing else of it is decoded."""
        return self._file.leaf("files.list.element.bytes").flatten().field("bytes")

    def arrays(self, rows: Sequence[int]) -> list[StoredArray]:
        """The arrays in some rows."""
        found = []
        for row in rows:
            group = bisect_right(self._first, row) - 1
            if group not in self._groups:
                self._groups[group] = self._file.table(row_group=group)
            found += self._arrays_of(self._groups[group].slice(row - self._first[group], 1))
        return found

    def all_arrays(self) -> Iterator[StoredArray]:
        """Every array; nothing is kept."""
        for group in range(len(self._first) - 1):
            yield from self._arrays_of(self._file.table(row_group=group))

    def _arrays_of(self, table: pa.Table) -> list[StoredArray]:
        """The rows of such a table, in its order, without that of their run."""
        prefix, found = f"{self._bulk_digest}_prefix", []
        for row in table.drop_columns(["run_row"]).to_pylist():
            files = tuple(
                StoredFile(name=file["name"], bytes=file["bytes"], digest=file[prefix].hex())
                for file in row.pop("files")
            )
            values = {name: _FROM_COLUMN.get(name, _same)(value) for name, value in row.items()}
            found.append(StoredArray(**values, files=files))
        return found


def encode_participants(participants: Sequence[Participant]) -> bytes:
    """The participants table: `subject` and whatever columns the source had, all numbers or all text."""
    names = list(dict.fromkeys(["subject", *(name for row in participants for name in row)]))
    return _write(pa.table({name: _column([row.get(name) for row in participants]) for name in names}))


def decode_participants(data: bytes) -> list[Participant]:
    """Rows of a participants table."""
    return list(_read(data).to_pylist())


def participant_columns(data: bytes) -> Columns:
    """A participants table by column: what many rows cost least as.

    Raises:
        CorruptDataError: it is no Parquet, or lacks the column `subject`.
    """
    table = _read(data)
    if "subject" not in table.column_names:
        raise CorruptDataError("the participants table has no column subject; it was not written by fmristream")
    columns = {
        name: column.to_pylist() if name == "subject" or pa.types.is_string(column.type) else _numbers(column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    release_memory()
    return columns


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    try:
        return to_numbers(column.cast(pa.float64()))
    except pa.ArrowException as error:
        raise CorruptDataError(f"a column of the participants table holds neither numbers nor text: {error}") from error


def encode_columns(columns: Columns, facts: Mapping[str, float]) -> bytes:
    """A table of a run: columns of numbers or of text, and numbers about all of it."""
    arrays = {name: pa.array(values, _type_of(values)) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata({name: float(fact).hex() for name, fact in facts.items()})
    return _write(table)


def decode_columns(data: bytes) -> tuple[Columns, dict[str, float]]:
    """(columns, numbers about all of them) of such a table.

    Raises:
        CorruptDataError: it is no Parquet, or holds neither numbers nor text.
    """
    table = _read(data)
    if not all(pa.types.is_float64(kind) or pa.types.is_string(kind) for kind in table.schema.types):
        raise CorruptDataError(
            "a run's table holds columns that are neither numbers nor text; it was not written by us"
        )
    facts = {
        name.decode(): float.fromhex(fact.decode())
        for name, fact in (table.schema.metadata or {}).items()
        if not name.startswith(b"ARROW:")
    }
    columns = {
        name: to_numbers(column) if pa.types.is_float64(column.type) else column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return columns, facts


def _type_of(values: NDArray[np.float64] | list[str | None]) -> pa.DataType:
    return pa.string() if isinstance(values, list) else pa.float64()


def encode_skipped(skipped: Iterable[tuple[str, str]]) -> bytes:
    """The table of inputs that were not converted: (name, reason)."""
    rows = sorted(skipped)
    return _write(
        pa.table(
            {"name": pa.array([r[0] for r in rows], pa.string()), "reason": pa.array([r[1] for r in rows], pa.string())}
        )
    )


def decode_skipped(data: bytes) -> list[tuple[str, str]]:
    """Rows of a skipped table."""
    return [(row["name"], row["reason"]) for row in _read(data).to_pylist()]


def _same(value: Any) -> Any:
    return value


def _values(rows: Sequence[Run] | Sequence[StoredArray], name: str) -> list[Any]:
    convert = _TO_COLUMN.get(name)
    values = [getattr(row, name) for row in rows]
    return values if convert is None else [convert(value) for value in values]


def _files_column(files: Sequence[tuple[StoredFile, ...]], kind: pa.StructType) -> pa.Array:
    flat = [file for of_array in files for file in of_array]
    ends = [0]
    for of_array in files:
        ends.append(ends[-1] + len(of_array))
    prefixes = [bytes.fromhex(file.digest[: 2 * PREFIX_BYTES]) for file in flat]
    structs = pa.StructArray.from_arrays(
        [
            pa.array([file.name for file in flat], pa.string()),
            pa.array([file.bytes for file in flat], pa.int64()),
            pa.array(prefixes, pa.binary(PREFIX_BYTES)),
        ],
        fields=list(kind),
    )
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs)


# What a table of half a million subjects unpacks to; a few kilobytes of Parquet can declare a thousand times as much.
_MAX_UNPACKED_BYTES = 2**31
_MAX_CELLS = 200_000_000


def read_any_parquet(data: bytes, *, ignored: frozenset[str] = frozenset()) -> dict[str, list[Any]]:
    """The columns of a table that somebody else made, but those that are `ignored`.

    Raises:
        CorruptDataError: it is no Parquet, unpacks to too much, or has columns of lists or structures.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        unpacked = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        if unpacked > _MAX_UNPACKED_BYTES:
            raise CorruptDataError(f"it unpacks to {unpacked} bytes, at most {_MAX_UNPACKED_BYTES} are read")
        cells = file.metadata.num_rows * file.metadata.num_columns
        if cells > _MAX_CELLS or len(set(file.schema_arrow.names)) != len(file.schema_arrow.names):
            raise CorruptDataError(f"it has {cells} cells (at most {_MAX_CELLS} are read), or two columns of one name")
        wanted = [field for field in file.schema_arrow if field.name not in ignored]
        nested = [field.name for field in wanted if pa.types.is_nested(field.type)]
        if nested:
            raise CorruptDataError(f"column {nested[0]} holds lists or structures")
        table = file.read(columns=[field.name for field in wanted], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(f"not readable as Parquet: {error}") from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _column(values: list[str | float | None]) -> pa.Array:
    """float64 where every value that is there is a number, else text."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) for value in present):
        return pa.array(values, type=pa.float64())
    return pa.array([None if value is None else str(value) for value in values], type=pa.string())


class _Parquet:
    """A table in memory that threads may share: pyarrow's reader crashes where two threads decode at once.

    Raises:
        CorruptDataError: it is no Parquet, or columns of the schema are missing or of other types.
    """

    def __init__(self, data: bytes, schema: pa.Schema) -> None:
        self._schema = schema
        self._lock = Lock()
        try:
            self._file = pq.ParquetFile(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise CorruptDataError(f"a dataset table is not readable as Parquet: {error}") from error
        _require_columns(self._file.schema_arrow, schema)
        groups = self._file.metadata
        self.first_rows: list[int] = [
            0,
            *accumulate(groups.row_group(group).num_rows for group in range(groups.num_row_groups)),
        ]

    def table(self, names: Sequence[str] | None = None, *, row_group: int | None = None) -> pa.Table:
        """Some columns or all, of all rows or of one row group, in the types that FORMAT.md says."""
        wanted = self._schema if names is None else pa.schema([self._schema.field(name) for name in names])
        table = self._read(wanted.names, row_group)
        try:
            return table if table.schema.equals(wanted) else table.cast(wanted)
        except pa.ArrowException as error:
            raise CorruptDataError(
                f"a dataset table has columns of other types than FORMAT.md says: {error}"
            ) from error

    def require_field(self, column: str, field: str) -> None:
        """Raise CorruptDataError unless a column of lists of structures has a field: a cast would fill it with nulls."""
        kind = self._file.schema_arrow.field(column).type
        names = (
            [one.name for one in kind.value_type]
            if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
            else []
        )
        if field not in names:
            raise CorruptDataError(
                f"a dataset table has {', '.join(names) or 'no structures'} in {column}, not {field}: the digest that its "
                "generation names; restore both from a copy"
            )

    def leaf(self, path: str) -> pa.Array:
        """The column that holds one field of a nested column, e.g. `files.list.element.bytes`, nested as it is."""
        with self._lock:
            return self._file.read(columns=[path], use_threads=False).column(0).combine_chunks()

    def _read(self, names: list[str], row_group: int | None) -> pa.Table:
        try:
            with self._lock:
                if row_group is None:
                    table = self._file.read(columns=names, use_threads=False)
                else:
                    table = self._file.read_row_group(row_group, columns=names, use_threads=False)
            pa.default_memory_pool().release_unused()  # what decoding needed: megabytes that would stay for nothing
        except (pa.ArrowException, OSError) as error:
            raise CorruptDataError(f"a dataset table cannot be decoded: {error}") from error
        return table.select(names)


def _require_columns(found: pa.Schema, schema: pa.Schema) -> None:
    """Raise CorruptDataError unless a table has these columns; what a later release adds is not ours to judge."""
    missing = [name for name in schema.names if name not in found.names]
    if missing:
        raise CorruptDataError(
            f"a dataset table lacks the columns {', '.join(missing)}; it was not written by fmristream"
        )


def _write(table: pa.Table) -> bytes:
    writer = _Writer(table.schema)
    writer.add(table)
    return writer.finish()


class _Writer:
    """Parquet in memory, a row group for each table that is added."""

    def __init__(self, schema: pa.Schema) -> None:
        self._sink = io.BytesIO()
        # The participants table may have columns of any name and type.
        rising = {field.name for field in schema if field.name in _RISING and pa.types.is_integer(field.type)}
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            write_statistics=False,
            use_dictionary=[name for name in schema.names if name not in _DIGESTS and name not in rising],
            column_encoding=dict.fromkeys(rising, "DELTA_BINARY_PACKED"),
        )

    def add(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def finish(self) -> bytes:
        self._writer.close()
        return self._sink.getvalue()


def _read(data: bytes) -> pa.Table:
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(f"a dataset table is not readable as Parquet: {error}") from error
