"""The split that a conversion was asked for, applied to the subjects that it found."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from fmristream.catalog.split import PARTS, require_no_empty_part, split_as_listed, split_by_hash, split_exactly
from fmristream.errors import SplitError
from fmristream.ingest.options import ConvertOptions
from fmristream.storage.sources import read_source_range, source_size
from fmristream.storage.urls import display_url

# Larger files are not lists of subjects.
_MAX_SPLIT_BYTES = 64 * 2**20


def split_subjects(subjects: Iterable[str], options: ConvertOptions) -> tuple[dict[str, str], dict[str, Any]]:
    """(subject -> part, how it was decided); the first is empty for `none`.

    Raises:
        SplitError: a part would be empty (for a file: one that it names), or the file does not name a subject.
    """
    wanted = set(subjects)
    if options.split == "none":
        return {}, split_record(options)
    if options.split not in ("hash", "exact"):
        listed = read_split_file(options.split)
        parts = split_as_listed(wanted, listed)
        named = set(listed.values())
        require_no_empty_part(parts, [float(part in named) for part in PARTS])
        return parts, split_record(options)
    function = split_by_hash if options.split == "hash" else split_exactly
    parts = function(wanted, ratios=options.split_ratios, seed=options.split_seed)
    require_no_empty_part(parts, options.split_ratios)
    return parts, split_record(options)


def split_record(options: ConvertOptions) -> dict[str, Any]:
    """What a generation records of how its split was made."""
    if options.split == "none":
        return {"kind": "none"}
    if options.split not in ("hash", "exact"):
        return {"kind": "file"}
    return {"kind": options.split, "ratios": list(options.split_ratios), "seed": options.split_seed}


def extended_split(
    subjects: Iterable[str], present: Mapping[str, str], options: ConvertOptions
) -> tuple[dict[str, str], dict[str, Any]]:
    """(subject -> part, how it was decided) for subjects that join others; who is there stays where he is.

    The ranks of an `exact` split would move by new subjects: these are placed by the threshold of their hash instead.
    """
    if not present:
        return split_subjects(subjects, options)
    new = set(subjects) - set(present)
    if options.split == "none":
        parts = {}
    elif options.split in ("hash", "exact"):
        parts = split_by_hash(new, ratios=options.split_ratios, seed=options.split_seed)
    else:
        parts = split_as_listed(new, read_split_file(options.split))
    return {**present, **parts}, split_record(options)


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
