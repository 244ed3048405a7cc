"""What is known of subjects: a table joined by their labels, and which column's groups a split never divides."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fmristream.errors import UsageError
from fmristream.ingest.sources.cells import Cells, read_cells
from fmristream.ingest.sources.collection import Collection
from fmristream.ingest.sources.listing import Listing
from fmristream.ingest.sources.participants import MISSING, Row, typed

_SUBJECT_COLUMNS = ("participant_id", "subject", "subject_id", "src_subject_id", "eid", "Subject")
NO_GROUPS = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phenotypes:
    """Where the columns about subjects come from.

    Attributes:
        url: a CSV, TSV or Parquet table in place of the source's own participants.tsv.
        subject_column: its column with the subjects' labels, where the usual names do not tell.
        group_by: the column (family, site) whose groups a split never divides; "none" for no groups at all.
    """

    url: str | None = None
    subject_column: str | None = None
    group_by: str | None = None


def with_phenotypes(listing: Listing, wanted: Phenotypes, collection: Collection | None) -> Listing:
    """The listing with its subjects' rows, and with groups.

    Raises:
        UsageError: the table lacks a column, contradicts itself about a subject, or is about other subjects.
        StorageError: the table cannot be read.
    """
    if wanted.subject_column is not None and wanted.url is None:
        raise UsageError("--subject-column names a column of the table given with --participants; give that, too")
    if wanted.url is not None:
        listing = _joined(listing, read_cells(wanted.url), wanted.subject_column, collection)
    return _grouped(listing, wanted.group_by, collection)


def _joined(listing: Listing, cells: Cells, column: str | None, collection: Collection | None) -> Listing:
    subjects = {run.subject for run in listing.runs}
    column = _subject_column(cells, column, collection)
    rows = rows_by_subject(cells, column, collection, keep=subjects)
    lacking = subjects - rows.keys()
    listed = {subject_label(text, collection) for text in cells.column(column)} - MISSING
    if not rows:
        raise UsageError(
            f"{cells.name}: none of its {len(listed)} subjects has a run; its column {column} has labels like "
            f"{_shape(min(listed, default=''))}, the runs' are like {_shape(min(subjects))} (9 a digit, A a letter)"
        )
    notes = list(listing.notes)
    if len(listed) > len(rows):
        notes.append(f"{cells.name}: {len(listed) - len(rows)} of its {len(listed)} subjects have no run")
    if lacking:
        notes.append(f"{cells.name}: {len(lacking)} of {len(subjects)} subjects with runs are not in it")
    own = {str(row["subject"]): row for row in listing.participants}
    # The site that paths tell stays, where the table has no column of that name.
    kept = (
        {subject: {"site": row["site"]} for subject, row in own.items() if "site" in row}
        if "site" not in cells.columns
        else {}
    )
    joined = tuple({**row, **kept.get(subject, {})} for subject, row in sorted(rows.items()))
    return replace(listing, participants=joined, notes=tuple(notes))


def _subject_column(cells: Cells, column: str | None, collection: Collection | None) -> str:
    if column is not None:
        if column not in cells.columns:
            raise UsageError(f"{cells.name}: has no column {column}; there are {_shown(cells.columns)}")
        return column
    # The collection's own names first: ABIDE's phenotypic table has `subject`, which is a row number.
    found = cells.first_of(*(collection.subject_columns if collection else ()), *_SUBJECT_COLUMNS)
    if not found:
        raise UsageError(
            f"{cells.name}: has the columns {_shown(cells.columns)}; say with --subject-column which holds the subjects"
        )
    return found


def subject_label(text: str, collection: Collection | None = None) -> str:
    """A label as runs have it: without `sub-`, and rewritten where the collection writes it otherwise."""
    label = text.strip().removeprefix("sub-")
    if collection is not None and collection.subject_rewrite is not None:
        label = re.sub(*collection.subject_rewrite, label)
    return label


def rows_by_subject(
    cells: Cells,
    column: str,
    collection: Collection | None = None,
    *,
    keep: set[str],
    leave_out: frozenset[str] = frozenset(),
) -> dict[str, Row]:
    """One row for each subject of `keep` that the table names.

    Several lines of one subject must agree wherever they say anything.

    Raises:
        UsageError: they do not; subject and column are named, never the values.
    """
    names = [
        name for name in cells.columns if name not in (column, "subject", "participant_id") and name not in leave_out
    ]
    columns = {name: typed(cells.column(name)) for name in names}
    rows: dict[str, Row] = {}
    for place, text in enumerate(cells.column(column)):
        subject = subject_label(text, collection)
        if subject in MISSING or subject not in keep:
            continue
        row = rows.setdefault(subject, {"subject": subject})
        for name in names:
            value = columns[name][place]
            if row.setdefault(name, value) is None:
                row[name] = value
            if value is not None and row[name] != value:
                raise UsageError(
                    f"{cells.name}: two rows of subject {subject} differ in column {name}; keep one row for each subject, "
                    "or leave the column out"
                )
    return rows


def _grouped(listing: Listing, group_by: str | None, collection: Collection | None) -> Listing:
    if group_by == NO_GROUPS:
        return replace(listing, runs=tuple(replace(run, group="") for run in listing.runs))
    columns = {name for row in listing.participants for name in row} - {"subject"}
    notes = list(listing.notes)
    if group_by is None:
        known = collection.group_columns if collection else ()
        group_by = next((name for name in known if name in columns), None)
        if group_by is not None:
            notes.append(
                f"splits keep the groups of column {group_by} together (--group-by {NO_GROUPS} for subjects alone)"
            )
        elif known:
            notes.append(
                f"{listing.kind} has families, and no column {' or '.join(known)} is there: a split may divide siblings; give "
                "--participants with that column, or --group-by"
            )
    elif group_by not in columns:
        raise UsageError(f"--group-by {group_by}: no such column of participants; there are {_shown(sorted(columns))}")
    if group_by is None:
        return replace(listing, notes=tuple(notes))
    values = {str(row["subject"]): _group_label(row.get(group_by)) for row in listing.participants}
    runs = tuple(replace(run, group=values.get(run.subject, "")) for run in listing.runs)
    alone = {run.subject for run in runs if not run.group}
    if alone:
        notes.append(f"{len(alone)} subjects have no {group_by}: each is a group of its own")
    return replace(listing, runs=runs, notes=tuple(notes))


def _group_label(value: str | float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _shape(label: str) -> str:
    """What a label looks like, without what it says: A9999 for S0132."""
    return re.sub(r"[^\W\d_]", "A", re.sub(r"\d", "9", label)) or "(empty)"


def _shown(columns: Sequence[str] | Mapping[str, object]) -> str:
    names = list(columns)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"
