"""Windows of a dataset as tar shards that the plain webdataset package reads; see docs/webdataset.md.

The same dataset and options give the same bytes, whoever writes them and in however many threads. So shards need no
lock: each is created exclusively, who finds it there compares it with his own, and `index.json`, written last, says
that all are there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fmristream.errors import CorruptDataError, ObjectExistsError, ObjectMissingError, StorageError, UsageError
from fmristream.ingest.target import require_exclusive
from fmristream.report.objects import PIECE_BYTES
from fmristream.report.tar_bytes import end_of_tar, npy_header
from fmristream.report.tar_options import TarOptions
from fmristream.report.tar_plan import FORMAT, VERSION, TarPart, TarPlan, TarShard, plan_tars
from fmristream.report.tar_samples import SampleWriter
from fmristream.report.threads import Counter, in_threads
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import canonical_json, sha256
from fmristream.shards.generation import FOLDER, HINT
from fmristream.storage import Store, open_store
from fmristream.storage.urls import local_path, scheme_of

INDEX = "index.json"
PENDING = "pending"
_CLAIM = f"{PENDING}/plan.json"
_SCRATCH = "tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A finished object: what the index and a note of an unfinished conversion say of it."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """One folder of shards."""

    name: str
    runs: int  # that hold a window
    subjects: int
    samples: int
    shards: int
    bytes: int  # of its tars; about, in a dry run


@dataclass(frozen=True, slots=True, kw_only=True)
class TarReport:
    """What a conversion to tar shards did, or with `dry_run` would do."""

    url: str
    parts: tuple[PartReport, ...]
    content_digest: str  # of the dataset
    dry_run: bool = False
    already_there: bool = False
    resumed: int = 0  # shards that an earlier, interrupted conversion had finished
    warnings: tuple[str, ...] = ()


def write_webdataset(
    dataset: Dataset,
    url: str,
    *,
    options: TarOptions | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TarReport:
    """Write every window of a dataset into tar shards, in shuffled order.

    Interrupted, it goes on when it is called again: shards that are finished stay.

    Args:
        dataset: where the windows come from.
        url: a new folder, `s3://bucket/prefix` or `memory://name`.
        options: see TarOptions.
        dry_run: say what would be written.
        progress: called with (samples done, samples in all).

    Raises:
        UsageError: an option does not fit the dataset, or the target holds something else.
        SpaceError: the runs share no space.
        CorruptDataError: stored bytes have changed; finished shards stay.
        StorageError: the dataset or the target failed.
    """
    plan = plan_tars(dataset, options or TarOptions())
    report = write_planned(plan, open_store(url), dry_run=dry_run, progress=progress)
    return replace(report, url=url)


def write_planned(
    plan: TarPlan, store: Store, *, dry_run: bool = False, progress: Callable[[int, int], None] | None = None
) -> TarReport:
    """The same into an open store."""
    index = _read_index(store, plan)
    if dry_run or index is not None:
        if index is not None and not dry_run:
            _clear(store)  # who finished it may have been killed before this
        return _report(store, plan, index, dry_run=dry_run)
    _claim(store, plan)
    try:
        index = _read_index(store, plan)
    except UsageError:
        store.delete(_CLAIM)
        raise
    if index is not None:  # finished by another writer since we looked
        _clear(store)
        return _report(store, plan, index)
    masks = {part.name: _put_mask(store, part) for part in plan.parts}
    try:
        written, resumed = _write_shards(store, plan, progress)
    except StorageError:
        index = _read_index(store, plan)
        if index is None:
            raise
        return _report(store, plan, index)  # another writer finished the same, and cleared away what both had begun
    index = _index(plan, masks, written)
    with suppress(ObjectExistsError):
        store.put_new(INDEX, _text(index))
    _read_index(store, plan)  # who was first wrote the same, or this raises
    _clear(store)
    return _report(store, plan, index, resumed=resumed)


def require_target(store: Store) -> None:
    """Raise unless the target is new, or holds tar shards, finished or not: what is asked before hours of other work.

    Raises:
        UsageError: it holds something else.
        StorageError: it cannot be written, or overwrites what is there.
    """
    if _read(store, INDEX) is None and _read(store, _CLAIM) is None:
        _refuse_other_things(store)
        require_exclusive(store)


def _claim(store: Store, plan: TarPlan) -> None:
    """Mark the target as ours, or find that it is: by a writer of the very same shards, killed or at work."""
    claim = canonical_json({"format": FORMAT, "plan": plan.digest})
    present = _read(store, _CLAIM)
    if present is None:
        require_target(store)
        try:
            store.put_new(_CLAIM, claim)
        except ObjectExistsError:
            present = _read(store, _CLAIM)
    if present not in (None, claim):
        raise UsageError(
            f"{store.name}: holds unfinished shards of another dataset, or with other options; repeat that command to "
            "finish them, or choose a new folder"
        )


def _refuse_other_things(store: Store) -> None:
    others = [f"{PENDING}/"] if store.list(PENDING) else []  # of a conversion of NIfTI files, perhaps
    if scheme_of(store.name) == "file" and os.path.isdir(local_path(store.name)):
        others = sorted(set(os.listdir(local_path(store.name))) - {_SCRATCH})
    if others or _read(store, HINT) is not None or store.list(FOLDER):
        shown = ", ".join(others[:3]) or "a dataset"
        raise UsageError(f"{store.name}: holds other things already ({shown}); choose a new folder for tar shards")


def _read_index(store: Store, plan: TarPlan) -> dict[str, Any] | None:
    """The index of finished shards that are those of the plan; None where nothing is finished.

    Raises:
        UsageError: there are finished shards of something else.
    """
    data = _read(store, INDEX)
    if data is None:
        return None
    try:
        index = dict(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        index = {}
    if index.get("format") != FORMAT or index.get("plan") != plan.digest:
        raise UsageError(
            f"{store.name}: {INDEX} is there and not of this dataset with these options; choose a new folder for tar shards"
        )
    return index


def _write_shards(
    store: Store, plan: TarPlan, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Written], int]:
    """(what every shard is, how many were there): a few are in work at a time, each sample by sample."""
    total = sum(part.samples for part in plan.parts)
    counter = Counter(None if progress is None else lambda done: progress(done, total))
    shards = plan.shards
    noted = set(store.list(PENDING))
    done: dict[str, Written] = {}
    resumed = 0
    write = partial(_finished_or_new, store, plan, noted, counter)
    for shard, (written, was_there) in zip(
        shards, in_threads(write, shards, counter, threads=plan.options.workers), strict=True
    ):
        done[shard.key] = written
        resumed += was_there
    return done, resumed


def _finished_or_new(
    store: Store, plan: TarPlan, noted: set[str], counter: Counter, shard: TarShard
) -> tuple[Written, bool]:
    """A shard, written unless it is noted as finished and there; whether it was."""
    note = f"{PENDING}/{shard.part}-{shard.number:06d}.json"
    if note in noted:
        written = Written(**json.loads(store.read(note)))
        if _size(store, shard.key) == written.bytes:
            counter.add(shard.samples)
            return written, True
        store.delete(note)  # of a shard that is gone or cut short
    written = _write_or_compare(store, plan, counter, shard)
    with suppress(ObjectExistsError):  # another writer of the same shard
        store.put_new(note, canonical_json({"bytes": written.bytes, "sha256": written.sha256}))
    return written, False


def _write_or_compare(store: Store, plan: TarPlan, counter: Counter, shard: TarShard) -> Written:
    if _size(store, shard.key) is None:
        try:
            return _write(store, plan, counter, shard)
        except ObjectExistsError:  # another writer of the same shard was faster
            pass
    # Whole, because nothing partial gets a name; ours, if it is what we would write.
    expected = _sum(_pieces(plan, counter, shard))
    if _sum(_read_pieces(store, shard.key)) != expected:
        raise CorruptDataError(
            f"{store.name}/{shard.key}: is there and not what this dataset and these options give; remove it, or choose a "
            "new folder"
        )
    return expected


def _write(store: Store, plan: TarPlan, counter: Counter, shard: TarShard) -> Written:
    with store.stream_new(shard.key) as new:

        def passed_on() -> Iterator[bytes | memoryview]:
            for piece in _pieces(plan, counter, shard):
                new.write(piece)
                yield piece

        written = _sum(passed_on())
        new.commit()
    return written


def _pieces(plan: TarPlan, counter: Counter, shard: TarShard) -> Iterator[bytes | memoryview]:
    """The bytes of a shard; a window of it is in memory at a time."""
    part = plan.part(shard.part)
    samples = SampleWriter(plan, part)
    size = 0
    for position, number in enumerate(part.windows(shard), start=shard.first):
        for piece in samples.members(position, number):
            size += len(piece)
            yield piece
        counter.add(1)
    yield end_of_tar(size)


def _read_pieces(store: Store, key: str) -> Iterator[bytes]:
    size = store.size(key)
    for start in range(0, size, PIECE_BYTES):
        yield store.read_range(key, start, min(start + PIECE_BYTES, size))


def _sum(pieces: Iterator[bytes] | Iterator[bytes | memoryview]) -> Written:
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return Written(bytes=size, sha256=digest.hexdigest())


def _put_mask(store: Store, part: TarPart) -> dict[str, Any]:
    """Store which voxels of the native grid packed arrays hold, in C order; what the index says of it."""
    clips = part.clips
    mask = np.ascontiguousarray(clips.dataset.space(clips.runs[0]).mask)
    data = npy_header(mask.dtype, mask.shape) + mask.tobytes()
    key = f"{part.name}/mask.npy"
    try:
        store.put_new(key, data)
    except ObjectExistsError:
        if store.read(key) != data:
            raise CorruptDataError(
                f"{store.name}/{key}: is there and not the mask of these runs; remove it, or choose a new folder"
            ) from None
    return {"bytes": len(data), "key": key, "sha256": sha256(data)}


def _index(plan: TarPlan, masks: dict[str, dict[str, Any]], written: dict[str, Written]) -> dict[str, Any]:
    parts = {}
    for part in plan.parts:
        space = plan.dataset.space(part.clips.runs[0])
        parts[part.name] = {
            "affine": [float(number) for number in space.grid.affine],
            "mask": masks[part.name],
            "samples": part.samples,
            "shape": list(space.grid.shape),
            "shards": [
                {
                    "bytes": written[shard.key].bytes,
                    "key": shard.key,
                    "samples": shard.samples,
                    "sha256": written[shard.key].sha256,
                }
                for shard in part.shards
            ],
            "voxels": space.voxels,
        }
    return {
        "format": FORMAT,
        "options": plan.described,
        "parts": parts,
        "plan": plan.digest,
        "source": {"content": plan.dataset.content_digest, "generation": plan.dataset.generation_digest},
        "version": VERSION,
    }


def _text(index: dict[str, Any]) -> bytes:
    return (json.dumps(index, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def _report(
    store: Store, plan: TarPlan, index: dict[str, Any] | None, *, dry_run: bool = False, resumed: int | None = None
) -> TarReport:
    """What is there, or would be."""
    return TarReport(
        url=store.name,
        parts=tuple(_part_report(part, index) for part in plan.parts),
        content_digest=plan.dataset.content_digest,
        dry_run=dry_run,
        already_there=index is not None and resumed is None,
        resumed=resumed or 0,
        warnings=plan.warnings,
    )


def _part_report(part: TarPart, index: dict[str, Any] | None) -> PartReport:
    runs = part.clips.runs
    used = runs.select(runs.numbers("frames") >= part.clips.window)
    shards = [] if index is None else index["parts"][part.name]["shards"]
    return PartReport(
        name=part.name,
        runs=len(used),
        subjects=len(used.counts("subject")),
        samples=part.samples,
        shards=len(list(part.shards)),
        bytes=sum(shard["bytes"] for shard in shards) if shards else part.samples * part.sample_bytes,
    )


def _clear(store: Store) -> None:
    """Remove notes and what killed writers left: the index says all."""
    # The last one is not there: a local store removes the folder with it when that is empty.
    for key in (*store.list(PENDING), *store.list(_SCRATCH), f"{_SCRATCH}/none"):
        store.delete(key)


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except ObjectMissingError:
        return None


def _size(store: Store, key: str) -> int | None:
    try:
        return store.size(key)
    except ObjectMissingError:
        return None
