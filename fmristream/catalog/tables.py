"""The Parquet tables: rows of frozen values in, bytes out, and back. With `run_table` the only importer of pyarrow."""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
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

# Of a file's sha256, in bytes: with 1e6 objects the odds that one exchanged object passes are 1 to 1e8.
SHA256_PREFIX_BYTES = 6

_FILE = pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256_prefix", pa.binary(SHA256_PREFIX_BYTES))])

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
        ("files", pa.list_(_FILE)),
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
    return [file.run(row) for row in range(file.rows)]


class RunsFile:
    """A runs table that is decoded in parts: a column, or the row group that a row is in; rows are kept once made.

    Raises:
        CorruptDataError: it is no Parquet, or columns are missing or of other types.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._file = _opened(data)
        _require_columns(self._file.schema_arrow, _RUNS)
        groups = self._file.metadata
        sizes = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
        self._first: list[int] = [0, *accumulate(sizes)]
        self._made: dict[int, list[Run]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return RunsFile, (self._data,)

    @property
    def rows(self) -> int:
        """How many runs it holds."""
        return self._first[-1]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows."""
        return _selected(self._file, _RUNS, [name]).column(name)

    def run(self, row: int) -> Run:
        """The run in a row."""
        group = bisect_right(self._first, row) - 1
        made = self._made.get(group)
        if made is None:
            made = self._made[group] = self._rows_of(group)
        return made[row - self._first[group]]

    def _rows_of(self, group: int) -> list[Run]:
        table = _selected(self._file, _RUNS, _RUNS.names, row_group=group)
        columns = [to_python(table.column(name), name) for name in _RUNS.names]
        return [Run(**dict(zip(_RUNS.names, values, strict=True))) for values in zip(*columns, strict=True)]


def to_python(column: pa.ChunkedArray, name: str) -> list[Any]:
    """A column of the runs table as the values that `Run` has."""
    values = column.to_pylist()
    convert = _FROM_COLUMN.get(name)
    return values if convert is None else [convert(value) for value in values]


def type_of_column(name: str) -> pa.DataType:
    """The type of a column of the runs table."""
    return _RUNS.field(name).type


class ArraysEncoder:
    """An arrays table, written in batches."""

    def __init__(self) -> None:
        self._writer = _Writer(_ARRAYS)

    def add(self, arrays: Sequence[tuple[int, StoredArray]]) -> None:
        """The next rows: (row of the run in the runs table, array)."""
        rows = [array for _, array in arrays]
        columns = {name: _values(rows, name) for name in _ARRAYS.names if name not in ("run_row", "files")}
        columns["run_row"] = [row for row, _ in arrays]
        columns["files"] = _files_column([array.files for array in rows])
        self._writer.add(pa.table({name: columns[name] for name in _ARRAYS.names}, schema=_ARRAYS))

    def finish(self) -> bytes:
        """The table."""
        return self._writer.finish()


def encode_arrays(arrays: Sequence[tuple[int, StoredArray]]) -> bytes:
    """The arrays table of one segment: (row of the run in the runs table, array)."""
    encoder = ArraysEncoder()
    encoder.add(arrays)
    return encoder.finish()


def decode_arrays(data: bytes) -> list[tuple[int, StoredArray]]:
    """Rows of an arrays table, with the row of their run."""
    table = read_arrays(data)
    return list(zip(table.column("run_row").to_pylist(), arrays_of(table), strict=True))


def read_arrays(data: bytes) -> pa.Table:
    """An arrays table as columns."""
    return _from_parquet(data, _ARRAYS)


def read_file_sizes(data: bytes) -> pa.Array:
    """Size of every object that an arrays table names; nothing else of it is decoded."""
    lists = _opened(data).read(columns=["files.list.element.bytes"], use_threads=False).column("files").combine_chunks()
    return lists.flatten().field("bytes")


def arrays_of(table: pa.Table) -> list[StoredArray]:
    """The rows of such a table, in its order, without that of their run."""
    found = []
    for row in table.drop_columns(["run_row"]).to_pylist():
        files = tuple(
            StoredFile(name=file["name"], bytes=file["bytes"], sha256=file["sha256_prefix"].hex())
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
        name: column.to_numpy() if pa.types.is_float64(column.type) else column.to_pylist()
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


def _files_column(files: Sequence[tuple[StoredFile, ...]]) -> pa.Array:
    flat = [file for of_array in files for file in of_array]
    ends = [0]
    for of_array in files:
        ends.append(ends[-1] + len(of_array))
    prefixes = [bytes.fromhex(file.sha256[: 2 * SHA256_PREFIX_BYTES]) for file in flat]
    structs = pa.StructArray.from_arrays(
        [
            pa.array([file.name for file in flat], pa.string()),
            pa.array([file.bytes for file in flat], pa.int64()),
            pa.array(prefixes, pa.binary(SHA256_PREFIX_BYTES)),
        ],
        fields=list(_FILE),
    )
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs)


def _column(values: list[str | float | None]) -> pa.Array:
    """float64 where every value that is there is a number, else text."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) for value in present):
        return pa.array(values, type=pa.float64())
    return pa.array([None if value is None else str(value) for value in values], type=pa.string())


def _from_parquet(data: bytes, schema: pa.Schema) -> pa.Table:
    file = _opened(data)
    _require_columns(file.schema_arrow, schema)
    return _selected(file, schema, schema.names)


def _opened(data: bytes) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(f"a dataset table is not readable as Parquet: {error}") from error


def _require_columns(found: pa.Schema, schema: pa.Schema) -> None:
    """Raise CorruptDataError unless a table has these columns; what a later release adds is not ours to judge."""
    missing = [name for name in schema.names if name not in found.names]
    if missing:
        raise CorruptDataError(
            f"a dataset table lacks the columns {', '.join(missing)}; it was not written by fmristream"
        )


def _selected(
    file: pq.ParquetFile, schema: pa.Schema, names: Sequence[str], *, row_group: int | None = None
) -> pa.Table:
    """Some columns, of all rows or of one row group, in the types that FORMAT.md says."""
    wanted = pa.schema([schema.field(name) for name in names])
    try:
        if row_group is None:
            table = file.read(columns=list(names), use_threads=False)
        else:
            table = file.read_row_group(row_group, columns=list(names), use_threads=False)
        table = table.select(list(names))
        return table if table.schema.equals(wanted) else table.cast(wanted)
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(f"a dataset table has columns of other types than FORMAT.md says: {error}") from error


def _write(table: pa.Table) -> bytes:
    writer = _Writer(table.schema)
    writer.add(table)
    return writer.finish()


class _Writer:
    """Parquet in memory, a row group for each table that is added."""

    def __init__(self, schema: pa.Schema) -> None:
        self._sink = io.BytesIO()
        names = set(schema.names)
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            write_statistics=False,
            use_dictionary=[name for name in schema.names if name not in _DIGESTS and name not in _RISING],
            column_encoding=dict.fromkeys(names & _RISING, "DELTA_BINARY_PACKED"),
        )

    def add(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def finish(self) -> bytes:
        self._writer.close()
        return self._sink.getvalue()


def _read(data: bytes) -> pa.Table:
    try:
        return _opened(data).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(f"a dataset table is not readable as Parquet: {error}") from error
