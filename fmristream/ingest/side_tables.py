"""Read the tables beside a run, strictly: numbers, `n/a`, and of text only what cannot name anybody.

A table that does not fit its run, or is not what its name says, is not stored, and the conversion says so. Confounds and
recordings keep their columns of numbers, but those that tell who or when: by their name, or because they say the same in
every row, as an identifier or a date does. Of events only columns are kept whose meaning BIDS fixes: the others hold
whatever an experimenter's program wrote, names and typed answers among it. Where subjects have pseudonyms no text is
kept, and of columns those that are called as in the vocabulary.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import ObjectMissingError, SourceError
from fmristream.ingest.sources.listing import SideFile
from fmristream.ingest.sources.texts import read_json_object
from fmristream.ingest.vocabulary import is_confound, is_recording, is_signal
from fmristream.shards.side import CONFOUNDS, EVENTS, Table
from fmristream.storage.sources import read_source_range

# The longest are physiological recordings of some MB; a table beyond this is something else.
_MAX_BYTES = 256 * 2**20
_MAX_COLUMNS = 10_000
_MAX_LETTERS = 64

# A column of words that sort trials has few of them; one of typed answers has many.
_MAX_WORDS = 256
# Shorter ones stand in innocent names by chance.
_MIN_LABEL = 4
# Words in names of columns, between anything but letters.
_TELLS_WHO = re.compile(
    r"(?<![a-z])(sub|subj|subject\w*|participant\w*|patient\w*|person\w*|twin\w*|family\w*|name|initials|birth\w*|dob|"
    r"date\w*|address|e?mail|phone|mrn|ssn|guid|uuid|uid|eid|id|age|sex|gender|operator|examiner|experimenter|comments?|"
    r"notes?)(?![a-z])"
)
_HUMP = re.compile("(?<=[a-z0-9])(?=[A-Z])")

_MISSING = frozenset({"n/a", "N/A", "", "nan", "NaN"})
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LINE_END = re.compile("\r\n|\n|\r")

EVENT_NUMBERS = ("onset", "duration", "response_time", "sample", "value")
EVENT_TEXT = ("trial_type",)

_NO_TEXT = "trial types are words, which may name people; left out with --pseudonyms"


def read_side_tables(
    files: Sequence[SideFile],
    *,
    frames: int,
    subject: str,
    is_pseudonymous: bool = False,
    is_resampled_in_time: bool = False,
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """(tables by name, what was left out); the notes name columns and kinds of tables, never files.

    Args:
        files: that belong to a run.
        frames: of the run's source.
        subject: whose label is to stand in no column.
        is_pseudonymous: nobody's label or name is to stand anywhere, and notes name no column.
        is_resampled_in_time: the frames that are stored are others: a row a frame says nothing about them.

    Raises:
        StorageError: a remote store failed.
    """
    tables: dict[str, Table] = {}
    notes: list[str] = []
    for file in files:
        kind, _, label = file.name.partition("-")
        if is_pseudonymous and label and not is_recording(label):
            notes.append(f"{kind}: left out, because the recording's label is none of the known ones (--pseudonyms)")
            continue
        try:
            if not file.url:
                raise SourceError(file.reason or "several files apply equally")
            table, left_out = _read(file, frames=frames)
            if is_resampled_in_time and _has_row_a_frame(file.name, table):
                raise SourceError(
                    "they have one row for each of the source's frames, and the run was resampled in time"
                )
        except SourceError as error:
            notes.append(f"{file.name} are not stored: {error}")
            continue
        if is_pseudonymous:
            table, of_file = _called_as_known(kind, table, left_out, frames=frames)
        else:
            table, left_out = _without_label(table, left_out, subject)
            shown = ", ".join(left_out[:8]) + (", ..." if len(left_out) > 8 else "")
            of_file = [f"columns left out: {shown}"] if left_out else []
        if table.columns:
            tables[file.name] = table
        notes += [f"{file.name}: {note}" for note in of_file]
    return tables, tuple(notes)


def _has_row_a_frame(name: str, table: Table) -> bool:
    """Whether its rows are frames; events, and recordings that have a sampling rate, are in seconds."""
    return name == CONFOUNDS or (name != EVENTS and not table.facts)


def _read(file: SideFile, *, frames: int) -> tuple[Table, list[str]]:
    if file.name == CONFOUNDS:
        text = _text(file.url)
        return parse_confounds(_with_header(text, file.columns) if file.columns else text, frames=frames)
    if file.name == EVENTS:
        return parse_events(_text(file.url))
    merged: dict[str, object] = {}
    for url in reversed(file.sidecar_urls):
        folder, _, name = url.rpartition("/")
        try:
            merged.update(read_json_object(folder or ("/" if url.startswith("/") else "."), name))
        except SourceError as error:
            if not isinstance(error.__cause__, ObjectMissingError):
                raise SourceError("their JSON sidecar cannot be read") from error
    return parse_recording(_text(file.url), merged, frames=frames)


def parse_confounds(text: str, *, frames: int) -> tuple[Table, list[str]]:
    """The columns of numbers of a confounds table, and the names of the others.

    Raises:
        SourceError: it is no table, or has not one row a frame.
    """
    names, rows = _rows(text)
    if len(rows) != frames:
        raise SourceError(f"they have {len(rows)} rows, the run {frames} frames")
    return _numbers_of(names, rows, facts={})


def parse_events(text: str) -> tuple[Table, list[str]]:
    """The allowed columns of an events table, and the names of the others.

    Raises:
        SourceError: it is no table, or its onsets and durations are no numbers.
    """
    names, rows = _rows(text)
    cells = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    columns: dict[str, NDArray[np.float64] | list[str | None]] = {}
    for name in EVENT_NUMBERS:
        values = _numbers(cells[name]) if name in cells else None
        if values is not None:
            columns[name] = values
    if "onset" not in columns or "duration" not in columns:
        raise SourceError("they lack onset or duration, or these are no numbers")
    for name in EVENT_TEXT:
        if name in cells and _sorts(cells[name]):
            columns[name] = [None if cell in _MISSING else cell for cell in cells[name]]
    return Table(columns=columns, facts={}), [_printable(name) for name in names if name not in columns]


def parse_recording(text: str, sidecar: Mapping[str, object], *, frames: int) -> tuple[Table, list[str]]:
    """The columns of a recording.

    A sidecar that names `Columns` stands for a header line, as in BIDS; a table without such a sidecar has one. Without
    a sampling rate it must have one row a frame.

    Raises:
        SourceError: nothing says when its rows were taken, or it is no table of numbers.
    """
    first_line = _LINE_END.split(text.removeprefix("\ufeff"), 1)[0]
    if "Columns" in sidecar:
        columns = sidecar["Columns"]
        if not isinstance(columns, list) or not columns or not all(isinstance(name, str) and name for name in columns):
            raise SourceError("their sidecar names no Columns")
        header = "\t".join(columns)
        text = text if first_line == header else f"{header}\n{text}"
    elif _numbers(first_line.split("\t")) is not None:
        raise SourceError("their sidecar names no Columns, and they have no header line")
    names, rows = _rows(text)
    return _numbers_of(names, rows, facts=_times(sidecar, rows=len(rows), frames=frames))


def _times(sidecar: Mapping[str, object], *, rows: int, frames: int) -> dict[str, float]:
    rate, start = sidecar.get("SamplingFrequency"), sidecar.get("StartTime")
    if rate is None and start is None and rows == frames:
        return {}
    if not _is_finite(rate) or not _is_finite(start) or not float(rate) > 0:  # type: ignore[arg-type]
        raise SourceError(
            f"their sidecar lacks SamplingFrequency or StartTime, and they have {rows} rows where the run has {frames} frames"
        )
    return {"sampling_hz": float(rate), "start_s": float(start)}  # type: ignore[arg-type]


def _with_header(text: str, columns: Sequence[str]) -> str:
    """A table between blanks without a header line, as one with tabs."""
    rows = ("\t".join(line.split()) for line in _LINE_END.split(text))
    return "\n".join(["\t".join(columns), *rows])


def _numbers_of(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, facts: Mapping[str, float]
) -> tuple[Table, list[str]]:
    """The columns of numbers that tell nobody, and the names of the others."""
    columns = {name: _numbers([row[place] for row in rows]) for place, name in enumerate(names)}
    kept = {
        name: values
        for name, values in columns.items()
        if values is not None and not _tells_who(name) and not _is_constant(values)
    }
    if all(values is None for values in columns.values()):
        raise SourceError("they have no column of numbers")
    return Table(columns=kept, facts=facts), [_printable(name) for name in names if name not in kept]


def _tells_who(name: str) -> bool:
    return not name.isprintable() or _TELLS_WHO.search(_HUMP.sub("_", name).lower()) is not None


def _is_constant(values: NDArray[np.float64]) -> bool:
    """Whether one number other than 0 and 1 stands in all of several rows: an identifier, an age or a date."""
    known = np.unique(values[~np.isnan(values)])
    return len(values) > 1 and len(known) == 1 and known[0] not in (0, 1)


def _sorts(cells: Sequence[str]) -> bool:
    """Whether these are words that sort trials."""
    return all(len(cell) <= _MAX_LETTERS and cell.isprintable() for cell in cells) and len(set(cells)) <= _MAX_WORDS


def _without_label(table: Table, left_out: list[str], subject: str) -> tuple[Table, list[str]]:
    """Without columns whose name or words hold the subject's label."""
    label = subject.lower() if len(subject) >= _MIN_LABEL else f"sub-{subject}".lower()

    def tells(name: str, values: object) -> bool:
        words = {word for word in values if word} if isinstance(values, list) else set()
        return any(label in text.lower() for text in {name, *words})

    kept = {name: values for name, values in table.columns.items() if not tells(name, values)}
    more = ["(the subject's label)"] * (len(table.columns) - len(kept))
    left_out = ["(the subject's label)" if label in name.lower() else name for name in left_out]
    return Table(columns=kept, facts=table.facts), [*left_out, *more]


