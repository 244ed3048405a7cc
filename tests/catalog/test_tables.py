"""Tables: what goes into Parquet comes out equal, and columns of a later release are left alone."""

import io
import math
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmristream.catalog.run import ENTITIES, Run, StoredArray, StoredFile
from fmristream.catalog.tables import (
    decode_arrays,
    decode_participants,
    decode_runs,
    decode_skipped,
    encode_arrays,
    encode_participants,
    encode_runs,
    encode_skipped,
)
from fmristream.errors import CorruptDataError

text = st.text(st.characters(codec="utf-8"), max_size=20)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
numbers = st.floats(allow_nan=False)
counts = st.integers(0, 2**62)

runs = st.builds(
    Run,
    **dict.fromkeys(("name", *ENTITIES, "split", "group", "dtype", "object", "source_crc"), text),
    **dict.fromkeys(("slope", "inter", "valid_min", "valid_max"), numbers),
    **dict.fromkeys(("foreground_mean", "foreground_sd", "foreground_min", "foreground_max"), numbers),
    **dict.fromkeys(("voxels", "nonfinite", "foreground_count", "outside", "source_bytes"), counts),
    frames=st.integers(0, 2**31 - 1),
    tr_s=st.none() | numbers,
    shape=st.tuples(*[st.integers(1, 2**31 - 1)] * 3),
    space_digest=digests,
    affine=st.tuples(*[numbers] * 16),
    digest=digests,
    objects_digest=digests,
    residual_wraps=st.booleans(),
)
files = st.builds(StoredFile, name=text, bytes=counts, digest=st.binary(min_size=6, max_size=6).map(bytes.hex))
arrays = st.builds(
    StoredArray,
    **dict.fromkeys(("name", "object", "dtype", "encoding"), text),
    space_digest=digests,
    shape=st.lists(counts, max_size=4).map(tuple),
    frames_per_shard=st.integers(0, 2**31 - 1),
    index_offset=st.integers(-1, 2**62),
    index_bytes=counts,
    files=st.lists(files, max_size=4).map(tuple),
)

FOREGROUND = ("foreground_mean", "foreground_sd", "foreground_min", "foreground_max")
A_RUN = Run(
    name="sub-01_task-rest_bold", subject="01", space="MNI", group="01", frames=4, tr_s=0.72, shape=(2, 3, 4), voxels=24,
    space_digest="00" * 32, affine=tuple(float(n) for n in np.eye(4).ravel()), dtype="<i2", slope=1.0, inter=0.0,
    digest="11" * 32, object="runs/a.zarr", objects_digest="22" * 32, residual_wraps=False,
    valid_min=0.0, valid_max=5.0, nonfinite=0,
    foreground_count=3, foreground_mean=1.0, foreground_sd=1.0, foreground_min=0.0, foreground_max=5.0, outside=0,
    source_bytes=1, source_crc="gz:00000000:1",
)  # fmt: skip


@given(st.lists(runs, max_size=4))
def test_runs_come_back_equal(rows):
    assert decode_runs(encode_runs(rows)) == rows


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), arrays), max_size=4), st.sampled_from(["sha256", "blake3"]))
def test_arrays_come_back_equal(rows, digest):
    assert decode_arrays(encode_arrays(rows, bulk_digest=digest), bulk_digest=digest) == rows


@pytest.mark.parametrize(("said", "stored"), [("sha256", "blake3"), ("blake3", "sha256")])
def test_digests_of_objects_never_pass_for_another_kind(said, stored):
    with pytest.raises(CorruptDataError, match=f"bytes, {stored}_prefix in files, not {said}_prefix"):
        decode_arrays(encode_arrays([], bulk_digest=stored), bulk_digest=said)


@given(st.lists(st.tuples(text, text), max_size=6))
def test_skipped_inputs_come_back_sorted(rows):
    assert decode_skipped(encode_skipped(rows)) == sorted(rows)


def test_statistics_that_do_not_exist_stay_nan():
    run = replace(A_RUN, foreground_count=0, foreground_mean=math.nan, foreground_sd=math.nan, valid_min=math.nan)
    (again,) = decode_runs(encode_runs([run]))
    assert math.isnan(again.foreground_mean)
    assert math.isnan(again.valid_min)


column_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
    lambda name: name != "subject"
)


