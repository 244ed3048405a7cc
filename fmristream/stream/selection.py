"""Which runs are streamed together: chosen by split and condition, refused where their voxels do not correspond."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.columns import JoinedColumns
from fmristream.catalog.run import UNALIGNED
from fmristream.catalog.run_table import RunTable
from fmristream.catalog.split import DEFAULT_RATIOS, Split, SplitPart, split_into_parts
from fmristream.errors import SpaceError, UsageError
from fmristream.sampling.weights import Quotas, balanced, weighted
from fmristream.sampling.window import ClipTable
from fmristream.shards.dataset import Dataset, open_dataset

Weights = str | Sequence[float] | NDArray[np.float64]

_COLUMN = "column:"


def split(
    source: str | Dataset,
    *,
    by: str | Sequence[str] = "subject",
    fractions: Sequence[float] = DEFAULT_RATIOS,
    seed: int = 0,
    method: str = "exact",
) -> Split:
    """Part the subjects of a dataset into train, val and test, without writing anything.

    The same dataset, columns, fractions and seed give the same parts everywhere. Subjects are never divided, nor are groups
    that were stored at conversion, nor those that share a value of a column of `by`: a subject that was scanned at two
    sites makes one group of both.

    Args:
        source: URL of a dataset, or an open `Dataset`, which may be a `where` of one.
        by: column of runs or participants, or several: `subject`, `family`, `site`, ...
        fractions: shares of train, val and test that add up to 1; of groups.
        seed: of the drawing.
        method: `exact` shares, or `hash`: shares only about so, but subjects that are added later move nobody.

    Raises:
        UsageError: there is no such column.
        SplitError: a part would be empty.
    """
    dataset = source if isinstance(source, Dataset) else open_dataset(source)
    return split_into_parts(dataset.columns, by=by, fractions=fractions, seed=seed, method=method)


def select_runs(dataset: Dataset, part: str | SplitPart | None) -> RunTable:
    """The runs of a part.

    Raises:
        UsageError: there are none, or it is no part.
    """
    where = f" where {' and '.join(dataset.filters)}" if dataset.filters else ""
    runs = dataset.runs
    if isinstance(part, SplitPart):
        subjects = dataset.columns.column("subject")
        assert subjects.words is not None
        chosen = np.array([part.has(word) for word in subjects.words], dtype=bool)
        runs = runs.select(chosen[subjects.values])
    elif isinstance(part, str):
        runs = runs.where("split", part)
    elif part is not None:
        raise UsageError(
            f"split={type(part).__name__}: expected the name of a stored split or a part of one that fmristream.split made, "
            "such as SPLIT.train"
        )
    if not runs and not len(dataset.runs):
        raise UsageError(f"{dataset.store.name}: no run{where}; the dataset has {len(dataset.all_runs)} runs")
    if not runs:
        present = ", ".join(sorted(set(dataset.runs.counts("split")) - {""})) or "none: it was not split"
        shown = repr(part) if isinstance(part, str) else str(part)
        raise UsageError(f"{dataset.store.name}: no run in split {shown}{where}; the dataset has the splits {present}")
    return runs


def require_one_grid(runs: RunTable, *, where: str) -> None:
    """Raise SpaceError unless all runs store the same voxels of the same grid: without that there is no batch at all."""
    grids = runs.counts("space_digest")
    if len(grids) > 1:
        raise SpaceError(
            f"{where}: the selected runs lie on {len(grids)} grids or masks (or lists of grayordinates); select runs of one, "
            "or convert them with one --mask"
        )


def require_one_space(runs: RunTable, *, where: str) -> None:
    """Raise SpaceError unless a voxel means the same place in every run's brain."""
    labels = sorted(runs.counts("space"))
    if len(labels) > 1:
        raise SpaceError(
            f"{where}: the selected runs lie in {len(labels)} spaces ({', '.join(label or 'unknown' for label in labels)}); "
            "select runs of one, or pass mix_spaces=True if that is what you want"
        )
    if labels[0] not in UNALIGNED:
        return
    scanned = runs.counts("subject", "session")
    if len(scanned) > 1:
        raise SpaceError(
            f"{where}: the runs are in the space {labels[0] or 'unknown'!r}, in which voxels of {len(scanned)} subjects or "
            "sessions do not correspond; convert normalised derivatives, declare --space NAME at conversion if they are "
            "aligned, or pass mix_spaces=True if that is what you want"
        )


def quotas_of(weights: Weights, columns: JoinedColumns, table: ClipTable) -> tuple[Quotas, int]:
    """(how often each window comes, runs with windows that get none because their column says nothing).

    Args:
        weights: `subject`, `column:NAME`, or a number for each run.
        columns: of the selected runs.
        table: of their clips.

    Raises:
        UsageError: they are none of these, or leave nothing.
    """
    if not isinstance(weights, str):
        return weighted(weights, table.counts, table.first), 0
    name = "subject" if weights == "subject" else weights.removeprefix(_COLUMN)
    if weights != "subject" and not weights.startswith(_COLUMN):
        raise UsageError(f"weights={weights!r}: expected 'subject', 'column:NAME', or a number for each run")
    column = columns.column(name)
    known = column.is_known
    groups = np.full(len(known), -1, dtype=np.int64)
    groups[known] = np.unique(column.values[known], return_inverse=True)[1]
    if column.words is not None:  # by the words themselves: codes follow the order of the rows
        ranks = np.argsort(np.argsort(np.array(column.words, dtype=object))) if column.words else np.zeros(0, int)
        groups[known] = ranks[column.values[known]]
    without = int(((groups < 0) & (table.counts > 0)).sum())
    if table.total and not ((groups >= 0) & (table.counts > 0)).any():
        raise UsageError(f"weights={weights!r}: no selected run has a value of the column {name!r}")
    return balanced(groups, table.counts, table.first), without


def words_of(weights: Weights, quotas: Quotas) -> str:
    """What the weights are, in a state."""
    return weights if isinstance(weights, str) else f"array {quotas.digest[:16]}"


def whole(name: str, number: Any) -> Any:
    """The number as int (None stays None), or UsageError where it is none: 4.5 frames must not become 4."""
    import operator

    try:
        return None if number is None else operator.index(number)
    except TypeError as error:
        raise UsageError(f"{name}={number!r}: expected a whole number") from error
