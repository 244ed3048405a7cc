"""Finished runs become a dataset: tables, index, and last of all the generation that makes them visible."""

import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fmristream.catalog.run import Run
from fmristream.catalog.tables import (
    Participant,
    encode_arrays,
    encode_participants,
    encode_runs,
    encode_skipped,
)
from fmristream.errors import ObjectExistsError
from fmristream.ingest.options import Quarantined
from fmristream.ingest.pending import FinishedRun
from fmristream.ingest.tasks import SurveyedRun
from fmristream.shards.digest import content_digest, sha256
from fmristream.shards.generation import Generation, commit
from fmristream.shards.index import encode_block
from fmristream.shards.spaces import Space, space_document, write_space
from fmristream.storage import Store

# What of a conversion changes samples, and so the content digest.
PARAMETERS = {"codec": "lossless", "layout": "voxels"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A run as it was found and as it was stored."""

    surveyed: SurveyedRun
    finished: FinishedRun


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
        voxels=done.arrays[0].shape[-1],
        space_digest=done.space_digest,
        affine=converted.surveyed.affine,
        dtype=header.dtype.str,
        slope=header.slope,
        inter=header.inter,
        digest=done.digest,
        object=done.object,
        outside=done.outside,
        source_bytes=done.source.size,
        source_crc=done.source.crc,
        **scalars,
    )


def commit_dataset(
    store: Store,
    converted: Sequence[Converted],
    *,
    parts: Mapping[str, str],
    spaces: Mapping[str, Space],
    participants: Sequence[Participant],
    quarantined: Sequence[Quarantined],
    split: Mapping[str, Any],
    mask: Mapping[str, Any],
) -> tuple[Generation, tuple[Run, ...]]:
    """Write the tables and commit generation 1.

    Args:
        store: the target, which holds no generation yet.
        converted: every finished run.
        parts: split of each subject; empty where the dataset is not split.
        spaces: by digest; those that runs are stored in are recorded.
        participants: rows of the subjects that were converted.
        quarantined: what was not.
        split: how the split was made, for the record.
        mask: how the masks were chosen, likewise.
    """
    ordered = sorted(
        ((run_row(one, split=parts.get(one.surveyed.source.subject, "")), one) for one in converted),
        key=lambda pair: pair[0].sort_key,
    )
    runs = tuple(run for run, _ in ordered)
    index, arrays = _index_and_arrays([one.finished for _, one in ordered])
    content = {
        "content_digest": content_digest(runs, parameters=PARAMETERS),
        "mask": dict(mask),
        "parameters": PARAMETERS,
        "participants": _put_table(store, encode_participants(participants), len(participants)),
        "segments": [
            {
                "arrays": _put_table(store, arrays, len(runs)),
                "index": _put(store, f"index/{sha256(index)}", index),
                "runs": _put_table(store, encode_runs(runs), len(runs)),
            }
        ],
        "skipped": _put_table(store, encode_skipped((q.name, q.reason) for q in quarantined), len(quarantined)),
        "spaces": {
            digest: {
                **space_document(spaces[digest]),
                "objects": [
                    {"bytes": file.bytes, "name": file.name, "sha256": file.sha256}
                    for file in write_space(store, spaces[digest])
                ],
            }
            for digest in sorted({run.space_digest for run in runs})
        },
        "split": dict(split),
    }
    return commit(store, number=1, parent=None, write_id=secrets.token_hex(16), content=content), runs


def _index_and_arrays(finished: Sequence[FinishedRun]) -> tuple[bytes, bytes]:
    blocks = []
    rows = []
    offset = 0
    for row, run in enumerate(finished):
        block = encode_block(np.frombuffer(run.lengths, dtype="<u4").tolist())
        for array in run.arrays:
            located = replace(array, index_offset=offset, index_bytes=len(block)) if array.frames_per_shard else array
            rows.append((row, located))
        blocks.append(block)
        offset += len(block)
    return b"".join(blocks), encode_arrays(rows)


def _put_table(store: Store, data: bytes, rows: int) -> dict[str, Any] | None:
    if rows == 0:
        return None
    return {**_put(store, f"tables/{sha256(data)}.parquet", data), "rows": rows}


def _put(store: Store, key: str, data: bytes) -> dict[str, Any]:
    with suppress(ObjectExistsError):  # named by its content: an interrupted commit wrote the same
        store.put_new(key, data)
    return {"bytes": len(data), "key": key, "sha256": sha256(data)}
