"""Flat tables come back with their nulls, types and words."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmristream.catalog.flat_tables import decode_flat, encode_flat
from fmristream.errors import CorruptDataError

COLUMNS = {
    "word": ["a", None, "é"],
    "whole": np.array([1, 2**60, -3]),
    "small": np.array([1, 2, 3], np.int32),
    "number": np.array([0.1, np.nan, np.inf]),
    "narrow": np.array([0.1, np.nan, 3], np.float32),
}


@pytest.mark.parametrize("rows", [3, 0])
def test_columns_and_what_is_said_of_them_come_back(rows):
    given = {name: column[:rows] for name, column in COLUMNS.items()}
    found, about = decode_flat(encode_flat(given, {"key": "what: é"}))
    assert about == {"key": "what: é"}
    assert list(found) == list(given)
    assert found["word"] == given["word"]
    for name in ("whole", "small", "number", "narrow"):
        assert found[name].dtype == COLUMNS[name].dtype
        np.testing.assert_array_equal(found[name], given[name])


def test_what_is_not_known_is_null_to_others(tmp_path):
    (tmp_path / "t.parquet").write_bytes(encode_flat(COLUMNS, {}))
    assert pq.read_table(tmp_path / "t.parquet")["number"].to_pylist() == [0.1, None, np.inf]


@pytest.mark.parametrize("column", [pa.array([[1]]), pa.array([None], pa.int64()), pa.array([True])])
def test_columns_of_other_kinds_are_refused(tmp_path, column):
    pq.write_table(pa.table({"x": column}), tmp_path / "t.parquet")
    with pytest.raises(CorruptDataError, match="column x holds"):
        decode_flat((tmp_path / "t.parquet").read_bytes())


def test_other_bytes_are_no_table():
    with pytest.raises(CorruptDataError, match="not readable as Parquet"):
        decode_flat(b"PAR1 and more")
