"""Runs and participants as one table, joined by subject."""

import dataclasses

import numpy as np
import pytest

from fmristream.catalog.columns import JoinedColumns
from fmristream.catalog.run_table import RunTable
from fmristream.catalog.tables import encode_participants, encode_runs, participant_columns
from fmristream.catalog.where import Condition
from fmristream.errors import UsageError
from tests.catalog.test_tables import A_RUN as RUN

PEOPLE = [
    {"subject": "b", "age": 30.0, "group": "patient", "site": None},
    {"subject": "a", "age": None, "group": "control", "site": "x"},
    {"subject": "z", "age": 99.0, "group": "control", "site": "x"},
]


def runs_of(*labels: tuple[str, str]) -> RunTable:
    rows = [
        dataclasses.replace(RUN, name=f"{subject}{task}", subject=subject, group=subject, task=task)
        for subject, task in labels
    ]
    return RunTable.of_segments([encode_runs(rows)])


@pytest.fixture
def columns() -> JoinedColumns:
    runs = runs_of(("a", "faces"), ("a", "rest"), ("b", "rest"), ("c", ""))
    return JoinedColumns(runs, participant_columns(encode_participants(PEOPLE)))


def chosen(columns: JoinedColumns, condition: str) -> list[bool]:
    return Condition.parse(condition).mask(columns.column, known=columns.names, rows=columns.rows).tolist()


def test_every_run_has_the_values_of_its_subject(columns):
    assert np.array_equal(columns.column("age").values, [np.nan, np.nan, 30, np.nan], equal_nan=True)
    assert columns.column("site").texts().tolist() == ["x", "x", None, None]
    assert columns.column("task").texts().tolist() == ["faces", "rest", "rest", None]


def test_conditions_ask_both_tables(columns):
    assert chosen(columns, "task == 'rest' and age < 40") == [False, False, True, False]
    assert chosen(columns, "age is missing") == [True, True, False, True]
    assert chosen(columns, "task != 'rest'") == [True, False, False, False]
    assert chosen(columns, f"frames == {RUN.frames} and subject in ('b', 'c')") == [False, False, True, True]


def test_a_name_that_both_tables_have_is_not_guessed_at(columns):
    with pytest.raises(UsageError, match=r"`runs.group` or `participants.group`"):
        chosen(columns, "group == 'patient'")
    assert chosen(columns, "`participants.group` == 'patient'") == [False, False, True, False]
    assert chosen(columns, "`runs.group` == 'a'") == [True, True, False, False]


def test_an_unknown_name_is_refused_and_lists_are_no_columns(columns):
    for name in ("affine", "shape", "object", "participants.subject", "runs.runs.group"):
        with pytest.raises(UsageError, match="no column"):
            columns.column(name)


def test_without_participants_runs_alone_are_asked():
    columns = JoinedColumns(runs_of(("a", "rest")), {})
    assert chosen(columns, "subject == 'a' and group == 'a'") == [True]
