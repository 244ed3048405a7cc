"""Every object that a generation names: there, of its size, with its sha256; read once, in pieces, several at a time."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fmristream.errors import CorruptDataError, ObjectMissingError
from fmristream.report.findings import Findings
from fmristream.report.threads import Counter, in_threads
from fmristream.shards.dataset import Dataset
from fmristream.shards.generation import Generation
from fmristream.storage import Store

PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedObject:
    """An object as a generation or one of its tables names it."""

    key: str
    bytes: int
    sha256: str
    run: str = ""


def objects_of_generation(generation: Generation) -> Iterator[NamedObject]:
    """Tables, index objects and spaces: what the generation itself names."""
    document = generation.document
    entries = [document["participants"], document["skipped"]]
    for segment in document["segments"]:
        entries += [segment["runs"], segment["arrays"], segment["index"]]
    for entry in entries:
        if entry is not None:
            yield NamedObject(key=entry["key"], bytes=entry["bytes"], sha256=entry["sha256"])
    for space in document["spaces"].values():
        for file in space["objects"]:
            yield NamedObject(key=file["name"], bytes=file["bytes"], sha256=file["sha256"])


def objects_of_runs(dataset: Dataset) -> Iterator[NamedObject]:
    """What the arrays table names, run by run."""
    for name, (_, arrays) in dataset.arrays.items():
        for array in arrays.values():
            for file in array.files:
                key = f"{array.object}/{file.name}" if file.name else array.object
                yield NamedObject(key=key, bytes=file.bytes, sha256=file.sha256, run=name)


def check_objects(store: Store, objects: Iterable[NamedObject], counter: Counter) -> Findings:
    """Read every object once; memory is a few pieces per thread."""
    found = Findings()
    for result in in_threads(lambda one: _check(store, one, counter), objects, counter):
        found.merge(result)
    return found


def _check(store: Store, named: NamedObject, counter: Counter) -> Findings:
    found = Findings(objects=1)
    try:
        size = store.size(named.key)
        if size != named.bytes:
            found.fault(f"has {size} bytes, {named.bytes} were committed", run=named.run, key=named.key)
            return found
        digest = hashlib.sha256()
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
        if digest.hexdigest() != named.sha256:
            found.fault("its sha256 differs: stored bytes have changed", run=named.run, key=named.key)
    return found
