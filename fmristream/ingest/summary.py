"""What a conversion amounts to, in numbers: afterwards from the tables, beforehand as an estimate."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from fmristream.catalog.run import UNALIGNED, Run
from fmristream.catalog.tables import Participant
from fmristream.ingest.commit import Converted
from fmristream.ingest.options import ConvertOptions, ConvertReport, MaskChoice, Quarantined
from fmristream.ingest.plan import Survey
from fmristream.ingest.sources import Listing
from fmristream.ingest.splitting import split_subjects
from fmristream.shards.codec import padded_length

# For a dry run, where masks are not known yet: the MNI brain's share of the 2 mm grid, and what lossless coding leaves
# of BOLD (measured on int16 and float32 runs with 1.6 % temporal SD).
TYPICAL_MASK_SHARE = 0.26
TYPICAL_RATIO = {"i": 0.66, "u": 0.66, "f": 0.72}

# zarr.json x 4, shard, reference, moments; stats and pending record beside them. Folders: the group, three arrays, their c/.
FILES_PER_RUN = 9
FOLDERS_PER_RUN = 9


def describe_runs(url: str, kind: str, runs: Sequence[Run], parts: dict[str, str], stored_bytes: int) -> ConvertReport:
    """The report of a dataset that holds these runs."""
    return ConvertReport(
        url=url,
        source_kind=kind,
        runs=len(runs),
        subjects=len({run.subject for run in runs}),
        frames=sum(run.frames for run in runs),
        splits=dict(Counter(parts.values())),
        spaces=tuple(sorted({run.space for run in runs})),
        stored_bytes=stored_bytes,
        source_bytes=sum(run.source_bytes for run in runs),
        warnings=alignment_warnings((run.space, run.subject) for run in runs),
    )


def estimate(url: str, listing: Listing, found: Survey, options: ConvertOptions) -> ConvertReport:
    """What a conversion would do, from headers alone."""
    parts, _ = split_subjects((run.source for run in found.runs), options)
    share = 1.0 if MaskChoice.parse(options.mask).kind == "none" else TYPICAL_MASK_SHARE
    stored = 0.0
    for run in found.runs:
        voxels = padded_length(round(share * float(np.prod(run.header.shape))))
        stored += voxels * run.header.frames * run.header.dtype.itemsize * TYPICAL_RATIO[run.header.dtype.kind]
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
        objects=FILES_PER_RUN * len(found.runs) + 8,
        folders=FOLDERS_PER_RUN * len(found.runs) + 8,
        quarantined=tuple(found.quarantined),
        not_chosen=not_chosen(listing),
        warnings=(
            *listing.notes,
            *found.warnings,
            *alignment_warnings((run.space, run.source.subject) for run in found.runs),
        ),
    )


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


def stored_bytes(converted: Iterable[Converted]) -> int:
    """Size of all objects of these runs."""
    return sum(file.bytes for one in converted for array in one.finished.arrays for file in array.files)


def alignment_warnings(runs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """What to know before training on runs given as (space label, subject)."""
    subjects = defaultdict(set)
    for space, subject in runs:
        subjects[space].add(subject)
    warnings = []
    unaligned = {space: len(who) for space, who in subjects.items() if space in UNALIGNED and len(who) > 1}
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
