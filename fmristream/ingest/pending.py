"""Finished runs of an unfinished conversion: how a killed one goes on where it was.

A record is named by a keyed hash of the source's path, size and checksum and of all that was decided about the run: it
is found again by whoever asks for the same of the same file, and can be made only by who has the file's checksum. It
holds object names and numbers, no labels and no paths.
"""

import base64
import hashlib
import hmac
import json
import zlib
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import StoredArray, StoredFile
from fmristream.errors import ObjectExistsError, ObjectMissingError
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.shards import FORMAT_VERSION
from fmristream.shards.digest import canonical_json, sha256_json
from fmristream.shards.run_writer import WrittenRun
from fmristream.signal.measure import Statistics
from fmristream.storage import Store

FOLDER = "pending"

_MASKS = "masks"
SHARDS = "shards"
# Records that save time only: every run's record says all that its rows need.
_AIDS = (f"{FOLDER}/{_MASKS}", f"{FOLDER}/{SHARDS}")
# What decides the bytes of every run.
_PLAN = {"codec": "lossless", "format": FORMAT_VERSION, "layout": "voxels"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A converted run as its record and its table row need it; statistics without their vectors."""

    object: str
    digest: str
    space_digest: str
    scalars: Mapping[str, Any]
    outside: int
    arrays: tuple[StoredArray, ...]
    lengths: bytes  # what its index block holds, little-endian u32: a driver holds those of all runs
    source: Fingerprint
    removed: tuple[str, ...] = ()  # header fields that held something and were not stored
    notes: tuple[str, ...] = ()  # what people should know of what was stored beside it; no names of files or people
    quantization: Mapping[str, Any] | None = None  # bound and measured error, where values were not stored exactly
    record: str = ""  # key of its record, "" before there is one

    @classmethod
    def of(
        cls,
        written: WrittenRun,
        *,
        space_digest: str,
        outside: int,
        source: Fingerprint,
        notes: tuple[str, ...] = (),
    ) -> "FinishedRun":
        """What stays of a run that was written just now."""
        return cls(
            object=written.object,
            digest=written.digest,
            space_digest=space_digest,
            scalars=_scalars(written.statistics),
            outside=outside,
            arrays=written.arrays,
            lengths=np.asarray(written.lengths, dtype="<u4").tobytes(),
            source=source,
            removed=written.removed,
            notes=notes,
            quantization=written.quantization,
        )


def record_key(source_key: str, source: Fingerprint, *, decided: Mapping[str, Any]) -> str:
    """Object name of the record of a source file with this content.

    Args:
        source_key: path of the file below the source's root.
        source: its size and checksum.
        decided: what the plan says about this run and the file does not; JSON-able.
    """
    plan = sha256_json(_PLAN)
    message = canonical_json([source_key, source.size, source.crc, dict(decided)])
    return f"{FOLDER}/{plan[:16]}/{hmac.new(bytes.fromhex(plan), message, hashlib.sha256).hexdigest()}.json"


def save(store: Store, key: str, run: FinishedRun, *, made_after: int, barrier: int) -> FinishedRun:
    """Record a finished run; returns the one that stands: the first, where two tasks did the same run.

    A record that is of no use (damaged, of objects that are gone, from before the barrier) is replaced.

    Args:
        store: the target.
        key: from `record_key`.
        run: what to record.
        made_after: number of the newest generation when its conversion began.
        barrier: see `load`.
    """
    run = replace(run, record=key)
    body = {**asdict(run), "made_after": made_after}
    body["lengths"] = base64.b64encode(run.lengths).decode("ascii")
    data = _checked(body)
    try:
        store.put_new(key, data)
    except ObjectExistsError:
        if (standing := load(store, key, barrier=barrier)) is not None:
            return standing
        store.delete(key)
        with suppress(ObjectExistsError):  # somebody converts the same at this moment: theirs is as good
            store.put_new(key, data)
    return run


def load(store: Store, key: str, *, barrier: int) -> FinishedRun | None:
    """The finished run of a record, if it is there, undamaged, and every object that it names has its size.

    A record from before `barrier`, the newest generation at which unused objects were removed, is of no use: what it
    names may be removed at this moment.
    """
    body = read_record(store, key)
    if body is None or body["made_after"] < barrier:
        return None
    arrays = tuple(_array(array) for array in body["arrays"])
    if not all(_is_whole(store, array) for array in arrays):
        return None
    return FinishedRun(
        **{name: body[name] for name in ("object", "digest", "space_digest", "scalars", "outside")},
        arrays=arrays,
        lengths=base64.b64decode(body["lengths"]),
        source=Fingerprint(**body["source"]),
        removed=tuple(body.get("removed", ())),
        notes=tuple(body.get("notes", ())),
        quantization=body.get("quantization"),
        record=key,
    )


def mask_key(source_key: str, source: Fingerprint, frames: int, *, decided: Mapping[str, Any]) -> str:
    """Object name of the record of the mask that is computed from a source file with this content.

    Args:
        source_key: path of the file below the source's root.
        source: its size and checksum.
        frames: how many of the first are averaged; 0 = all.
        decided: what else it depends on; JSON-able.
    """
    return keyed(_MASKS, [source_key, source.size, source.crc, frames, *([dict(decided)] if decided else [])])


def save_mask(store: Store, key: str, bits: NDArray[np.uint8]) -> None:
    """Record a computed mask, packed; whoever computed the same before has recorded the same."""
    write_record(store, key, {"bits": base64.b64encode(zlib.compress(bits.tobytes(), 6)).decode("ascii")})


def load_mask(store: Store, key: str) -> NDArray[np.uint8] | None:
    """The packed bits of a recorded mask, if it is there and undamaged."""
    body = read_record(store, key)
    if body is None:
        return None
    return np.frombuffer(zlib.decompress(base64.b64decode(body["bits"])), dtype=np.uint8)


def keyed(kind: str, message: Any) -> str:
    """Name of a record below `pending/`: tells nothing to whoever does not know the message, which is JSON-able."""
    plan = bytes.fromhex(sha256_json({"format": FORMAT_VERSION, "kind": kind}))
    return f"{FOLDER}/{kind}/{hmac.new(plan, canonical_json(message), hashlib.sha256).hexdigest()}.json"


def write_record(store: Store, key: str, body: dict[str, Any]) -> None:
    """Put a record with its check; a good one that is there already stays, a damaged one is replaced."""
    try:
        store.put_new(key, _checked(body))
    except ObjectExistsError:
        if read_record(store, key) is None:
            store.delete(key)
            with suppress(ObjectExistsError):
                store.put_new(key, _checked(body))


def read_record(store: Store, key: str) -> dict[str, Any] | None:
    """What a record says, None where it is missing or damaged."""
    try:
        body = json.loads(store.read(key))
        check = body.pop("check")
    except (ObjectMissingError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return body if check == sha256_json(body) else None


def _checked(body: dict[str, Any]) -> bytes:
    return canonical_json({**body, "check": sha256_json(body)})


def clear(store: Store, committed: Container[str]) -> None:
    """Remove the records of runs that are committed, and what is left where nobody else has any.

    Args:
        store: the target.
        committed: objects of runs (`Run.object`) that a generation names.
    """
    others = False
    keys = [key for key in store.list(FOLDER) if not key.startswith(_AIDS)]
    for key in keys:
        body = read_record(store, key)
        if body is None or body.get("object") in committed:
            store.delete(key)
        else:  # of a conversion of other runs, under way or interrupted
            others = True
    if not others:
        clear_aids(store)


def clear_runs(store: Store, runs: Iterable[FinishedRun]) -> None:
    """Remove the records of runs that were committed just now, and those that only helped to convert them."""
    for run in runs:
        if run.record:
            store.delete(run.record)
    clear_aids(store)


def clear_aids(store: Store) -> None:
    """Remove recorded masks and what shards said of them: at worst a conversion under way computes masks again."""
    for prefix in _AIDS:
        for key in store.list(prefix):
            store.delete(key)


def _array(body: dict[str, Any]) -> StoredArray:
    files = tuple(StoredFile(**file) for file in body.pop("files"))
    return StoredArray(**{**body, "shape": tuple(body["shape"])}, files=files)


def _is_whole(store: Store, array: StoredArray) -> bool:
    for file in array.files:
        try:
            if store.size(f"{array.object}/{file.name}" if file.name else array.object) != file.bytes:
                return False
        except ObjectMissingError:
            return False
    return True


def _scalars(statistics: Statistics) -> dict[str, Any]:
    names = (
        "residual_wraps", "valid_min", "valid_max", "nonfinite",
        "foreground_count", "foreground_mean", "foreground_sd", "foreground_min", "foreground_max",
    )  # fmt: skip
    values = {name: getattr(statistics, name) for name in names}
    # A run without a single finite value has no range; JSON has no NaN.
    return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in values.items()}
