"""Finished runs become a version of a dataset: tables, index, and last of all the generation that makes them visible."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmristream.catalog.run import Run
from fmristream.catalog.tables import Participant, encode_participants, encode_skipped
from fmristream.errors import UsageError
from fmristream.ingest.options import Quarantined
from fmristream.ingest.pending import FinishedRun
from fmristream.ingest.tasks import SurveyedRun
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import content_digest, objects_digest
from fmristream.shards.generation import Generation, commit
from fmristream.shards.hashing import bulk_record
from fmristream.shards.index import encode_block
from fmristream.shards.parcels import ParcelSpace, parcel_document, write_parcels
from fmristream.shards.segments import Entry, SegmentWriter, kept_segments, put_table
from fmristream.shards.spaces import AnySpace, space_document, write_space
from fmristream.shards.withdrawn import is_withdrawn, names_withdrawn, without_withdrawn
from fmristream.storage import Store

# What a generation says that later ones carry on.
CARRIED = ("barrier", "bulk_digest", "codec", "pseudonyms", "withdrawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A run as it was found and as it was stored."""

    surveyed: SurveyedRun
    finished: FinishedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """What a commit adds to a dataset.

    Attributes:
        converted: the finished runs; one that has the name of a run that is there takes its place.
        parts: split of each of their subjects; empty where the dataset is not split.
        spaces: by digest; those that runs are stored in are recorded.
        parcels: by digest; those of spaces that runs are stored in are recorded.
        contents: what is stored beside the voxels, for the record.
        participants: rows of the participants table; a subject's row takes the place of one that is there.
        quarantined: inputs that were not converted.
        split: how the split was made, for the record.
        mask: how the masks were chosen, likewise.
        parameters: what of the conversion enters the content digest.
        headers: what was stored of NIfTI headers, for the record.
        codec: how frames were coded, likewise.
        pseudonyms: by which key subjects are called, likewise; None where they have their own labels.
        bulk_digest: which digest values and objects of the runs have.
    """

    converted: Sequence[Converted]
    parts: Mapping[str, str] = field(default_factory=dict)
    spaces: Mapping[str, AnySpace] = field(default_factory=dict)
    parcels: Mapping[str, ParcelSpace] = field(default_factory=dict)
    contents: Mapping[str, Any] = field(default_factory=dict)
    participants: Sequence[Participant] = ()
    quarantined: Sequence[Quarantined] = ()
    split: Mapping[str, Any]
    mask: Mapping[str, Any]
    parameters: Mapping[str, Any]
    headers: Mapping[str, Any]
    codec: Mapping[str, Any]
    pseudonyms: Mapping[str, Any] | None = None
    bulk_digest: str


def run_row(converted: Converted, *, split: str) -> Run:
    """The row of the runs table."""
    source, header, done = converted.surveyed.source, converted.surveyed.header, converted.finished
    scalars: dict[str, Any] = {name: math.nan if value is None else value for name, value in done.scalars.items()}
    return Run(
        name=source.name,
        subject=source.subject,
        session=source.session,
        task=source.task,
        acq=source.acq,
        run=source.run,
        echo=source.echo,
        space=converted.surveyed.space,
        split=split,
        group=source.group or source.subject,
        frames=header.frames,
        tr_s=converted.surveyed.tr_s,
        shape=header.shape,
        voxels=math.prod(done.arrays[0].shape[1:]),
        space_digest=done.space_digest,
        affine=converted.surveyed.affine,
        dtype=header.dtype.str if done.quantization is None else done.quantization["decoded_dtype"],
        slope=header.slope,
        inter=header.inter,
        digest=done.digest,
        object=done.object,
        objects_digest=objects_digest(done.arrays),
        outside=done.outside,
        source_bytes=done.source.size,
        source_crc=done.source.crc,
        **scalars,
    )


def commit_addition(store: Store, base: Dataset | None, addition: Addition) -> Generation:
    """Write the tables and commit the generation after `base`, or the first one.

    Raises:
        ConflictError: somebody else committed that generation first.
        UsageError: the runs have another digest than those of `base`.
        StorageError: the store failed.
    """
    if base is not None and base.bulk_digest != addition.bulk_digest:  # made meanwhile, by another release
        raise UsageError(
            f"{store.name}: its runs have {base.bulk_digest} digests, those that were converted now "
            f"{addition.bulk_digest}; run the command again to convert them with its own"
        )
    rows = sorted(
        ((run_row(one, split=addition.parts.get(one.surveyed.source.subject, "")), one) for one in addition.converted),
        key=lambda pair: pair[0].sort_key,
    )
    names = {run.name for run, _ in rows}
    kept = [] if base is None else kept_segments(base, without=names)
    identities = [run.identity for run, _ in rows] + _kept_identities(base, names)
    skipped = _skipped(base, addition, names)
    participants = _participants(base, addition)
    content = {
        **({} if base is None else carried(base.generation)),
        **bulk_record(addition.bulk_digest),
        **({} if addition.pseudonyms is None else {"pseudonyms": dict(addition.pseudonyms)}),
        "codec": dict(addition.codec),
        "content_digest": content_digest(sorted(identities), parameters=addition.parameters),
        "contents": dict(addition.contents),
        "headers": dict(addition.headers),
        "mask": dict(addition.mask),
        "parameters": dict(addition.parameters),
        "participants": optional_table(store, encode_participants(participants), len(participants)),
        "segments": [*kept, *_new_segment(store, rows, bulk_digest=addition.bulk_digest)],
        "skipped": optional_table(store, encode_skipped(skipped), len(skipped)),
        "spaces": _spaces(
            store, base, addition, used={run.space_digest for run, _ in rows} | _kept_spaces(base, names)
        ),
        "split": dict(addition.split),
    }
    return commit(
        store,
        number=1 if base is None else base.generation.number + 1,
        parent=None if base is None else base.generation_digest,
        write_id=secrets.token_hex(16),
        content=content,
    )