def _called_as_known(kind: str, table: Table, left_out: Sequence[str], *, frames: int) -> tuple[Table, list[str]]:
    """Without text and without columns that may be called after somebody; and notes, which do not say how these are called."""

    def is_known(name: str) -> bool:
        if kind == EVENTS:
            return name in EVENT_NUMBERS
        return is_confound(name, frames=frames) if kind == CONFOUNDS else is_signal(name)

    kept = {name: values for name, values in table.columns.items() if is_known(name)}
    has_text = kind == EVENTS and any(name in EVENT_TEXT for name in table.columns)
    more = len(left_out) + len(table.columns) - len(kept) - has_text
    notes = [_NO_TEXT] if has_text else []
    return Table(columns=kept, facts=table.facts), [*notes, *([f"columns left out: {more}"] if more else [])]


def _rows(text: str) -> tuple[list[str], list[list[str]]]:
    lines = [line.split("\t") for line in _LINE_END.split(text.removeprefix("\ufeff")) if line.strip()]
    if len(lines) < 2:
        raise SourceError("there are no rows")
    names = [name.strip() for name in lines[0]]
    if len(set(names)) != len(names) or "" in names or len(names) > _MAX_COLUMNS:
        raise SourceError("column names are empty, repeated or too many")
    if any(len(line) != len(names) for line in lines):
        raise SourceError("rows have different numbers of fields")
    return names, [[cell.strip() for cell in line] for line in lines[1:]]


