"""The split that a conversion was asked for, applied to the subjects that it found."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from fmristream.catalog.split import PARTS, require_no_empty_part, split_as_listed, split_by_hash, split_exactly
from fmristream.errors import SplitError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources import SourceRun
from fmristream.storage.sources import read_source_range, source_size
from fmristream.storage.urls import display_url

# Larger files are not lists of subjects.
_MAX_SPLIT_BYTES = 64 * 2**20


def split_subjects(runs: Iterable[SourceRun], options: ConvertOptions) -> tuple[dict[str, str], dict[str, Any]]:
    """(subject -> part, how it was decided); the first is empty for `none`. A group (family, site) is never divided.

    Raises:
        SplitError: a part would be empty (for a file: one that it names), the file does not name a subject, or divides a
            group.
    """
    runs = list(runs)
    groups = {run.subject: run.group or run.subject for run in runs}
    kind, listed = _wanted(runs, options)
    if kind == "none":
        return {}, split_record(kind, options)
    if listed is not None:
        parts = split_as_listed(groups, listed)
        _require_whole_groups(parts, groups)
        named = set(listed.values())
        require_no_empty_part(parts, [float(part in named) for part in PARTS])
        return parts, split_record(kind, options)
    function = split_by_hash if kind == "hash" else split_exactly
    of_group = function(set(groups.values()), ratios=options.split_ratios, seed=options.split_seed)
    parts = {subject: of_group[group] for subject, group in groups.items()}
    require_no_empty_part(parts, options.split_ratios)
    return parts, split_record(kind, options)


def extended_split(
    runs: Iterable[SourceRun], present: Iterable[tuple[str, str, str]], options: ConvertOptions
) -> tuple[dict[str, str], dict[str, Any]]:
    """(subject -> part, how it was decided) for subjects that join others; who is there stays where he is.

    A new subject of a group that is there goes to its part. The ranks of an `exact` split would move by new subjects:
    these are placed by the threshold of their hash instead.

    Args:
        runs: that join.
        present: (subject, group, part) of those that are there.
        options: of the conversion.
    """
    runs, present = list(runs), list(present)
    if not present:
        return split_subjects(runs, options)
    kind, listed = _wanted(runs, options)
    if kind == "none":
        return {}, split_record(kind, options)
    here = {subject: part for subject, _, part in present}
    groups = {run.subject: run.group or run.subject for run in runs if run.subject not in here}
    parts_of_groups = {group: part for _, group, part in present}
    if listed is not None:
        parts = split_as_listed(groups, listed)
    else:
        unknown = set(groups.values()) - set(parts_of_groups)
        placed = parts_of_groups | split_by_hash(unknown, ratios=options.split_ratios, seed=options.split_seed)
        parts = {subject: placed[group] for subject, group in groups.items()}
    groups |= {subject: group for subject, group, _ in present}
    _require_whole_groups({**here, **parts}, groups)
    return {**here, **parts}, split_record(kind, options)


def split_record(kind: str, options: ConvertOptions) -> dict[str, Any]:
    """What a generation records of how its split was made."""
    if kind == "none":
        return {"kind": "none"}
    if kind not in ("hash", "exact"):
        return {"kind": "file"}
    return {"kind": kind, "ratios": list(options.split_ratios), "seed": options.split_seed}


def split_kind(runs: Iterable[SourceRun], options: ConvertOptions) -> str:
    """How the split of these runs is made: `none`, `hash`, `exact`, or `file` where somebody wrote it down."""
    if options.split == "auto":
        return "file" if any(run.split for run in runs) else "hash"
    return options.split if options.split in ("none", "hash", "exact") else "file"


def _wanted(runs: list[SourceRun], options: ConvertOptions) -> tuple[str, dict[str, str] | None]:
    """The kind of split, and the parts where somebody wrote them down: in a file, or in the table of runs."""
    if options.split == "auto":
        listed = {run.subject: run.split for run in runs if run.split}
        return ("table", listed) if listed else ("hash", None)
    if options.split in ("none", "hash", "exact"):
        return options.split, None
    return "file", read_split_file(options.split)


def _require_whole_groups(parts: Mapping[str, str], groups: Mapping[str, str]) -> None:
    found: dict[str, str] = {}
    for subject, part in sorted(parts.items()):
        if found.setdefault(groups[subject], part) != part:
            raise SplitError(
                f"the given split has group {groups[subject]} in {found[groups[subject]]} and in {part}; put its subjects "
                "in one part, or leave --group-by out"
            )


def read_split_file(url: str) -> dict[str, str]:
    """Subject -> part from a CSV or TSV with the columns `subject` (or `participant_id`) and `split`.

    Raises:
        SplitError: the columns are not there, or a subject has two parts.
    """
    size = source_size(url)
    if size > _MAX_SPLIT_BYTES:
        raise SplitError(
            f"{display_url(url)}: {size} bytes are too many for a list of subjects; give a CSV or TSV file"
        )
    text = read_source_range(url, 0, size).decode("utf-8-sig")
    separator = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.DictReader(io.StringIO(text), delimiter=separator)
    columns = reader.fieldnames or []
    label = next((name for name in ("subject", "participant_id") if name in columns), None)
    if label is None or "split" not in columns:
        raise SplitError(
            f"{display_url(url)}: has the columns {', '.join(columns) or '(none)'}; expected subject and split, "
            "separated by commas or tabs"
        )
    parts: dict[str, str] = {}
    for row in reader:
        subject = (row[label] or "").strip().removeprefix("sub-")
        part = (row["split"] or "").strip()
        if parts.setdefault(subject, part) != part:
            raise SplitError(
                f"{display_url(url)}: subject {subject} is in {parts[subject]} and in {part}; keep one line"
            )
    return parts
