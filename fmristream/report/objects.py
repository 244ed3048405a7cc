"""Every object that a generation names: there, of its size, with its digest; read once, in pieces, several at a time.

Tables hold the first digits of each object's digest, which say what is damaged, and one digest per run over all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from fmristream.errors import CorruptDataError, ObjectMissingError
from fmristream.report.findings import Findings
from fmristream.report.threads import Counter, in_threads
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import digest_of_objects
from fmristream.shards.generation import Generation
from fmristream.shards.hashing import SHA256, bulk_hash
from fmristream.storage import Store

PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedObject:
    """An object as a generation or one of its tables names it."""

    key: str
    bytes: int
    digest: str  # hex, or its first digits
    algorithm: str = SHA256
    run: str = ""


def objects_of_generation(generation: Generation) -> Iterator[NamedObject]:
    """Tables, index objects and spaces: what the generation itself names."""
    document = generation.document
    entries = [document["participants"], document["skipped"]]
    for segment in document["segments"]:
        entries += [segment["runs"], segment["arrays"], segment["index"]]
    for entry in entries:
        if entry is not None:
            yield NamedObject(key=entry["key"], bytes=entry["bytes"], digest=entry["sha256"])
    for space in document["spaces"].values():
        for file in space["objects"]:
            yield NamedObject(key=file["name"], bytes=file["bytes"], digest=file["sha256"])


def objects_of_runs(dataset: Dataset) -> Iterator[NamedObject]:
    """What the arrays table names, run by run."""
    for name in dataset.runs.column("name"):
        for array in dataset.arrays_of(name)[1].values():
            for file in array.files:
                key = file.key_in(array.object)
                yield NamedObject(
                    key=key, bytes=file.bytes, digest=file.digest, algorithm=dataset.bulk_digest, run=name
                )


def check_objects(store: Store, objects: Iterable[NamedObject], counter: Counter) -> Findings:
    """Read every object once; memory is a few pieces per thread."""
    found = Findings()
    for one in in_threads(lambda named: _check(store, named, counter), objects, counter):
        found.merge(one.found)
    return found


def check_objects_of_runs(dataset: Dataset, counter: Counter) -> Findings:
    """The same for what belongs to runs, and each run's digest over its objects."""
    found = Findings()
    digests = dict(zip(dataset.runs.column("name"), dataset.runs.column("objects_digest"), strict=True))
    checked = in_threads(lambda named: _check(dataset.store, named, counter), objects_of_runs(dataset), counter)
    for run, of_run in groupby(checked, key=lambda one: one.named.run):
        members = list(of_run)
        for one in members:
            found.merge(one.found)
        is_sound = not any(one.found.faults for one in members)
        seen = digest_of_objects((one.named.key, one.named.bytes, one.digest) for one in members)
        if is_sound and seen != digests[run]:
            found.fault("its objects are not those that were committed: the digest over them differs", run=run)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """What was found in one object."""

    named: NamedObject
    found: Findings
    digest: str = ""


def _check(store: Store, named: NamedObject, counter: Counter) -> _Checked:
    found = Findings(objects=1)
    result = _Checked(named=named, found=found)
    try:
        size = store.size(named.key)
        if size != named.bytes:
            found.fault(f"has {size} bytes, {named.bytes} were committed", run=named.run, key=named.key)
            return result
        digest = bulk_hash(named.algorithm)
        for start in range(0, size, PIECE_BYTES):
            piece = store.read_range(named.key, start, min(start + PIECE_BYTES, size))
            digest.update(piece)
            found.bytes += len(piece)
            counter.add(len(piece))
    except ObjectMissingError:
        found.fault("is missing", run=named.run, key=named.key)
    except CorruptDataError as error:  # it became shorter while it was read
        found.fault(str(error), run=named.run, key=named.key)
    else:
        if not digest.hexdigest().startswith(named.digest):
            found.fault(f"its {named.algorithm} differs: stored bytes have changed", run=named.run, key=named.key)
        return replace(result, digest=digest.hexdigest())
    return result
