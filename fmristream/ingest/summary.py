"""What a conversion amounts to, in numbers: afterwards from the tables, beforehand as an estimate."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fmristream.catalog.tables import Participant
from fmristream.ingest.objects import count_objects
from fmristream.ingest.options import ConvertOptions, ConvertReport, Quarantined
from fmristream.ingest.plan import Survey
from fmristream.ingest.sources import Listing
from fmristream.ingest.splitting import split_subjects
from fmristream.shards.codec import padded_length
from fmristream.shards.dataset import Dataset
from fmristream.shards.notes import (
    ORIGINAL_HEADERS,
    alignment_warnings,
    copy_warnings,
    has_original_headers,
    headers_of,
    subjects_by_space,
)
from fmristream.signal.quantize import LOSSY_CODECS

# For a dry run, where masks are not known yet: the MNI brain's share of the 2 mm grid, and what lossless coding leaves
# of BOLD (measured on int16 and float32 runs with 1.6 % temporal SD).
TYPICAL_MASK_SHARE = 0.26
TYPICAL_RATIO = {"i": 0.66, "u": 0.66, "f": 0.72}
# Bytes a voxel of the lossy codecs, likewise.
TYPICAL_CODE_BYTES = {"int8": 1.0, "int16": 1.4}


def describe_dataset(dataset: Dataset, kind: str) -> ConvertReport:
    """The report of a dataset, from its tables."""
    runs, document = dataset.runs, dataset.generation.document
    parts = Counter(part for _, part in runs.counts("subject", "split") if part)
    headers = document.get("headers", {})
    return ConvertReport(
        url=dataset.url,
        source_kind=kind,
        content_digest=dataset.content_digest,
        generation_digest=dataset.generation_digest,
        runs=len(runs),
        subjects=runs.distinct("subject"),
        frames=int(runs.numbers("frames").sum()),
        splits=dict(parts),
        spaces=tuple(sorted(runs.counts("space"))),
        stored_bytes=sum(table.stored()[0] for table in dataset.array_tables),
        source_bytes=int(runs.numbers("source_bytes").sum()),
        headers=headers_of(document),
        headers_removed=dict(headers.get("removed", {})),
        warnings=(
            *alignment_warnings(subjects_by_space(runs)),
            *copy_warnings(runs),
            *([ORIGINAL_HEADERS] if has_original_headers(document) else []),
        ),
    )


def estimate(url: str, listing: Listing, found: Survey, options: ConvertOptions) -> ConvertReport:
    """What a conversion would do, from headers alone."""
    parts, _ = split_subjects((run.source for run in found.runs), options)
    share = 1.0 if options.mask_choice.kind == "none" else TYPICAL_MASK_SHARE
    objects = count_objects(
        listing,
        found.runs,
        options,
        is_some_skipped=bool(found.quarantined),
        mask_share=share,
    )
    stored = 0.0
    for run in found.runs:
        stored_share = 1.0 if run.header.models else share
        voxels = padded_length(round(stored_share * float(np.prod(run.header.shape))))
        stored += voxels * run.header.frames * _voxel_bytes(run.header.dtype, options)
    return ConvertReport(
        url=url,
        source_kind=listing.kind,
        dry_run=True,
        runs=len(found.runs),
        subjects=len({run.source.subject for run in found.runs}),
        frames=sum(run.header.frames for run in found.runs),
        splits=dict(Counter(parts.values())),
        spaces=tuple(sorted({run.space for run in found.runs})),
        stored_bytes=round(stored),
        source_bytes=sum(run.source_bytes for run in found.runs),
        objects=objects.files,
        folders=objects.folders,
        quarantined=tuple(found.quarantined),
        not_chosen=not_chosen(listing),
        headers=headers_mode(options),
        warnings=(
            *listing.notes,
            *found.warnings,
            *alignment_warnings(Counter(space for space, _ in {(run.space, run.source.subject) for run in found.runs})),
        ),
    )


def _voxel_bytes(dtype: "np.dtype[Any]", options: ConvertOptions) -> float:
    """About what a value takes."""
    lossy = LOSSY_CODECS.get(options.codec)
    if lossy is not None and lossy.takes(dtype):
        return TYPICAL_CODE_BYTES[options.codec]
    return float(dtype.itemsize) * (1.0 if options.codec == "raw" else TYPICAL_RATIO[dtype.kind])


def codec_record(
    options: ConvertOptions, measured: Iterable[Mapping[str, Any] | None], before: Mapping[str, Any]
) -> dict[str, Any]:
    """What a generation records of its codec: the name, and the bound and largest errors of lossy runs.

    Bounds hold for fewer runs, too: what is withdrawn or replaced later changes nothing.

    Args:
        options: of the conversion.
        measured: `quantization` of each run that comes in.
        before: the generation that they are added to.
    """
    lossy = [one for one in measured if one is not None]
    runs = [before["codec"]] if "bound_sd" in before.get("codec", {}) else []
    if not lossy and not runs:
        return {"name": options.codec}
    return {
        "name": options.codec,
        **{name: max(one[name] for one in (*lossy, *runs)) for name in ("bound_sd", "max_error_sd", "rms_error_sd")},
    }


def headers_mode(options: ConvertOptions) -> str:
    """What will be stored of NIfTI headers: nothing, what is left of them, or all."""
    return "none" if options.layout == "voxels" else options.header


def headers_record(
    options: ConvertOptions, removed: Iterable[Iterable[str]], before: Mapping[str, Any]
) -> dict[str, Any]:
    """What a generation records of headers: how they were treated, and in how many runs a field held something.

    Args:
        options: of the conversion.
        removed: names of the fields of each run that comes in.
        before: the generation that they are added to.
    """
    mode = headers_mode(options)
    counts = Counter(before.get("headers", {}).get("removed", {}))
    counts.update(name for fields in removed for name in fields)
    return {"contains_original_headers": mode == "keep", "mode": mode, "removed": dict(sorted(counts.items()))}


def participant_warnings(participants: Sequence[Participant], subjects: set[str]) -> tuple[str, ...]:
    """What will be missing when a column of the participants table is a target."""
    listed = {str(row["subject"]) for row in participants}
    lacking = sorted(subjects - listed)
    if not listed or not lacking:
        return ()
    return (
        f"{len(lacking)} of {len(subjects)} subjects have no row in the participants table ({', '.join(lacking[:3])}"
        f"{', ...' if len(lacking) > 3 else ''}), and {len(listed - subjects)} of its rows match no subject; "
        "compare the labels",
    )


def not_chosen(listing: Listing) -> tuple[Quarantined, ...]:
    """Files that are left out on purpose, and which choice left them out."""
    return tuple(Quarantined(name=file.key, reason=file.reason) for file in listing.skipped if file.by_choice)
