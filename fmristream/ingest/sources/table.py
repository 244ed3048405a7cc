"""A table as a source: one row per run with a path or URL and a subject, and any other columns about subjects."""

import hashlib
import math
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fmristream.catalog.split import PARTS
from fmristream.errors import ObjectMissingError, UsageError
from fmristream.ingest.sources.bids import find_bids_runs
from fmristream.ingest.sources.cells import Cells, read_cells
from fmristream.ingest.sources.listing import (
    Listing,
    SourceRun,
    imaging_suffix,
    label_of,
    parse_bids_name,
    without_suffix,
)
from fmristream.ingest.sources.participants import MISSING
from fmristream.ingest.sources.phenotypes import rows_by_subject, subject_label
from fmristream.ingest.sources.side_files import RECORDINGS, table_at
from fmristream.storage.sources import source_size
from fmristream.storage.urls import display_url, join_url, local_path, scheme_of, without_credentials

_PATHS = ("path", "url")
_SUBJECTS = ("subject", "participant_id")
_LABELS = ("session", "task", "acq", "run", "echo", "space", "res", "desc")
_PREFIXES = {"session": "ses-", "task": "task-", "acq": "acq-", "run": "run-", "echo": "echo-", "space": "space-"}
# Columns of bids2table's indexes (2.x), and what they leave out of a dataset.
_INDEX = frozenset({"dataset", "root", "path", "sub", "suffix", "ext"})
_BESIDE = ("dataset_description.json", "participants.tsv")
_TABLES = ("confounds", "events", *RECORDINGS)
_OTHERS = ("tr_s", "mask", "group", "split", *_TABLES)


def find_table_runs(source: str, *, space: str | None, wanted: Mapping[str, Sequence[str]] | None = None) -> Listing:
    """The runs of a CSV, TSV or Parquet table; an index made by bids2table stands for the listing of its dataset.

    Columns: `path` (or `url`; relative to the table), `subject` (or `participant_id`), and where wanted session, task,
    acq, run, echo, space, tr_s, mask, group, split, and paths of the run's own tables: confounds,
    events, physio, stim, eyetrack, eeg. Every other column is about the subject.

    Raises:
        UsageError: a column is missing, a row is not complete, two rows name the same file, or rows of one subject differ.
        StorageError: the table cannot be read.
    """
    cells = read_cells(source)
    if set(cells.columns) >= _INDEX:
        return _indexed(source, cells, space=space, wanted=wanted or {})
    path_column, subject_column = cells.first_of(*_PATHS), cells.first_of(*_SUBJECTS)
    if not path_column or not subject_column:
        raise UsageError(
            f"{cells.name}: has the columns {', '.join(cells.columns[:12])}; a table of runs has path (or url) and subject"
        )
    # A query belongs to the table alone.
    root = (display_url(source) if scheme_of(source) in ("http", "https") else source).rpartition("/")[0] or "."
    runs = [
        _source_run(root, cells, dict(zip(cells.columns, row, strict=True)), place, path_column, subject_column, space)
        for place, row in enumerate(cells.rows, start=1)
    ]
    if not runs:
        raise UsageError(f"{cells.name}: has no rows")
    _require_different_files(runs, cells)
    runs = _named(runs, cells)
    for what in ("group", "split"):
        _require_one_per_subject(runs, cells, what)
    about_files = frozenset((path_column, *_LABELS, *_OTHERS))
    rows = rows_by_subject(cells, subject_column, keep={run.subject for run in runs}, leave_out=about_files)
    return Listing(
        kind="table",
        root=root,
        runs=tuple(sorted(runs, key=lambda run: run.key)),
        participants=tuple(rows[subject] for subject in sorted(rows))
        if any(len(row) > 1 for row in rows.values())
        else (),
    )


def _indexed(source: str, cells: Cells, *, space: str | None, wanted: Mapping[str, Sequence[str]]) -> Listing:
    """The runs of the BIDS dataset that bids2table has indexed: its files need no listing, and no sidecar is in there."""
    roots = sorted(set(cells.column("root")))
    if len(roots) != 1:
        raise UsageError(f"{cells.name}: an index of {len(roots)} datasets; convert one at a time")
    root = roots[0]
    if scheme_of(without_credentials(root)) == "file" and scheme_of(source) != "file":
        raise UsageError(f"{cells.name}: an index from elsewhere that names a folder of this machine; use URLs")
    paths = cells.column("path")
    if any(path.startswith("/") or ".." in path.split("/") or "://" in path for path in paths):
        raise UsageError(f"{cells.name}: its paths lead out of the dataset")
    beside = [key for key in _BESIDE if _is_there(join_url(root, key))]
    listing = find_bids_runs(root, sorted({*paths, *beside}), space=space, wanted=wanted)
    return replace(listing, notes=(*listing.notes, f"{cells.name} has no sidecars: repetition times are the headers'"))


