"""The Parquet tables: rows of frozen values in, bytes out, and back. The only importer of pyarrow."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmristream.catalog.run import Run, StoredArray, StoredFile
from fmristream.errors import CorruptDataError

Participant = dict[str, str | float | None]

_FILE = pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.binary(32))])

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

_DIGESTS = frozenset({"digest", "space_digest", "sha256"})


def encode_runs(runs: Sequence[Run]) -> bytes:
    """The runs table of one segment."""
    return _to_parquet([_row(run) for run in runs], _RUNS)


def decode_runs(data: bytes) -> list[Run]:
    """Rows of a runs table."""
    return [Run(**_restore(row)) for row in _from_parquet(data, _RUNS)]


def encode_arrays(arrays: Sequence[tuple[int, StoredArray]]) -> bytes:
    """The arrays table of one segment: (row of the run in the runs table, array)."""
    return _to_parquet([{"run_row": row, **_row(array)} for row, array in arrays], _ARRAYS)


def decode_arrays(data: bytes) -> list[tuple[int, StoredArray]]:
    """Rows of an arrays table, with the row of their run."""
    decoded = []
    for row in _from_parquet(data, _ARRAYS):
        run_row = row.pop("run_row")
        row["files"] = tuple(StoredFile(**_restore(file)) for file in row["files"])
        decoded.append((run_row, StoredArray(**_restore(row))))
    return decoded


def encode_participants(participants: Sequence[Participant]) -> bytes:
    """The participants table: `subject` and whatever columns the source had, all numbers or all text."""
    names = list(dict.fromkeys(["subject", *(name for row in participants for name in row)]))
    return _write(pa.table({name: _column([row.get(name) for row in participants]) for name in names}))


def decode_participants(data: bytes) -> list[Participant]:
    """Rows of a participants table."""
    return list(_read(data).to_pylist())


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


def _row(value: Run | StoredArray | StoredFile) -> dict[str, Any]:
    row = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if field.name in _DIGESTS:
            item = bytes.fromhex(item)
        elif field.name == "files":
            item = [_row(file) for file in item]
        row[field.name] = list(item) if isinstance(item, tuple) else item
    return row


def _restore(row: dict[str, Any]) -> dict[str, Any]:
    for name, item in row.items():
        if name in _DIGESTS:
            row[name] = item.hex()
        elif isinstance(item, list):
            row[name] = tuple(item)
    return row


def _to_parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    return _write(pa.Table.from_pylist(rows, schema=schema))


def _from_parquet(data: bytes, schema: pa.Schema) -> list[dict[str, Any]]:
    table = _read(data)
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise CorruptDataError(
            f"a dataset table lacks the columns {', '.join(missing)}; it was not written by fmristream"
        )
    try:
        # Columns that a later release adds are not ours to judge: what must be understood stands in `requires`.
        return list(table.select(schema.names).cast(schema).to_pylist())
    except pa.ArrowException as error:
        raise CorruptDataError(f"a dataset table has columns of other types than FORMAT.md says: {error}") from error


def _write(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def _read(data: bytes) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(data), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(f"a dataset table is not readable as Parquet: {error}") from error