def _numbers(cells: Sequence[str]) -> NDArray[np.float64] | None:
    """The cells as numbers, NaN where nothing is known; None where one of them is neither."""
    if not all(cell in _MISSING or _NUMBER.fullmatch(cell) for cell in cells):
        return None
    values = np.array([math.nan if cell in _MISSING else float(cell) for cell in cells], dtype=np.float64)
    return None if np.isinf(values).any() else values


def _text(url: str) -> str:
    try:
        raw = read_source_range(url, 0, _MAX_BYTES + 1)
    except ObjectMissingError as error:
        raise SourceError("the file is not there (a link that leads nowhere?)") from error
    if raw[:2] == b"\x1f\x8b":
        raw = _inflated(raw)
    if len(raw) > _MAX_BYTES:
        raise SourceError(f"larger than {_MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError("they are not UTF-8 text") from error


def _inflated(raw: bytes) -> bytes:
    """All members of a gzip file, no more bytes than a table has."""
    whole = bytearray()
    try:
        while raw:
            stream = zlib.decompressobj(wbits=31)
            whole += stream.decompress(raw, _MAX_BYTES + 1 - len(whole))
            if not stream.eof:
                raise SourceError("their gzip stream is cut short, or too long for a table")
            raw = stream.unused_data
    except zlib.error as error:
        raise SourceError("their gzip stream is damaged") from error
    return bytes(whole)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _printable(name: str) -> str:
    return name[:_MAX_LETTERS] if name.isprintable() else "(unprintable)"
