"""Tables of results as Parquet files: written some rows at a time, whole or not there, and read back.

A column is text, whole numbers, numbers in float64 or float32 (null where nothing is known), or vectors of float32 of one
width. What a table says of itself is JSON in its metadata.
"""

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError

# Under which the facts stand in the file's metadata.
_FACTS = b"fmristream"

# Rows that are held until they are written: of vectors of 1,024 numbers, 4 MB.
_GROUP_ROWS = 1024

Values = NDArray[Any] | list[str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnKind:
    """What a column holds: `text`, `int`, `float` (64 bits), `narrow` (32 bits), or `vector` of so many float32."""

    kind: str
    width: int = 0

    @property
    def arrow(self) -> pa.DataType:
        """Its type in the file."""
        if self.kind == "vector":
            return pa.list_(pa.float32(), self.width)
        return {"text": pa.string(), "int": pa.int64(), "float": pa.float64(), "narrow": pa.float32()}[self.kind]


TEXT, INT, FLOAT = ColumnKind(kind="text"), ColumnKind(kind="int"), ColumnKind(kind="float")
NARROW = ColumnKind(kind="narrow")


class RowWriter:
    """A table that is open for more rows; `write_rows` makes one."""

    def __init__(self, place: Path | io.BytesIO, columns: Mapping[str, ColumnKind], facts: Mapping[str, Any]) -> None:
        fields = [pa.field(name, column.arrow) for name, column in columns.items()]
        told = {_FACTS: json.dumps(facts, sort_keys=True, allow_nan=False).encode()}
        self._columns, self._schema = columns, pa.schema(fields, metadata=told)
        # Parquet has no other checksum: a flipped bit of a number would be another number.
        options: dict[str, Any] = {"compression": "zstd", "write_statistics": False, "write_page_checksum": True}
        self._writer = pq.ParquetWriter(place, self._schema, **options)
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0

    def add(self, columns: Mapping[str, Values]) -> None:
        """The next rows, all columns of one length; vectors are (rows, width)."""
        assert set(columns) == set(self._columns), "every column of the table, and no other"
        arrays = [_array(columns[name], column) for name, column in self._columns.items()]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._waiting_rows += len(self._waiting[-1])
        if self._waiting_rows >= _GROUP_ROWS:
            self._write()

    def close(self) -> None:
        """Write what waits, and the end of the file."""
        self._write()
        self._writer.close()

    def _write(self) -> None:
        if self._waiting:
            # One row group of them all: each has a header of its own for every column.
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._waiting_rows = [], 0


@contextmanager
def write_rows(path: Path, columns: Mapping[str, ColumnKind], *, facts: Mapping[str, Any]) -> Iterator[RowWriter]:
    """A new table: it has its name only when the block ends well, and its bytes are on the disk then.

    Args:
        path: of the file; what is there is replaced.
        columns: of the table, in order.
        facts: JSON that the file carries about itself.
    """
    unfinished = path.with_name(f".unfinished-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        writer = RowWriter(unfinished, columns, facts)
        try:
            yield writer
        finally:
            writer.close()
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def encode_rows(columns: Mapping[str, Values], *, facts: Mapping[str, Any]) -> bytes:
    """A whole table as bytes; equal tables give equal bytes."""
    sink = io.BytesIO()
    writer = RowWriter(sink, kinds_of(columns), facts)
    writer.add(columns)
    writer.close()
    return sink.getvalue()


def kinds_of(columns: Mapping[str, Values]) -> dict[str, ColumnKind]:
    """What these columns hold: words, or arrays of whole numbers, of float32, of float64 or of vectors."""
    return {name: _kind_of(values) for name, values in columns.items()}


def read_rows(path: Path) -> tuple[dict[str, Values], dict[str, Any]]:
    """(columns, facts) of such a table; vectors come as (rows, width), what is not known as NaN.

    Raises:
        CorruptDataError: it is no Parquet, or was not written here.
        OSError: it cannot be read.
    """
    try:
        return _decoded(path)
    except CorruptDataError as error:
        raise CorruptDataError(f"{path}: {error}") from error


def decode_rows(data: bytes) -> tuple[dict[str, Values], dict[str, Any]]:
    """The same of its bytes.

    Raises:
        CorruptDataError: as `read_rows`.
    """
    return _decoded(pa.BufferReader(data))


def _decoded(source: Any) -> tuple[dict[str, Values], dict[str, Any]]:
    try:
        table = pq.ParquetFile(source, page_checksum_verification=True).read(use_threads=False)
        told = (table.schema.metadata or {}).get(_FACTS)
        if told is None:
            raise ValueError("it does not say what it is")
        facts = json.loads(told)
        if not isinstance(facts, dict):
            raise ValueError("what it says of itself is no JSON object")
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptDataError(f"is not a table that fmristream wrote: {error}") from error
    return {name: _values(name, table.column(name)) for name in table.column_names}, facts


def _kind_of(values: Values) -> ColumnKind:
    if isinstance(values, list):
        return TEXT
    if values.ndim == 2:
        return ColumnKind(kind="vector", width=values.shape[1])
    return INT if values.dtype.kind == "i" else NARROW if values.dtype == np.float32 else FLOAT


def _array(values: Values, column: ColumnKind) -> pa.Array:
    if column.kind == "vector":
        rows = np.ascontiguousarray(values, dtype=np.float32)
        assert rows.shape[1:] == (column.width,), f"vectors of {column.width}, got {rows.shape}"
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), column.width)
    if column.kind in ("float", "narrow"):
        numbers = np.asarray(values, dtype=column.arrow.to_pandas_dtype())
        return pa.array(numbers, mask=np.isnan(numbers))
    return pa.array(values, column.arrow)


def _values(name: str, column: pa.ChunkedArray) -> Values:
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        flat = column.combine_chunks().flatten() if len(column) else pa.array([], pa.float32())
        rows: NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).reshape(len(column), kind.list_size)
        return rows
    if pa.types.is_string(kind):
        words: list[str | None] = column.to_pylist()
        return words
    if kind not in (pa.int64(), pa.float32(), pa.float64()) or (kind == pa.int64() and column.null_count):
        raise CorruptDataError(f"column {name} holds {kind}; expected numbers, words or vectors")
    return np.array(column.to_numpy())
