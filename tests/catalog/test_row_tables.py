"""Tables of results come back as they went in, and are whole or not there."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmristream.catalog.row_tables import FLOAT, INT, TEXT, ColumnKind, decode_rows, encode_rows, read_rows, write_rows
from fmristream.errors import CorruptDataError

KINDS = {"who": TEXT, "window": INT, "score": FLOAT, "features": ColumnKind(kind="vector", width=3)}


def rows(first, count):
    numbers = np.arange(first, first + count)
    return {
        "who": [None if number % 5 == 0 else f"s{number}" for number in numbers],
        "window": numbers,
        "score": np.where(numbers % 3 == 0, np.nan, numbers / 7),
        "features": np.stack([numbers, -numbers, numbers / 3], axis=1).astype(np.float32),
    }


def test_rows_come_back_in_order_whatever_they_were_added_by(tmp_path):
    with write_rows(tmp_path / "x.parquet", KINDS, facts={"a": [1, "ä"]}) as table:
        for first, count in ((0, 1), (1, 2500), (2501, 0), (2501, 9)):
            table.add(rows(first, count))
    found, facts = read_rows(tmp_path / "x.parquet")
    expected = rows(0, 2510)
    assert facts == {"a": [1, "ä"]}
    assert found["who"] == expected["who"]
    for name in ("window", "score", "features"):
        assert np.array_equal(found[name], expected[name], equal_nan=name == "score")
    assert found["features"].dtype == np.float32


def test_an_empty_table_has_its_columns(tmp_path):
    with write_rows(tmp_path / "x.parquet", KINDS, facts={}):
        pass
    found, _ = read_rows(tmp_path / "x.parquet")
    assert (found["who"], found["window"].tolist(), found["features"].shape) == ([], [], (0, 3))


def test_what_fails_on_the_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.parquet"
    with write_rows(path, KINDS, facts={"first": True}) as table:
        table.add(rows(0, 3))

    def interrupted():
        with write_rows(path, KINDS, facts={}) as table:
            table.add(rows(0, 5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [one.name for one in tmp_path.iterdir()] == ["x.parquet"]
    assert read_rows(path)[1] == {"first": True}


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(CorruptDataError, match="is not a table that fmristream wrote"):
        read_rows(tmp_path / "x.parquet")


WHOLE = {
    "word": ["a", None, "é"],
    "whole": np.array([1, 2**60, -3]),
    "number": np.array([0.1, np.nan, np.inf]),
    "narrow": np.array([0.1, np.nan, 3], np.float32),
    "vector": np.arange(6, dtype=np.float32).reshape(3, 2),
}


@pytest.mark.parametrize("count", [3, 0])
def test_a_whole_table_comes_back_with_its_types_and_what_is_said_of_it(count):
    given = {name: column[:count] for name, column in WHOLE.items()}
    found, facts = decode_rows(encode_rows(given, facts={"key": "what: é"}))
    assert facts == {"key": "what: é"}
    assert list(found) == list(given)
    assert found["word"] == given["word"]
    for name in ("whole", "number", "narrow", "vector"):
        assert found[name].dtype == WHOLE[name].dtype
        np.testing.assert_array_equal(found[name], given[name])


def test_what_is_not_known_is_null_to_others(tmp_path):
    (tmp_path / "t.parquet").write_bytes(encode_rows(WHOLE, facts={}))
    assert pq.read_table(tmp_path / "t.parquet")["number"].to_pylist() == [0.1, None, np.inf]


@pytest.mark.parametrize("column", [pa.array([[1]]), pa.array([None], pa.int64()), pa.array([True])])
def test_columns_of_other_kinds_are_refused(tmp_path, column):
    table = pa.table({"x": column}).replace_schema_metadata({"fmristream": "{}"})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(CorruptDataError, match="column x holds"):
        read_rows(tmp_path / "t.parquet")


@pytest.mark.parametrize("facts", ["[]", "no JSON"])
def test_a_table_that_says_nothing_of_itself_is_not_ours(tmp_path, facts):
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({"fmristream": facts}), tmp_path / "t.parquet")
    with pytest.raises(CorruptDataError, match="is not a table that fmristream wrote"):
        read_rows(tmp_path / "t.parquet")


def test_no_flipped_bit_of_a_value_is_read_as_another_value():
    columns = {"score": np.linspace(-1, 1, 50)}
    whole = encode_rows(columns, facts={})
    chunk = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0).column(0)
    header_bytes = 60  # more than there are: what a page says of itself is not in its checksum
    silent = []
    for place in range(chunk.dictionary_page_offset + header_bytes, chunk.data_page_offset):
        for bit in (1, 16):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            try:
                found, _ = decode_rows(bytes(damaged))
            except CorruptDataError:
                continue
            if not np.array_equal(found["score"], columns["score"]):
                silent.append(place)
    assert chunk.data_page_offset > chunk.dictionary_page_offset + 3 * header_bytes
    assert silent == []


def test_a_table_of_somebody_else_is_told_as_such():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(CorruptDataError, match="it does not say what it is"):
        decode_rows(sink.getvalue().to_pybytes())
