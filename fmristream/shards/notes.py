"""What people should know of a dataset before they use it or pass it on."""

from collections.abc import Mapping, Sequence
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


def copy_warnings(runs: RunTable) -> tuple[str, ...]:
    """Which runs hold the very data of another run, and whether these are said to be two people's."""
    names, subjects = runs.column("name"), runs.column("subject")
    groups = runs.alike("digest")
    between = [group for group in groups if len({subjects[row] for row in group}) > 1]
    within = [group for group in groups if group not in between]
    warnings = []
    if between:
        warnings.append(
            f"{sum(map(len, between))} runs hold the same data under different subjects, so that one person may stand in two "
            f"parts of a split: {_shown(between, names)}; find out whose they are and withdraw the other subject"
        )
    if within:
        warnings.append(
            f"{sum(map(len, within))} runs of the same subjects hold the same data and count twice: {_shown(within, names)}; "
            "was a file of the source renamed?"
        )
    return tuple(warnings)


def _shown(groups: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    shown = "; ".join(" = ".join(names[row] for row in group) for group in groups[:3])
    return f"{shown} and {len(groups) - 3} more" if len(groups) > 3 else shown


def codec_of(document: Mapping[str, Any]) -> str:
    """How the frames of a generation are coded; the first releases had one codec and did not record it."""
    return str(document.get("codec", {}).get("name", document["parameters"]["codec"]))
