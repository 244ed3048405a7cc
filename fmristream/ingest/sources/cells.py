"""Tables that people make, CSV, TSV or Parquet, as text cells: an identifier keeps its leading zeros."""

import csv
import io
from dataclasses import dataclass

from fmristream.errors import CorruptDataError, UsageError
from fmristream.storage.sources import read_source_range
from fmristream.storage.urls import display_url

SUFFIXES = (".tsv", ".csv", ".parquet")
# Half a million subjects with some hundred columns; more than that is not for a table in memory.
_MAX_BYTES = 256 * 2**20

# A column of structures in bids2table's indexes: what it holds stands in the paths, too.
_IGNORED = frozenset({"extra_entities"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A table: rows as long as `columns`, "" where nothing is said."""

    name: str  # the file's own, for messages
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def first_of(self, *names: str) -> str:
        """The first of these columns that is there; "" where none is."""
        return next((name for name in names if name in self.columns), "")

    def column(self, name: str) -> list[str]:
        """The cells of one column."""
        place = self.columns.index(name)
        return [row[place] for row in self.rows]


def is_table(path: str) -> bool:
    """Whether a path ends like a table."""
    return display_url(path).lower().endswith(SUFFIXES)


def read_cells(url: str) -> Cells:
    """Read a table; what it is follows from its suffix, and for text from its first line.

    Raises:
        UsageError: it is too large, has no header, two columns of one name, or rows of another length.
        StorageError: it cannot be read.
    """
    name = display_url(url).rpartition("/")[2]
    raw = read_source_range(url, 0, _MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"{name}: larger than {_MAX_BYTES} bytes; keep the columns that are needed")
    columns, rows = _parquet(raw, name) if name.lower().endswith(".parquet") else _text(raw, name)
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if not columns or "" in columns or repeated:
        raise UsageError(
            f"{name}: {f'two columns {repeated[0]}' if repeated else 'a column without a name'}; name each"
        )
    return Cells(name=name, columns=tuple(columns), rows=tuple(rows))


def _text(raw: bytes, name: str) -> tuple[list[str], list[tuple[str, ...]]]:
    # Universal newlines: some spreadsheets still end lines with a bare carriage return.
    text = io.StringIO(raw.decode("utf-8-sig", errors="replace"), newline=None).getvalue()
    has_tabs = "\t" in text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text), delimiter="\t" if has_tabs else ",")
    try:
        found = [[cell.strip() for cell in line] for line in lines if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise UsageError(f"{name}: not a table: {error}") from error
    if not found:
        return [], []
    columns, *rows = found
    wrong = next((place for place, row in enumerate(rows) if len(row) != len(columns)), None)
    if wrong is not None:
        raise UsageError(
            f"{name}: row {wrong + 1} has {len(rows[wrong])} cells, the header {len(columns)}; one of them is wrong"
        )
    return columns, [tuple(row) for row in rows]


def _parquet(raw: bytes, name: str) -> tuple[list[str], list[tuple[str, ...]]]:
    from fmristream.catalog.tables import read_any_parquet

    try:
        columns = read_any_parquet(raw, ignored=_IGNORED)
    except CorruptDataError as error:
        raise UsageError(f"{name}: not a Parquet table of plain columns: {error}") from error
    return list(columns), list(zip(*(map(_as_text, cells) for cells in columns.values()), strict=True))


def _as_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        # Integers with gaps become floats in many tools: 100307.0 was 100307.
        return "" if value != value else str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return str(value).strip()
