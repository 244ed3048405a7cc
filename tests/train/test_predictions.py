"""The table of predictions comes back bit for bit, is there as a whole or not at all, and refuses what is not sound."""

import dataclasses
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmristream.catalog.row_tables import decode_rows, encode_rows
from fmristream.errors import CorruptDataError, UsageError
from tests.train.tables import cohort, table, target
from train.predictions import About, decode, encode, read_predictions, require_own_columns, write_predictions

AGE = target("age", (), offset=41.5)


def full():
    rows = [(*row, 20 + place / 3, 0.1 * place) for place, row in enumerate(cohort(9, families=True))]
    rows[2] = (*rows[2][:5], np.nan, *rows[2][6:])
    return table(rows, (target(), AGE), average="sigmoid", made_of={"a": [1, None]}, scorings=2)


def test_the_table_comes_back_as_it_was(tmp_path):
    before = full()
    write_predictions(before, tmp_path / "p.parquet")
    after = read_predictions(tmp_path / "p.parquet")
    assert after.about == before.about
    for name in ("words", "numbers", "values"):
        ours, theirs = getattr(after, name), getattr(before, name)
        assert set(ours) == set(theirs)
        for column in ours:
            expected = theirs[column].astype(np.float32) if column.startswith("score") else theirs[column]
            np.testing.assert_array_equal(ours[column], expected)
    assert encode(after) == encode(before)


def test_other_programs_read_it_with_nulls_and_narrow_scores(tmp_path):
    write_predictions(full(), tmp_path / "p.parquet")
    found = pq.read_table(tmp_path / "p.parquet")
    assert found.column_names == [
        *("split", "window", "run", "subject", "session", "family", "site", "start_frame", "frames"),
        *("truth_sex", "score_sex", "truth_age", "score_age"),
    ]
    assert found["truth_sex"].null_count == 1
    assert found["site"].null_count == len(found)
    assert found["score_sex"].type == pa.float32()
    assert found["window"].type == pa.int64()


def test_a_table_without_targets_has_losses(tmp_path):
    rows = [(*row[:5], row[6] ** 2) for row in cohort(6)]
    write_predictions(table(rows, (), objective="masked"), tmp_path / "p.parquet")
    assert read_predictions(tmp_path / "p.parquet").values["loss"].tolist() == [row[5] for row in rows]


def test_what_a_full_disk_interrupts_leaves_the_table_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    write_predictions(full(), path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_predictions(table(cohort(3)), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p.parquet"]
    write_predictions(full(), path)  # the same: nothing is written


def test_damage_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "p.parquet"
    write_predictions(full(), path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], whole[: len(whole) // 2], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptDataError, match=r"p\.parquet: "):
            read_predictions(path)
    with pytest.raises(UsageError, match="give the --out folder of a finished run"):
        read_predictions(tmp_path / "none.parquet")


def test_a_table_that_lost_its_last_window_is_refused():
    columns, facts = decode_rows(encode(full()))
    cut = {name: column[:-1] for name, column in columns.items()}
    with pytest.raises(CorruptDataError, match=r"expected \d+ windows as written, got \d+"):
        decode(encode_rows(cut, facts=facts))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda found: found.slice(1), "windows 0 to"),
        (lambda found: pa.concat_tables([found.slice(0, 1), found]), "windows 0 to"),
        (lambda found: found.take([1, 0, *range(2, len(found))]), "windows 0 to"),
        (lambda found: found.drop_columns(["score_age"]), "lacks the columns score_age"),
        (lambda found: found.drop_columns(["family"]), "lacks the columns family"),
        (lambda found: found.replace_schema_metadata({}), "is not a table that fmristream wrote"),
        (lambda found: found.replace_schema_metadata({b"fmristream": b"{}"}), "does not say what its columns are"),
        (lambda found: found.replace_schema_metadata({b"fmristream": b'{"predictions": []}'}), "does not say what"),
        (lambda found: found.replace_schema_metadata({b"fmristream": b'{"predictions": {"format": 9}}'}), "format 9"),
        (lambda found: found.set_column(10, "score_sex", pa.array([np.inf] * len(found), pa.float32())), "not finite"),
        (lambda found: found.set_column(1, "window", pa.array([[1]] * len(found))), "column window holds list"),
    ],
)
def test_a_table_that_is_not_sound_is_refused(tmp_path, change, sentence):
    path = tmp_path / "p.parquet"
    write_predictions(full(), path)
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(CorruptDataError, match=sentence):
        read_predictions(path)


def test_two_targets_that_would_share_a_column_are_refused():
    three = ("x", "y", "b_x")
    with pytest.raises(UsageError, match="share the column 'score_a_b_x'"):
        require_own_columns([target("a", three), target("a_b", three)])
    require_own_columns([target("a", three), target("b", three)])


def test_what_the_table_says_of_itself_is_read_back():
    about = About(step=3, objective="classification", targets=(target(), AGE), made_of={"x": {"y": 1}}, scorings=4)
    after = decode(encode(dataclasses.replace(full(), about=about))).about
    assert after == about
