"""Flat tables that other programs read: named columns of numbers and words, and what they are in words, as Parquet."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError

# Numbers (NaN: not known) or words (None: not known).
FlatColumn = NDArray[Any] | Sequence[str | None]

_NUMBERS = (pa.int32(), pa.int64(), pa.float32(), pa.float64())


def encode_flat(columns: Mapping[str, FlatColumn], about: Mapping[str, str]) -> bytes:
    """A table of such columns, in their order.

    Args:
        columns: by name; of numbers int32, int64, float32 or float64, whose NaN become nulls.
        about: text about the table, kept as the metadata of its schema.
    """
    table = pa.table({name: _encoded(column) for name, column in columns.items()})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(dict(about)), sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def decode_flat(data: bytes) -> tuple[dict[str, NDArray[Any] | list[str | None]], dict[str, str]]:
    """(columns, text about them) of such a table; nulls of numbers are NaN.

    Raises:
        CorruptDataError: it is no Parquet, or has columns of other kinds.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        columns = {name: _decoded(name, table.column(name)) for name in table.column_names}
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(f"not readable as Parquet: {error}") from error
    metadata = table.schema.metadata or {}
    about = {key.decode(): text.decode() for key, text in metadata.items() if not key.startswith(b"ARROW:")}
    return columns, about


def _encoded(column: FlatColumn) -> pa.Array:
    if not isinstance(column, np.ndarray):
        return pa.array(list(column), type=pa.string())
    unknown = np.isnan(column) if column.dtype.kind == "f" else None
    return pa.array(column, mask=unknown)


def _decoded(name: str, column: pa.ChunkedArray) -> NDArray[Any] | list[str | None]:
    if pa.types.is_string(column.type):
        words: list[str | None] = column.to_pylist()
        return words
    if column.type not in _NUMBERS or (pa.types.is_integer(column.type) and column.null_count):
        raise CorruptDataError(f"column {name} holds {column.type}; expected numbers or words")
    return np.array(column.to_numpy())
