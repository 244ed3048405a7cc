"""participants.tsv of BIDS: one row per subject, typed."""

import math
import re

Row = dict[str, str | float | None]

MISSING = frozenset({"", "n/a", "N/A", "NA", "nan", "NaN"})
_LINE_END = re.compile("\r\n|\n|\r")
# Plain decimal notation; `float` would also take "1_000", "infinity" and Arabic digits.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# Sites, families and the like: 007 is not 7.
_CODE = re.compile(r"0\d", re.ASCII)


def parse_participants(text: str) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Rows with `subject` (without "sub-") first, and notes about what was left out.

    "n/a" becomes None; a column is numeric when all its other values are.
    """
    lines = [line.split("\t") for line in _LINE_END.split(text.removeprefix("\ufeff")) if line.strip()]
    if not lines:
        return (), ("participants.tsv is empty",)
    names = [name.strip() for name in lines[0]]
    if "participant_id" not in names:
        return (), ("participants.tsv has no column participant_id; it is not used",)
    notes = []
    if any(len(line) != len(names) for line in lines[1:]):
        notes.append(
            "participants.tsv has rows with too few or too many fields; missing ones are n/a, the rest is dropped"
        )
    cells = [dict(zip(names, (*map(str.strip, line), *[""] * len(names)), strict=False)) for line in lines[1:]]
    subjects = [row["participant_id"].removeprefix("sub-") for row in cells]
    columns = {name: typed([row[name] for row in cells]) for name in names if name not in ("participant_id", "subject")}
    rows: dict[str, Row] = {}
    repeated = set()
    for place, subject in enumerate(subjects):
        if subject in rows:
            repeated.add(subject)
        elif subject not in MISSING:
            rows[subject] = {"subject": subject, **{name: column[place] for name, column in columns.items()}}
    if repeated:
        notes.append(f"participants.tsv repeats {', '.join(sorted(repeated))}; the first row of each is used")
    return tuple(rows.values()), tuple(notes)


def typed(cells: list[str]) -> list[str | float | None]:
    """A column as numbers where every cell is one, else as text; missing cells are None."""
    present = [cell for cell in cells if cell not in MISSING]
    if present and all(_NUMBER.fullmatch(cell) and math.isfinite(float(cell)) for cell in present):
        if any(_CODE.match(cell) for cell in present):
            return [None if cell in MISSING else cell for cell in cells]
        return [None if cell in MISSING else float(cell) for cell in cells]
    return [None if cell in MISSING else cell for cell in cells]
