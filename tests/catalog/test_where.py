"""Conditions, against asking every row one by one in logic of three values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.catalog.where import Column, Condition
from fmristream.errors import UsageError

NUMBERS, WORDS = ("age", "body mass"), ("site", "class")
CELLS = {
    **{name: st.one_of(st.none(), st.integers(0, 4).map(float)) for name in NUMBERS},
    **{name: st.one_of(st.none(), st.sampled_from("abc")) for name in WORDS},
}
ROWS = st.lists(st.fixed_dictionaries(CELLS), min_size=1, max_size=12)
OPERATORS = {
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
}


def written(name: str) -> str:
    return name if name.isidentifier() and name != "class" else f"`{name}`"


@st.composite
def comparisons(draw):
    """(condition, function from a row to True, False or None)."""
    name = draw(st.sampled_from(NUMBERS + WORDS))
    kind = draw(st.sampled_from(["value", "flipped", "column", "in", "not in", "is", "is not", "chain"]))
    literal = st.integers(0, 4) if name in NUMBERS else st.sampled_from("abcd")
    sign = draw(st.sampled_from(sorted(OPERATORS)))
    ask = OPERATORS[sign]
    if kind in ("is", "is not"):
        word = draw(st.sampled_from(["None", "missing"]))
        return f"{written(name)} {kind} {word}", lambda row: (row[name] is None) == (kind == "is")
    if kind in ("in", "not in"):
        some = draw(st.lists(literal, min_size=1, max_size=3))
        return (
            f"{written(name)} {kind} {some!r}",
            lambda row: None if row[name] is None else (row[name] in some) == (kind == "in"),
        )
    if kind == "column":
        other = draw(st.sampled_from(NUMBERS if name in NUMBERS else WORDS))
        return (
            f"{written(name)} {sign} {written(other)}",
            lambda row: None if row[name] is None or row[other] is None else ask(row[name], row[other]),
        )
    value = draw(literal)
    if kind == "flipped":
        return f"{value!r} {sign} {written(name)}", lambda row: None if row[name] is None else ask(value, row[name])
    if kind == "chain":
        last = draw(literal)
        return (
            f"{value!r} {sign} {written(name)} <= {last!r}",
            lambda row: None if row[name] is None else ask(value, row[name]) and row[name] <= last,
        )
    return f"{written(name)} {sign} {value!r}", lambda row: None if row[name] is None else ask(row[name], value)


def joined(pairs) -> tuple:
    (one, ask_one), word, (other, ask_other) = pairs

    def ask(row):
        first, second = ask_one(row), ask_other(row)
        if word == "and":
            return False if first is False or second is False else None if None in (first, second) else True
        return True if first is True or second is True else None if None in (first, second) else False

    return f"({one}) {word} ({other})", ask


def negated(pair) -> tuple:
    text, ask = pair
    return f"not ({text})", lambda row: None if ask(row) is None else not ask(row)


CONDITIONS = st.recursive(
    comparisons(),
    lambda inner: st.one_of(inner.map(negated), st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(joined)),
    max_leaves=6,
)


def columns_of(rows: list[dict]) -> dict[str, Column]:
    numbers = {n: Column(values=np.array([np.nan if r[n] is None else r[n] for r in rows])) for n in NUMBERS}
    return numbers | {name: Column.of_words(row[name] for row in rows) for name in WORDS}


def mask(text: str, columns: dict[str, Column]) -> list[bool]:
    rows = len(next(iter(columns.values())).values)
    return Condition.parse(text).mask(columns.__getitem__, known=list(columns), rows=rows).tolist()


@settings(max_examples=300)
@given(ROWS, CONDITIONS)
def test_a_condition_chooses_the_rows_that_asking_each_one_does(rows, condition):
    text, ask = condition
    assert mask(text, columns_of(rows)) == [ask(row) is True for row in rows]


@settings(max_examples=100)
@given(ROWS, CONDITIONS)
def test_the_one_way_of_writing_means_the_same_and_is_its_own(rows, condition):
    text = Condition.parse(condition[0]).text
    assert Condition.parse(text).text == text
    assert mask(text, columns_of(rows)) == mask(condition[0], columns_of(rows))


COLUMNS = columns_of([{"age": 20.0, "body mass": 1.0, "site": "a", "class": None}, dict.fromkeys(CELLS)])


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("aeg > 60", 1, "no column 'aeg'; did you mean 'age'"),
        ("age > 60 and sit == 'a'", 14, "no column 'sit'; did you mean 'site'"),
        ("  `bodymass` > 1", 3, "did you mean 'body mass'"),
        ("'ü' == site and äge > 1", 17, "no column 'äge'"),
        ("age > '3'", 7, "holds numbers and is compared with text"),
        ("site == 3", 9, "holds text and is compared with a number"),
        ("site in ('a', 3)", 15, "holds text"),
        ("age == None", 8, "nothing equals a missing value"),
        ("age != missing", 8, "nothing equals a missing value"),
        ("age in (1, None)", 12, "nothing equals a missing value"),
        ("site == ''", 9, "empty text is a missing value"),
        ("age is 3", 1, "asks for missing values only"),
        ("age", 1, "alone is no condition"),
        ("not age", 5, "alone is no condition"),
        ("3 < 4", 1, "no column stands on either side"),
        ("age >", 1, "not a condition"),
        ("age > 1; age < 2", 8, "not a condition"),
        ("age > 1 # really", 9, "'#' cannot be used"),
        ("age in 3", 8, "a list of values"),
        ("age in ()", 8, "a list of values"),
        ("3 in (3, 4)", 1, "left of `in` stands a column"),
        ("age.real > 1", 1, "an attribute (a dot)"),
        ("age[0] > 1", 1, "a subscript"),
        ("abs(age) > 1", 1, "a call"),
        ("__import__('os').system('true')", 1, "a call"),
        ("age > (lambda: 1)()", 7, "a call"),
        ("age + 1 > 2", 1, "arithmetic"),
        ("age > 2**99", 7, "arithmetic"),
        ("age > 99999999999999999999", 7, "beyond 2^53"),
        ("age == True == site", 8, "compared with a number"),
        ("site == f'a'", 9, "a formatted string"),
        ("site == b'a'", 9, "a value alone"),
        ("[a for a in b]", 1, "ListComp"),
        ("(x := 1)", 2, "NamedExpr"),
        ("age > 1 if age else 2", 1, "IfExp"),
        ("`age > 1", 1, "a backtick that is not closed"),
    ],
)
def test_what_is_no_condition_is_refused_where_it_goes_wrong(text, place, said):
    with pytest.raises(UsageError) as caught:
        mask(text, COLUMNS)
    assert said in str(caught.value)
    assert f"character {place}:" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "   ", None, 3, "(" * 400 + "age > 1" + ")" * 400, "not " * 5000 + "age > 1", "\0"]
)
def test_what_cannot_even_be_read_is_refused(text):
    with pytest.raises(UsageError):
        Condition.parse(text)


def test_no_error_shows_what_a_column_holds():
    with pytest.raises(UsageError) as caught:
        mask("site == 3", {"site": Column.of_words(["sub-secret"])})
    assert "secret" not in str(caught.value)


def test_lines_may_be_broken_anywhere():
    assert mask("age > 10\n  and\tsite == 'a'", COLUMNS) == [True, False]


def test_a_hundred_thousand_rows_cost_a_few_passes_over_arrays():
    generator = np.random.default_rng(0)
    age = generator.uniform(0, 90, 100_000)
    site = Column.of_words("abc"[n] for n in generator.integers(0, 3, 100_000))
    found = mask("20 < age <= 60 and site in ('a', 'b')", {"age": Column(values=age), "site": site})
    assert found == ((age > 20) & (age <= 60) & (site.texts() != "c")).tolist()
