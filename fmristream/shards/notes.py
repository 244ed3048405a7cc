"""What people should know of a dataset before they use it or pass it on."""

from collections.abc import Mapping
from typing import Any

from fmristream.catalog.run import UNALIGNED
from fmristream.catalog.run_table import RunTable

# Where they were asked for.
ORIGINAL_HEADERS = (
    "original NIfTI headers are stored with every byte: descriptions, comments and extensions may name a person, a place "
    "or a date; read them before the dataset is shared, or convert with --header scrub"
)


def headers_of(document: Mapping[str, Any]) -> str:
    """What a generation holds of NIfTI headers: `none`, `scrub` or `keep`; releases that stored no headers recorded nothing."""
    return str(document.get("headers", {}).get("mode", "none"))


def has_original_headers(document: Mapping[str, Any]) -> bool:
    """Whether a generation holds NIfTI headers with every byte."""
    return bool(document.get("headers", {}).get("contains_original_headers"))


def subjects_by_space(runs: RunTable) -> dict[str, int]:
    """How many subjects have runs in each space."""
    return {space: runs.where("space", space).distinct("subject") for space in runs.counts("space")}


def alignment_warnings(subjects: Mapping[str, int]) -> tuple[str, ...]:
    """What to know before training on runs of so many subjects in each space (label)."""
    warnings = []
    unaligned = {space: count for space, count in subjects.items() if space in UNALIGNED and count > 1}
    if unaligned:
        shown = ", ".join(f"{space or 'unknown'} ({count} subjects)" for space, count in sorted(unaligned.items()))
        warnings.append(
            f"voxels of different subjects do not correspond: space {shown}; convert normalised derivatives, or give "
            "--space NAME if you know that all runs are in one template; training refuses to mix them"
        )
    if len(subjects) > 1:
        warnings.append(
            f"runs are in {len(subjects)} spaces ({', '.join(sorted(subjects))}); training takes one at a time"
        )
    return tuple(warnings)


def codec_of(document: Mapping[str, Any]) -> str:
    """How the frames of a generation are coded; the first releases had one codec and did not record it."""
    return str(document.get("codec", {}).get("name", document["parameters"]["codec"]))
