"""Which runs of a dataset are copies of each other, by their sketches."""

from collections.abc import Iterable
from dataclasses import dataclass

from fmristream.catalog.run import Run
from fmristream.report.threads import Counter, in_threads
from fmristream.shards.dataset import Dataset
from fmristream.shards.run_reader import RunReader
from fmristream.shards.side import read_sketch
from fmristream.signal.sketch import Sketch, near_duplicates


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """Two runs that are alike as copies are, unrelated runs are not.

    Attributes:
        runs: their names.
        same_subject: whether the dataset knows them as one person's.
        splits: of the one and the other; two that differ are a leak.
        time: correlation of their courses, about 1 for copies.
        lag: first frames that the second lacks; negative: the first.
        image: correlation of their mean images.
    """

    runs: tuple[str, str]
    same_subject: bool
    splits: tuple[str, str]
    time: float
    lag: int
    image: float


def find_duplicates(dataset: Dataset, *, threshold: float = 0.5) -> tuple[Duplicate, ...]:
    """Pairs of runs whose sketches agree; runs without one, or too short for one, are passed over.

    Every pair is compared: meant for thousands of runs.

    Args:
        dataset: an open one.
        threshold: of the correlation of courses: copies with 1.5 times the voxel size have about .85, a run of the same
            subject and session below .25.

    Raises:
        CorruptDataError: a sketch is not what was committed.
    """
    with_sketch, sketches = sketches_of(dataset, dataset.runs)
    found = []
    for first, second, alike in near_duplicates(sketches, threshold=threshold):
        one, other = with_sketch[first], with_sketch[second]
        found.append(
            Duplicate(
                runs=(one.name, other.name),
                same_subject=one.subject == other.subject,
                splits=(one.split, other.split),
                time=alike.time,
                lag=alike.lag,
                image=alike.image,
            )
        )
    return tuple(found)


def sketches_of(dataset: Dataset, runs: Iterable[Run]) -> tuple[list[Run], list[Sketch]]:
    """(those of the runs that have a sketch, their sketches).

    Raises:
        CorruptDataError: a sketch is not what was committed.
    """
    readers = [
        RunReader(dataset.store, run, arrays, key, dataset.bulk_digest)
        for run in runs
        for key, arrays in [dataset.arrays_of(run)]
    ]
    found = [reader for reader in readers if "sketch" in reader.arrays]
    return [reader.run for reader in found], list(in_threads(_sketch, found, Counter(None)))


def _sketch(reader: RunReader) -> Sketch:
    data = read_sketch(reader)
    assert data is not None, "asked for those that have one"
    return Sketch.decode(data)
