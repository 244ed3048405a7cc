"""Read the tables beside a run, strictly: numbers, `n/a`, and of text only what cannot name anybody.

A table that does not fit its run, or is not what its name says, is not stored, and the conversion says so. Confounds and
recordings keep their columns of numbers. Of events only columns are kept whose meaning BIDS fixes: the others hold whatever
an experimenter's program wrote, names and typed answers among it.
"""

import math
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import ObjectMissingError, SourceError
from fmristream.ingest.sources.listing import SideFile
from fmristream.ingest.sources.texts import read_json_object
from fmristream.shards.side import CONFOUNDS, EVENTS, Table
from fmristream.storage.sources import read_source_range

# The longest are physiological recordings of some MB; a table beyond this is something else.
_MAX_BYTES = 256 * 2**20
_MAX_COLUMNS = 10_000
_MAX_LETTERS = 64

_MISSING = frozenset({"n/a", "N/A", "", "nan", "NaN"})
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LINE_END = re.compile("\r\n|\n|\r")

EVENT_NUMBERS = ("onset", "duration", "response_time", "sample", "value")
EVENT_TEXT = ("trial_type",)


def read_side_tables(files: Sequence[SideFile], *, frames: int) -> tuple[dict[str, Table], tuple[str, ...]]:
    """(tables by name, what was left out); the notes name columns and kinds of tables, never files.

    Raises:
        StorageError: a remote store failed.
    """
    tables: dict[str, Table] = {}
    notes: list[str] = []
    for file in files:
        try:
            if not file.url:
                raise SourceError("several files apply equally")
            table, left_out = _read(file, frames=frames)
        except SourceError as error:
            notes.append(f"{file.name} are not stored: {error}")
            continue
        tables[file.name] = table
        if left_out:
            shown = ", ".join(left_out[:8]) + (", ..." if len(left_out) > 8 else "")
            notes.append(f"{file.name}: columns left out: {shown}")
    return tables, tuple(notes)


def _read(file: SideFile, *, frames: int) -> tuple[Table, list[str]]:
    if file.name == CONFOUNDS:
        return parse_confounds(_text(file.url), frames=frames)
    if file.name == EVENTS:
        return parse_events(_text(file.url))
    merged: dict[str, object] = {}
    for url in reversed(file.sidecar_urls):
        folder, _, name = url.rpartition("/")
        try:
            merged.update(read_json_object(folder, name))
        except SourceError as error:
            raise SourceError("their JSON sidecar cannot be read") from error
    return parse_recording(_text(file.url), merged)


def parse_confounds(text: str, *, frames: int) -> tuple[Table, list[str]]:
    """The columns of numbers of a confounds table, and the names of the others.

    Raises:
        SourceError: it is no table, or has not one row a frame.
    """
    names, rows = _rows(text)
    if len(rows) != frames:
        raise SourceError(f"they have {len(rows)} rows, the run {frames} frames")
    columns = {name: _numbers([row[place] for row in rows]) for place, name in enumerate(names)}
    kept = {name: values for name, values in columns.items() if values is not None}
    if not kept:
        raise SourceError("they have no column of numbers")
    return Table(columns=kept, facts={}), [_printable(name) for name in names if name not in kept]


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
        if name in cells and all(len(cell) <= _MAX_LETTERS and cell.isprintable() for cell in cells[name]):
            columns[name] = [None if cell in _MISSING else cell for cell in cells[name]]
    return Table(columns=columns, facts={}), [_printable(name) for name in names if name not in columns]


def parse_recording(text: str, sidecar: dict[str, object]) -> tuple[Table, list[str]]:
    """The columns of a recording without a header line, whose sidecar says what they are and when.

    Raises:
        SourceError: the sidecar does not say it, or it is no table of numbers.
    """
    names = sidecar.get("Columns")
    rate, start = sidecar.get("SamplingFrequency"), sidecar.get("StartTime")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise SourceError("their sidecar names no Columns")
    if not _is_finite(rate) or not _is_finite(start) or not float(rate) > 0:  # type: ignore[arg-type]
        raise SourceError("their sidecar lacks SamplingFrequency or StartTime")
    _, rows = _rows("\t".join(names) + "\n" + text)
    columns = {name: _numbers([row[place] for row in rows]) for place, name in enumerate(names)}
    kept = {name: values for name, values in columns.items() if values is not None}
    if not kept:
        raise SourceError("they have no column of numbers")
    facts = {"sampling_hz": float(rate), "start_s": float(start)}  # type: ignore[arg-type]
    return Table(columns=kept, facts=facts), [_printable(name) for name in names if name not in kept]


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
