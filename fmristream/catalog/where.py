"""Which rows a condition chooses: comparisons of columns, joined by and, or, not. Nothing in it can be called or reached.

    age > 60 and task == 'rest'        sex in ('F', 'M') and not (site == 'bern')
    20 <= age < 30 or age is missing   `body mass` > 20 and `participants.group` == 'patient'

A value that is missing never matches, whatever is asked about it: `sex != 'F'` and `not (sex == 'F')` leave out those whose
sex is not known (three-valued logic, as in SQL). Only `is missing`, `is None` and their `is not` ask whether it is there.
"""

import ast
import copy
import keyword
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError

Mask = NDArray[np.bool_]

# Longer ones are generated; Python's parser takes them, but slowly.
MAX_CHARACTERS = 20_000

_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One column: numbers, or words as codes.

    Attributes:
        values: (n,) numbers with NaN, or (n,) places in `words` with -1, where nothing is known.
        words: each once; None for numbers.
    """

    values: NDArray[Any]
    words: tuple[str, ...] | None = None

    @classmethod
    def of_words(cls, cells: Iterable[str | None]) -> Self:
        """From text; None and empty text are missing."""
        places: dict[str, int] = {}
        codes = (places.setdefault(cell, len(places)) if cell else -1 for cell in cells)
        return cls(values=np.fromiter(codes, dtype=np.int64), words=tuple(places))

    @property
    def is_known(self) -> Mask:
        """(n,) where there is a value."""
        known: Mask = self.values >= 0 if self.words is not None else ~np.isnan(self.values)
        return known

    def take(self, rows: NDArray[np.int64]) -> "Column":
        """The values of some rows; -1 means none, which is missing."""
        missing = -1 if self.words is not None else np.nan
        padded = np.append(self.values if self.words is not None else self.values.astype(np.float64), missing)
        return Column(values=padded[rows], words=self.words)

    def texts(self) -> NDArray[Any]:
        """(n,) the words themselves; None where nothing is known."""
        assert self.words is not None
        found: NDArray[Any] = np.array([*self.words, None], dtype=object)[self.values]
        return found


@dataclass(frozen=True, slots=True)
class _Truth:
    """Where a condition holds, and where it does not; neither: a value that it needs is missing."""

    yes: Mask
    no: Mask


class Condition:
    """A parsed condition.

    Attributes:
        text: in one way of writing, whatever spaces and quotes were used.
    """

    def __init__(self, source: str, tree: ast.expr) -> None:
        self._source = source
        self._tree = tree
        self.text = _canonical(tree)

    @property
    def names(self) -> frozenset[str]:
        """The columns that it asks for."""
        return frozenset(node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)) - {"missing"}

    @classmethod
    def parse(cls, source: object) -> Self:
        """Read a condition.

        Raises:
            UsageError: it is none; the message says where.
        """
        if not isinstance(source, str) or not source.strip():
            raise UsageError(f"where={source!r}: expected a condition such as \"age > 60 and task == 'rest'\"")
        if len(source) > MAX_CHARACTERS:
            raise UsageError(f"a condition of {len(source)} characters: at most {MAX_CHARACTERS} are read")
        plain, quoted = _without_backticks(source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in strings
                tree = ast.parse(plain, mode="eval").body
        except SyntaxError as error:
            _refuse(source, (error.offset or 1) - 1, f"not a condition: {error.msg}")
        except (ValueError, RecursionError, MemoryError) as error:
            raise UsageError(f"where={source[:80]!r}: not a condition: {str(error) or type(error).__name__}") from error
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and (place := _place(source, plain, node)) in quoted:
                node.id = quoted[place]
        try:
            _check(tree, source, plain)
            return cls(source, tree)
        except RecursionError as error:
            raise UsageError(f"where={source[:80]!r}: nested too deeply") from error

    def mask(self, column: Callable[[str], Column], *, known: Sequence[str], rows: int) -> Mask:
        """(rows,) where the condition holds.

        Args:
            column: a column by its name; called with known names only.
            known: names of all columns.
            rows: how many there are.

        Raises:
            UsageError: it names an unknown column, or compares numbers with text.
        """
        return _Evaluation(self._source, column, known, rows).of(self._tree).yes


class _Evaluation:
    """One condition over one table."""

    def __init__(self, source: str, column: Callable[[str], Column], known: Sequence[str], rows: int) -> None:
        self._source, self._column, self._known, self._rows = source, column, known, rows
        self._plain = _without_backticks(source)[0]

    def of(self, node: ast.expr) -> _Truth:
        """Where a condition, or a part of one, holds."""
        if isinstance(node, ast.BoolOp):
            parts = [self.of(value) for value in node.values]
            return _all(parts) if isinstance(node.op, ast.And) else _any(parts)
        if isinstance(node, ast.UnaryOp):
            inner = self.of(node.operand)
            return _Truth(yes=inner.no, no=inner.yes)
        assert isinstance(node, ast.Compare), "checked when it was parsed"
        sides = [node.left, *node.comparators]
        return _all([self._pair(*pair) for pair in zip(sides, node.ops, sides[1:], strict=False)])

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Truth:
        if isinstance(op, ast.Is | ast.IsNot):
            known = self._of_name(left).is_known
            return _Truth(yes=known, no=~known) if isinstance(op, ast.IsNot) else _Truth(yes=~known, no=known)
        if isinstance(op, ast.In | ast.NotIn):
            found = _any([self._compare(left, operator.eq, value) for value in _elements(right)])
            return found if isinstance(op, ast.In) else _Truth(yes=found.no, no=found.yes)
        return self._compare(left, _OPERATORS[type(op)], right)

    def _compare(self, left: ast.expr, compare: Callable[[Any, Any], Any], right: ast.expr) -> _Truth:
        if isinstance(left, ast.Name) and isinstance(right, ast.Name):
            return self._compare_columns(left, compare, right)
        if isinstance(left, ast.Name):
            return self._compare_value(left, right, compare)
        assert isinstance(right, ast.Name), "checked when it was parsed"
        return self._compare_value(right, left, lambda cell, value: compare(value, cell))

    def _compare_value(self, name: ast.Name, literal: ast.expr, compare: Callable[[Any, Any], Any]) -> _Truth:
        column, value = self._of_name(name), _value(literal)
        self._require_kind(name, column, literal, is_text=isinstance(value, str))
        if column.words is None:
            return _truth(compare(column.values, value), column.is_known)
        hits = np.array([*(bool(compare(word, value)) for word in column.words), False])
        return _truth(hits[column.values], column.is_known)

    def _compare_columns(self, left: ast.Name, compare: Callable[[Any, Any], Any], right: ast.Name) -> _Truth:
        one, other = self._of_name(left), self._of_name(right)
        self._require_kind(left, one, right, is_text=other.words is not None)
        known = one.is_known & other.is_known
        if one.words is None:
            return _truth(compare(one.values, other.values), known)
        hits = np.zeros(self._rows, dtype=bool)
        hits[known] = compare(one.texts()[known], other.texts()[known]).astype(bool)
        return _truth(hits, known)

    def _require_kind(self, name: ast.Name, column: Column, other: ast.expr, *, is_text: bool) -> None:
        holds_text = column.words is not None
        # A column without any value is of neither kind.
        if holds_text == is_text or not column.is_known.any():
            return
        kind, given = ("text", "a number") if holds_text else ("numbers", "text")
        hint = f"quote the value, as in {name.id} == '1'" if holds_text else "leave the quotes away"
        self._refuse(other, f"column {name.id!r} holds {kind} and is compared with {given}; {hint}")

    def _of_name(self, node: ast.expr) -> Column:
        assert isinstance(node, ast.Name), "checked when it was parsed"
        if node.id not in self._known:
            self._refuse(node, f"there is no column {node.id!r}{nearest(node.id, self._known)}")
        return self._column(node.id)

    def _refuse(self, node: ast.expr, why: str) -> NoReturn:
        _refuse(self._source, _place(self._source, self._plain, node), why)


def nearest(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is not known: the one that was probably meant, and all."""
    close = get_close_matches(name.lower(), [one.lower() for one in known], n=1, cutoff=0.5)
    meant = next((one for one in known if close and one.lower() == close[0]), None)
    shown = ", ".join(known[:40]) + (" ..." if len(known) > 40 else "")
    return f"; did you mean {meant!r}? The columns are {shown}" if meant else f"; the columns are {shown or 'none'}"


