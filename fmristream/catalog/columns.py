"""Runs and participants as one table: what conditions, splits and weights are asked of."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run_table import RunTable
from fmristream.catalog.tables import Columns, type_of_column
from fmristream.catalog.where import Column, nearest
from fmristream.errors import UsageError

# Of the runs table: labels and facts. What is left out are lists, and names of objects, which change with every conversion.
RUN_COLUMNS = (
    *("name", "subject", "session", "task", "acq", "run", "echo", "space", "split", "group"),
    *("frames", "tr_s", "voxels", "space_digest", "dtype", "slope", "inter", "digest", "residual_wraps"),
    *("valid_min", "valid_max", "nonfinite", "foreground_count", "foreground_mean", "foreground_sd"),
    *("foreground_min", "foreground_max", "outside", "source_bytes"),
)
_OF_RUNS, _OF_PARTICIPANTS = "runs.", "participants."


class JoinedColumns:
    """Columns of runs and, by subject, of participants; one value a run.

    A name that both tables have is not guessed at: `runs.group` and `participants.group` tell them apart.

    Args:
        runs: the rows.
        participants: columns by name, `subject` among them; empty where there is no such table.
    """

    def __init__(self, runs: RunTable, participants: Columns) -> None:
        self._runs = runs
        self._participants = participants
        self._made: dict[str, Column] = {}

    @property
    def rows(self) -> int:
        """How many runs there are."""
        return len(self._runs)

    @cached_property
    def names(self) -> Sequence[str]:
        """Every name that a column can be asked by; participants' first."""
        own = [name for name in self._participants if name != "subject"]
        plain = list(dict.fromkeys([*own, *RUN_COLUMNS]))
        both = set(own) & set(RUN_COLUMNS)
        return [*plain, *(prefix + name for name in sorted(both) for prefix in (_OF_RUNS, _OF_PARTICIPANTS))]

    def column(self, name: str) -> Column:
        """(runs,) values of a column.

        Raises:
            UsageError: there is none of this name, or two.
        """
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Column:
        own = set(self._participants) - {"subject"}
        if name in own and name in RUN_COLUMNS:
            raise UsageError(
                f"column {name!r} is in the runs table and in the participants table; "
                f"write `{_OF_RUNS}{name}` or `{_OF_PARTICIPANTS}{name}`, with the backticks in a condition"
            )
        if name in own:
            return self._of_participants(name)
        if name.startswith(_OF_PARTICIPANTS) and name.removeprefix(_OF_PARTICIPANTS) in own:
            return self._of_participants(name.removeprefix(_OF_PARTICIPANTS))
        bare = name.removeprefix(_OF_RUNS)
        if bare not in RUN_COLUMNS:
            raise UsageError(f"there is no column {name!r}{nearest(name, self.names)}")
        return self._of_runs(bare)

    def _of_runs(self, name: str) -> Column:
        kind = str(type_of_column(name))
        if kind == "string" or kind.startswith("fixed_size_binary"):
            return Column.of_words(self._runs.cells(name))
        return Column(values=self._runs.numbers(name).astype(np.float64))

    def _of_participants(self, name: str) -> Column:
        cells = self._participants[name]
        column = Column.of_words(cells) if isinstance(cells, list) else Column(values=cells)
        return column.take(self._participant_rows)

    @cached_property
    def _participant_rows(self) -> NDArray[np.int64]:
        """(runs,) row of each run's subject in the participants table; -1 where it is not there."""
        rows = {subject: row for row, subject in enumerate(self._participants.get("subject", ()))}
        subjects = self.column("subject")
        assert subjects.words is not None
        found = np.array([*(rows.get(word, -1) for word in subjects.words), -1], dtype=np.int64)
        rows_of_runs: NDArray[np.int64] = found[subjects.values]
        return rows_of_runs
