"""Whether what is tested on was trained on: the same run, the same person, or a copy of a run under another name."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fmristream.catalog.run import Run
from fmristream.errors import SplitError, UsageError
from fmristream.report.duplicates import sketches_of
from fmristream.report.findings import first_few
from fmristream.shards.dataset import Dataset, open_dataset
from fmristream.signal.sketch import duplicates_between
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.mixture import Mixture

Audited = str | Dataset | StreamingDataset | Mixture

SAME_RUN, SAME_SUBJECT, SAME_LABEL, ALIKE = "same run", "same subject", "same label", "alike"
# What is certain; the others are told.
CERTAIN = frozenset({SAME_RUN, SAME_SUBJECT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Something that is on both sides.

    Attributes:
        kind: `same run` (every value is equal), `same subject` (of one dataset), `same label` (of two datasets, where it
            may be chance), `alike` (fingerprints agree as those of copies do, unrelated runs' do not).
        train: names of a run of each side; for subjects one of each, of many.
        test: of the other side.
        time: correlation of courses that the fingerprints tell; None where they were not asked.
    """

    kind: str
    train: str
    test: str
    time: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakReport:
    """What was compared, and what was found.

    Attributes:
        leaks: in the order of the test runs within each kind.
        train_runs: how many there are.
        test_runs: of the other side.
        without_fingerprint: runs of both sides that could not be compared by one.
    """

    leaks: tuple[Leak, ...]
    train_runs: int
    test_runs: int
    without_fingerprint: int

    @property
    def certain(self) -> tuple[Leak, ...]:
        """Those that leave no doubt."""
        return tuple(leak for leak in self.leaks if leak.kind in CERTAIN)

    @property
    def suspected(self) -> tuple[Leak, ...]:
        """Those to look at."""
        return tuple(leak for leak in self.leaks if leak.kind not in CERTAIN)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """Runs of one dataset that are on one side."""

    dataset: Dataset
    runs: Sequence[Run]


def audit(train: Audited, test: Audited, *, fingerprints: bool = True, threshold: float = 0.5) -> LeakReport:
    """Refuse to test on what was trained on.

    Args:
        train: URL, dataset, `where` of one, clips or mixture; all runs of it.
        test: of the other side, of the same or of another URL.
        fingerprints: compare them as well: one small read a run, and every pair, so meant for thousands of runs.
        threshold: of the correlation that they tell: copies with 1.5 times the voxel size have about .85, a run of the same
            subject and session below .25.

    Returns:
        What was found; each suspicion was also told as a warning.

    Raises:
        SplitError: a run of the test side is in the training side, or a subject of one dataset is in both.
        UsageError: a side holds no run.
        CorruptDataError: a fingerprint is not what was committed.
    """
    report = find_leaks(train, test, fingerprints=fingerprints, threshold=threshold)
    if report.certain:
        kinds = {leak.kind: sum(one.kind == leak.kind for one in report.certain) for leak in report.certain}
        told = " and ".join(f"{count} of the {kind}" for kind, count in kinds.items())
        shown = first_few([f"{leak.train} / {leak.test}" for leak in report.certain])
        raise SplitError(
            f"the test runs leak from the training runs: {told} on both sides ({shown}); leave them out of one side, "
            "or split by subject with fmristream.split"
        )
    for kind, what in ((ALIKE, "look like copies of one another"), (SAME_LABEL, "have the same subject label")):
        found = [leak for leak in report.suspected if leak.kind == kind]
        if found:
            shown = first_few([f"{leak.train} / {leak.test}" for leak in found])
            warnings.warn(
                f"{len(found)} pairs of training and test runs {what}: the same person? {shown}", stacklevel=2
            )
    return report


def find_leaks(train: Audited, test: Audited, *, fingerprints: bool = True, threshold: float = 0.5) -> LeakReport:
    """What is on both sides; see `audit`, which refuses it."""
    sides = _sides(train), _sides(test)
    for what, side in zip(("training", "test"), sides, strict=True):
        if not any(one.runs for one in side):
            raise UsageError(f"the {what} side holds no run, so nothing can be compared; check its split or condition")
    leaks = [*_same_runs(*sides), *_same_subjects(*sides)]
    without = 0
    if fingerprints:
        known = {(leak.train, leak.test) for leak in leaks if leak.kind == SAME_RUN}
        alike, without = _alike(*sides, threshold=threshold)
        leaks += [leak for leak in alike if (leak.train, leak.test) not in known]
    return LeakReport(
        leaks=tuple(leaks),
        train_runs=sum(len(side.runs) for side in sides[0]),
        test_runs=sum(len(side.runs) for side in sides[1]),
        without_fingerprint=without,
    )


def _sides(source: Audited) -> list[_Side]:
    if isinstance(source, Mixture):
        return [side for member in source.members for side in _sides(member)]
    if isinstance(source, str):
        source = open_dataset(source)
    return [_Side(source if isinstance(source, Dataset) else source.dataset, tuple(source.runs))]


def _same_runs(train: list[_Side], test: list[_Side]) -> list[Leak]:
    by_digest = {run.digest: run.name for side in train for run in side.runs}
    return [
        Leak(kind=SAME_RUN, train=by_digest[run.digest], test=run.name)
        for side in test
        for run in side.runs
        if run.digest in by_digest
    ]


def _same_subjects(train: list[_Side], test: list[_Side]) -> list[Leak]:
    """One leak a subject and pair of datasets; labels of two datasets say less than those of one."""
    found = []
    for one in train:
        first = {run.subject: run.name for run in reversed(one.runs)}
        for other in test:
            contents = {side.dataset.generation.document["content_digest"] for side in (one, other)}
            is_one = len(contents) == 1 or one.dataset.url == other.dataset.url
            seen = {run.subject: run.name for run in reversed(other.runs) if run.subject in first}
            kind = SAME_SUBJECT if is_one else SAME_LABEL
            found += [Leak(kind=kind, train=first[subject], test=seen[subject]) for subject in sorted(seen)]
    return found


def _alike(train: list[_Side], test: list[_Side], *, threshold: float) -> tuple[list[Leak], int]:
    """(copies as the fingerprints tell them, runs without one)."""
    found = []
    without = 0
    held = []
    for side in (*train, *test):
        runs, sketches = sketches_of(side.dataset, side.runs)
        without += len(side.runs) - len(runs)
        held.append((runs, sketches))
    for train_runs, train_sketches in held[: len(train)]:
        for test_runs, test_sketches in held[len(train) :]:
            for first, second, alike in duplicates_between(test_sketches, train_sketches, threshold=threshold):
                names = {"train": train_runs[second].name, "test": test_runs[first].name}
                found.append(Leak(kind=ALIKE, **names, time=alike.time))
    return found, without
