"""What a window is labelled with: columns of the participants table, numbers as they are, words as codes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmristream.catalog.tables import Participant
from fmristream.catalog.where import nearest
from fmristream.errors import UsageError
from fmristream.shards.dataset import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One column: the value of each subject, and the words behind the codes (none for numbers)."""

    name: str
    values: Mapping[str, float]
    labels: tuple[str, ...]

    def of(self, subject: str) -> float:
        """The subject's value; NaN where it is missing."""
        return self.values.get(subject, float("nan"))


def read_targets(dataset: Dataset, names: Sequence[str]) -> tuple[Target, ...]:
    """The columns that samples are to carry.

    Raises:
        UsageError: there is no such column, or one name was given in place of a list.
    """
    if isinstance(names, str):
        raise UsageError(f"targets={names!r}: expected a list of columns; write targets=[{names!r}]")
    return tuple(read_target(dataset.participants, name, where=dataset.store.name) for name in names)


def read_target(participants: Sequence[Participant], name: str, *, where: str) -> Target:
    """The column `name`.

    Words are coded 0, 1, ... in sorted order over all participants, so that every split and every machine agrees.

    Raises:
        UsageError: there is no such column.
    """
    columns = sorted({column for row in participants for column in row} - {"subject"})
    if name not in columns:
        hint = nearest(name, columns) if columns else "; the source had no participants table"
        raise UsageError(f"{where}: no column {name!r} to use as a target{hint}")
    cells = {str(row["subject"]): row[name] for row in participants if row.get(name) is not None}
    if any(isinstance(value, str) for value in cells.values()):
        labels = tuple(sorted({str(value) for value in cells.values()}))
        values = {subject: float(labels.index(str(value))) for subject, value in cells.items()}
        return Target(name=name, values=values, labels=labels)
    return Target(name=name, values={s: float(v) for s, v in cells.items() if v is not None}, labels=())