def _truth(hits: Any, known: Mask) -> _Truth:
    yes = np.asarray(hits, dtype=bool) & known
    return _Truth(yes=yes, no=~yes & known)


def _all(parts: Sequence[_Truth]) -> _Truth:
    return _Truth(
        yes=np.logical_and.reduce([part.yes for part in parts]), no=np.logical_or.reduce([part.no for part in parts])
    )


def _any(parts: Sequence[_Truth]) -> _Truth:
    return _Truth(
        yes=np.logical_or.reduce([part.yes for part in parts]), no=np.logical_and.reduce([part.no for part in parts])
    )


def _check(node: ast.expr, source: str, plain: str) -> None:
    """Raise UsageError unless this is a condition made of what the language has."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value, source, plain)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, source, plain)
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
            _check_pair(left, op, right, source, plain)
    elif isinstance(node, ast.Name):
        _refuse(
            source, _place(source, plain, node), f"{node.id!r} alone is no condition; compare it, as in {node.id} == 1"
        )
    else:
        _refuse(
            source, _place(source, plain, node), f"{_kind(node)} cannot be used; only comparisons, and, or, not can"
        )


def _check_pair(left: ast.expr, op: ast.cmpop, right: ast.expr, source: str, plain: str) -> None:
    place = _place(source, plain, left)
    if isinstance(op, ast.Is | ast.IsNot):
        if not isinstance(left, ast.Name) or not _is_missing(right):
            _refuse(source, place, "`is` asks for missing values only: write COLUMN is missing, or use ==")
        return
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(left, ast.Name):
            _refuse(source, place, "left of `in` stands a column, right of it a list: task in ('rest', 'faces')")
        if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
            _refuse(source, _place(source, plain, right), "right of `in` stands a list of values: ('rest', 'faces')")
        for value in right.elts:
            _check_literal(value, source, plain)
        return
    for side in (left, right):
        if not isinstance(side, ast.Name) or _is_missing(side):
            _check_literal(side, source, plain)
    if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
        _refuse(source, place, "no column stands on either side of the comparison")


def _check_literal(node: ast.expr, source: str, plain: str) -> None:
    place = _place(source, plain, node)
    if _is_missing(node):
        _refuse(source, place, "nothing equals a missing value: write COLUMN is missing, or COLUMN is not missing")
    inner = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd) else node
    if not isinstance(inner, ast.Constant) or not isinstance(inner.value, str | int | float):
        _refuse(source, place, f"{_kind(node)} cannot be compared; only columns, 'text' and numbers can")
    if isinstance(inner.value, str) and (inner is not node or not inner.value):
        why = "empty text is a missing value: write COLUMN is missing" if not inner.value else "text has no sign"
        _refuse(source, place, why)
    if isinstance(inner.value, int) and abs(inner.value) > 2**53:
        _refuse(source, place, "a whole number beyond 2^53, which columns cannot hold exactly")


def _elements(node: ast.expr) -> list[ast.expr]:
    assert isinstance(node, ast.Tuple | ast.List | ast.Set)
    return node.elts


def _value(node: ast.expr) -> str | float:
    if isinstance(node, ast.UnaryOp):
        number = _value(node.operand)
        assert not isinstance(number, str)
        return -number if isinstance(node.op, ast.USub) else number
    assert isinstance(node, ast.Constant)
    return node.value if isinstance(node.value, str) else float(node.value)  # type: ignore[arg-type]


def _is_missing(node: ast.expr) -> bool:
    return (isinstance(node, ast.Constant) and node.value is None) or (
        isinstance(node, ast.Name) and node.id == "missing"
    )


def _canonical(tree: ast.expr) -> str:
    shown = copy.deepcopy(tree)
    for node in ast.walk(shown):
        if isinstance(node, ast.Name) and (not node.id.isidentifier() or keyword.iskeyword(node.id)):
            node.id = f"`{node.id}`"
    return ast.unparse(shown)


def _kind(node: ast.expr) -> str:
    """What a piece of Python is called, for people."""
    names: dict[type[ast.expr], str] = {
        ast.Call: "a call",
        ast.Attribute: "an attribute (a dot)",
        ast.Subscript: "a subscript",
        ast.BinOp: "arithmetic",
        ast.Lambda: "a function",
        ast.JoinedStr: "a formatted string",
        ast.Constant: "a value alone",
        ast.Compare: "a comparison",
    }
    return names.get(type(node), f"{type(node).__name__}")


def _refuse(source: str, place: int, why: str) -> NoReturn:
    shown = source if len(source) <= 200 else f"{source[:200]}..."
    raise UsageError(f"where={shown!r}, character {place + 1}: {why}")


def _place(source: str, plain: str, node: ast.expr) -> int:
    """Character at which a node begins; Python counts bytes."""
    return len(plain.encode()[: node.col_offset].decode(errors="ignore"))


def _without_backticks(source: str) -> tuple[str, dict[int, str]]:
    """(the same text with every `name` as a word of as many characters, the names by where they begin)."""
    # Line ends mean nothing between conditions, and Python would stop at them.
    text = "".join(" " if character in "\r\n\t\f" else character for character in source)
    lead = len(text) - len(text.lstrip())
    out, names, place, quote = list(text), {}, 0, ""
    while place < len(text):
        character = text[place]
        if quote:
            place += 1 if character != "\\" else 2
            quote = "" if character == quote else quote
            continue
        if character == "`":
            end = text.find("`", place + 1)
            if end < place + 2:
                _refuse(source, place, "a backtick that is not closed, or with nothing in it")
            names[place] = text[place + 1 : end]
            out[place : end + 1] = "q" * (end + 1 - place)
            place = end
        elif character in "'\"":
            quote = character
        elif character == "#":
            _refuse(source, place, "'#' cannot be used")
        place += 1
    # Leading spaces would be an indent to Python: brackets keep every character where it is.
    return ("(" + "".join(out[1:]) + ")" if lead else "".join(out)), names
