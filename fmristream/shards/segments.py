"""Segments: the tables and the index of the runs that one commit added. Written once; rewritten without some of the runs."""

import hashlib
import secrets
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from fmristream.catalog.run import Run, StoredArray
from fmristream.catalog.tables import ArraysEncoder, RunsEncoder
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import sha256
from fmristream.storage import Store

# A reader fetches three objects a segment: more segments than this are written as one.
MAX_SEGMENTS = 64

Entry = dict[str, Any]

# Runs between two batches of the tables, which become their row groups: who asks for one run decodes those of a group.
_BATCH_RUNS = 1024


class SegmentWriter:
    """Takes runs in base order and writes one segment, in memory that does not grow with their number.

    Leaving the block before `finish` discards what was not published.

    Args:
        store: the dataset.
        bulk_digest: name of the digest that the runs' objects have.
    """

    def __init__(self, store: Store, *, bulk_digest: str) -> None:
        self._store = store
        self._index_key = f"index/{secrets.token_hex(8)}"
        self._index = store.stream_new(self._index_key)
        self._index_sha = hashlib.sha256()
        self._index_bytes = 0
        self._runs, self._arrays = RunsEncoder(), ArraysEncoder(bulk_digest=bulk_digest)
        self._waiting: list[Run] = []
        self._waiting_arrays: list[tuple[int, StoredArray]] = []
        self._count = 0

    def add(self, run: Run, arrays: Iterable[StoredArray], block: bytes) -> None:
        """Add a run: its row, its arrays wherever their blocks lay before, and its index block."""
        for array in arrays:
            if array.frames_per_shard:
                array = replace(array, index_offset=self._index_bytes, index_bytes=len(block))
            self._waiting_arrays.append((self._count, array))
        self._waiting.append(run)
        self._index.write(block)
        self._index_sha.update(block)
        self._index_bytes += len(block)
        self._count += 1
        if len(self._waiting) == _BATCH_RUNS:
            self._flush()

    def finish(self) -> Entry:
        """Publish the segment's objects; returns what a generation says of it."""
        self._flush()
        self._index.commit()
        return {
            "arrays": put_table(self._store, self._arrays.finish(), self._count),
            "index": {"bytes": self._index_bytes, "key": self._index_key, "sha256": self._index_sha.hexdigest()},
            "runs": put_table(self._store, self._runs.finish(), self._count),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._index.__exit__(*exc)

    def _flush(self) -> None:
        self._runs.add(self._waiting)
        self._arrays.add(self._waiting_arrays)
        self._waiting, self._waiting_arrays = [], []


def put_table(store: Store, data: bytes, rows: int) -> Entry:
    """Store a table; returns what a generation says of it.

    Its name is random, not its digest: an object that is written under a name that was never used before cannot be
    one that `gc` is about to remove.
    """
    key = f"tables/{secrets.token_hex(8)}.parquet"
    store.put_new(key, data)
    return {"bytes": len(data), "key": key, "rows": rows, "sha256": sha256(data)}


def kept_segments(dataset: Dataset, *, without: Container[str] = ()) -> list[Entry]:
    """The dataset's segments without some runs; those that hold none of these stay what they are.

    Where there are too many, all runs are written into one.

    Args:
        dataset: the version to start from.
        without: names of runs.
    """
    old: Sequence[Entry] = [dict(segment) for segment in dataset.generation.document["segments"]]
    members = _members(dataset)
    if len(old) >= MAX_SEGMENTS:
        kept = [name for name in dataset.runs.column("name") if name not in without]
        return _written(dataset, kept)
    segments = []
    for number, segment in enumerate(old):
        kept = [name for name in members[number] if name not in without]
        segments += [segment] if len(kept) == len(members[number]) else _written(dataset, kept)
    return segments


def _members(dataset: Dataset) -> list[list[str]]:
    """Names of each segment's runs, in base order."""
    members: list[list[str]] = [[] for _ in dataset.generation.document["segments"]]
    for position, name in enumerate(dataset.runs.column("name")):
        members[dataset.runs.place(position)[0]].append(name)
    return members


def _written(dataset: Dataset, names: Sequence[str]) -> list[Entry]:
    if not names:
        return []
    with SegmentWriter(dataset.store, bulk_digest=dataset.bulk_digest) as writer:
        for run, arrays, block in _rows(dataset, names):
            writer.add(run, arrays, block)
        return [writer.finish()]


def _rows(dataset: Dataset, names: Sequence[str]) -> Iterator[tuple[Run, Iterable[StoredArray], bytes]]:
    for name in names:
        key, arrays = dataset.arrays_of(name)
        frames = next(array for array in arrays.values() if array.frames_per_shard)
        stop = frames.index_offset + frames.index_bytes
        yield dataset.run(name), arrays.values(), dataset.store.read_range(key, frames.index_offset, stop)