@st.composite
def participants(draw):
    columns = draw(st.dictionaries(column_names, st.sampled_from(["text", "number"]), max_size=4))
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        row = {"subject": draw(text)}
        for name, kind in columns.items():
            row[name] = draw(st.none() | (text if kind == "text" else numbers))
        rows.append(row)
    return rows


@given(participants())
def test_participants_come_back_with_their_text_and_numbers(rows):
    assert decode_participants(encode_participants(rows)) == rows


def test_a_column_that_some_participants_lack_is_none_for_them():
    rows = [{"subject": "01", "age": 20.0}, {"subject": "02", "sex": "F"}]
    again = decode_participants(encode_participants(rows))
    assert again == [{"subject": "01", "age": 20.0, "sex": None}, {"subject": "02", "age": None, "sex": "F"}]


def test_a_column_of_participants_may_have_the_name_of_one_of_the_runs_table():
    rows = [
        {"subject": "01", "run_row": "left", "index_offset": 3.5},
        {"subject": "02", "run_row": None, "index_offset": None},
    ]
    assert decode_participants(encode_participants(rows)) == rows


def test_whole_numbers_of_participants_become_floats():
    assert decode_participants(encode_participants([{"subject": "01", "age": 20}])) == [{"subject": "01", "age": 20.0}]


def test_a_column_of_numbers_and_words_becomes_words():
    rows = [{"subject": "01", "age": 20.0}, {"subject": "02", "age": "n/a"}, {"subject": "03", "age": None}]
    again = decode_participants(encode_participants(rows))
    assert [row["age"] for row in again] == ["20.0", "n/a", None]


def with_column(data: bytes, name: str, values) -> bytes:
    table = pq.read_table(io.BytesIO(data)).append_column(name, values)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def without_column(data: bytes, name: str) -> bytes:
    table = pq.read_table(io.BytesIO(data)).drop_columns([name])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@settings(max_examples=20)
@given(runs)
def test_columns_of_a_later_release_are_ignored(run):
    data = with_column(encode_runs([run]), "censored", pa.array([[True, False]]))
    assert decode_runs(data) == [run]


def test_the_order_of_columns_means_nothing():
    table = pq.read_table(io.BytesIO(encode_runs([A_RUN])))
    sink = io.BytesIO()
    pq.write_table(table.select(table.column_names[::-1]), sink)
    assert decode_runs(sink.getvalue()) == [A_RUN]


@pytest.mark.parametrize("name", [field.name for field in fields(Run)])
def test_a_missing_column_is_named(name):
    with pytest.raises(CorruptDataError, match=name):
        decode_runs(without_column(encode_runs([A_RUN]), name))


@given(st.binary(max_size=200))
@example(b"PAR1PAR1")
def test_bytes_that_are_no_table_are_our_error(data):
    of_arrays = partial(decode_arrays, bulk_digest="blake3")
    for decode in (decode_runs, of_arrays, decode_participants, decode_skipped):
        with pytest.raises(CorruptDataError):
            decode(data)


def test_a_column_of_another_type_is_our_error():
    data = with_column(without_column(encode_runs([A_RUN]), "frames"), "frames", pa.array(["many"]))
    with pytest.raises(CorruptDataError):
        decode_runs(data)


def test_a_runs_table_takes_at_most_250_bytes_a_run():
    rng = np.random.default_rng(0)
    rows = [
        replace(A_RUN, name=f"sub-{i:05}_task-rest_bold", subject=f"{i:05}", group=f"{i:05}", digest=rng.bytes(32).hex(),
                object=f"runs/{rng.bytes(8).hex()}-{rng.bytes(4).hex()}.zarr", source_bytes=int(rng.integers(2**32)),
                source_crc=f"gz:{rng.bytes(4).hex()}:{rng.integers(2**32)}",
                **{name: float(rng.normal()) for name in FOREGROUND})
        for i in range(2000)
    ]  # fmt: skip
    assert len(encode_runs(rows)) <= 250 * len(rows)


@given(st.lists(runs, min_size=2, max_size=5))
def test_runs_sort_by_their_labels_and_then_by_what_they_hold(rows):
    ordered = sorted(rows, key=lambda run: run.sort_key)
    keys = [tuple(getattr(run, entity) for entity in (*ENTITIES, "digest")) for run in ordered]
    assert keys == sorted(keys)
    utf8 = [tuple(part.encode() for part in key) for key in keys]
    assert utf8 == sorted(utf8), "the order of code points is the order of UTF-8 bytes, in any language"