def _is_there(url: str) -> bool:
    try:
        return source_size(url) >= 0
    except ObjectMissingError:
        return False


def _source_run(
    root: str, cells: Cells, row: dict[str, str], place: int, path_column: str, subject_column: str, space: str | None
) -> SourceRun:
    row = {name: "" if text in MISSING else text for name, text in row.items()}
    subject = subject_label(row[subject_column])
    if not subject or not row[path_column]:
        raise UsageError(f"{cells.name}: row {place} has no {subject_column if not subject else path_column}")
    labels = {name: row.get(name, "").removeprefix(_PREFIXES.get(name, "")) for name in _LABELS}
    if space is not None and labels["space"] not in ("", space):
        raise UsageError(f"{cells.name}: row {place} says another space than --space {space}; leave one out")
    if (split := row.get("split", "")) not in ("", *PARTS):
        raise UsageError(f"{cells.name}: row {place} has the split {split}; expected {', '.join(PARTS)} or nothing")
    mask = row.get("mask", "")
    run = SourceRun(
        key=row[path_column],
        name="",
        url=_resolved(root, row[path_column], cells.name, place),
        subject=subject,
        **{**labels, "space": labels["space"] or space or ""},
        tr_s=_seconds(row.get("tr_s", ""), cells.name, place),
        mask_url=_resolved(root, mask, cells.name, place) if mask else None,
        group=row.get("group", ""),
        split=split,
        sidecar_urls=(),
        side=tuple(table_at(name, _resolved(root, row[name], cells.name, place)) for name in _TABLES if row.get(name)),
    )
    file_name = display_url(row[path_column]).rpartition("/")[2]
    # The file's own name, unless the table calls the subject otherwise: that may be why there is a table.
    is_of_subject = parse_bids_name(file_name).entities.get("sub") == subject
    return replace(run, name=without_suffix(file_name) if is_of_subject else label_of(run))


def _resolved(root: str, path: str, table: str, place: int) -> str:
    """A cell as a URL. A table from elsewhere cannot name files of the machine that reads it."""
    is_local_table = scheme_of(root) == "file"
    if "://" in path or path.startswith(("/", "~")):
        if scheme_of(without_credentials(path)) == "file" and not is_local_table:
            raise UsageError(f"{table}: row {place} names a local file, which a table from elsewhere may not; use URLs")
        return local_path(path) if scheme_of(path) == "file" else path
    if is_local_table:
        return local_path(join_url(root, path))
    if posixpath.normpath(path).startswith(".."):
        raise UsageError(f"{table}: row {place} leads out of the table's folder, which a table from elsewhere may not")
    return join_url(root, posixpath.normpath(path))


def _seconds(text: str, table: str, place: int) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{table}: row {place} has tr_s {text}; expected seconds above 0")
    return seconds


def _require_different_files(runs: list[SourceRun], cells: Cells) -> None:
    first: dict[str, int] = {}
    for place, run in enumerate(runs, start=1):
        if first.setdefault(run.url, place) != place:
            raise UsageError(f"{cells.name}: rows {first[run.url]} and {place} name the same file; keep one")


def _named(runs: list[SourceRun], cells: Cells) -> list[SourceRun]:
    """Runs under names that differ and tell nothing of where the files lie or how they are called; their keys, too."""
    times = Counter(run.name for run in runs)
    named = []
    for run in runs:
        path = display_url(run.key)
        mark = (
            f"_{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}" if times[run.name] > 1 else ""
        )
        named.append(replace(run, name=run.name + mark, key=run.name + mark + imaging_suffix(path)))
    first: dict[str, int] = {}
    for place, run in enumerate(named, start=1):
        if first.setdefault(run.name, place) != place:
            raise UsageError(f"{cells.name}: rows {first[run.name]} and {place} name the same file; keep one")
    return named


def _require_one_per_subject(runs: list[SourceRun], cells: Cells, what: str) -> None:
    found: dict[str, str] = {}
    for run in runs:
        if found.setdefault(run.subject, getattr(run, what)) != getattr(run, what):
            raise UsageError(
                f"{cells.name}: rows of subject {run.subject} differ in column {what}; give one for each subject"
            )