def carried(generation: Generation) -> dict[str, Any]:
    """What the next generation says as well."""
    return {name: generation.document[name] for name in CARRIED if name in generation.document}


def optional_table(store: Store, data: bytes, rows: int) -> Entry | None:
    """Store a table that has rows."""
    return put_table(store, data, rows) if rows else None


def _new_segment(store: Store, rows: Sequence[tuple[Run, Converted]], *, bulk_digest: str) -> list[Entry]:
    if not rows:
        return []
    with SegmentWriter(store, bulk_digest=bulk_digest) as writer:
        for run, one in rows:
            block = encode_block(np.frombuffer(one.finished.lengths, dtype="<u4"))
            writer.add(run, one.finished.arrays, block)
        return [writer.finish()]


def _kept_identities(base: Dataset | None, replaced: set[str]) -> list[tuple[str, ...]]:
    if base is None:
        return []
    pairs = zip(base.runs.column("name"), base.runs.identities(), strict=True)
    return [identity for name, identity in pairs if name not in replaced]


def _kept_spaces(base: Dataset | None, replaced: set[str]) -> set[str]:
    if base is None:
        return set()
    pairs = zip(base.runs.column("name"), base.runs.column("space_digest"), strict=True)
    return {digest for name, digest in pairs if name not in replaced}


def _spaces(store: Store, base: Dataset | None, addition: Addition, *, used: set[str]) -> dict[str, Entry]:
    present = {} if base is None else base.generation.document["spaces"]
    spaces = {
        digest: dict(present[digest]) if digest in present else _space_entry(store, addition.spaces[digest])
        for digest in used
    }
    spaces |= {digest: dict(entry) for digest, entry in present.items() if entry.get("of") in used}
    spaces |= {
        digest: _parcels_entry(store, parcels)
        for digest, parcels in addition.parcels.items()
        if parcels.of in used and digest not in spaces
    }
    return dict(sorted(spaces.items()))


def _space_entry(store: Store, space: AnySpace) -> Entry:
    files = write_space(store, space)
    return {
        **space_document(space),
        "objects": [{"bytes": file.bytes, "name": file.name, "sha256": file.digest} for file in files],
    }


def _parcels_entry(store: Store, parcels: ParcelSpace) -> Entry:
    files = write_parcels(store, parcels)
    objects = [{"bytes": file.bytes, "name": file.name, "sha256": file.digest} for file in files]
    return {**parcel_document(parcels), "objects": objects}


def _skipped(base: Dataset | None, addition: Addition, converted: set[str]) -> list[tuple[str, str]]:
    """What was left out before and is not there now, and what was left out this time."""
    now = {one.name: one.reason for one in addition.quarantined}
    before = {} if base is None else dict(base.skipped)
    rows = [(name, reason) for name, reason in {**before, **now}.items() if name not in converted]
    if base is None:
        return rows
    # A broken file of somebody who was withdrawn must not bring his label back.
    return [row for row in rows if not names_withdrawn(base.generation, " ".join(row))]


def _participants(base: Dataset | None, addition: Addition) -> list[Participant]:
    before = () if base is None else base.participants
    added = [
        row if base is None else without_withdrawn(base.generation, row)
        for row in addition.participants
        if base is None or not is_withdrawn(base.generation, str(row["subject"]))
    ]
    numeric = {name for row in before for name, value in row.items() if isinstance(value, float)}
    text = {name for row in before for name, value in row.items() if isinstance(value, str)} - {"subject"}
    for row in added:
        wrong = [name for name, value in row.items() if isinstance(value, str if name in numeric else float)]
        if wrong := [name for name in wrong if name in numeric | text]:
            raise UsageError(
                f"the participants column {wrong[0]!r} holds {'numbers' if wrong[0] in numeric else 'text'} in the dataset "
                "and something else in the source; write it alike in both"
            )
    rows = {str(row["subject"]): row for row in (*before, *added)}
    return list(rows.values())
