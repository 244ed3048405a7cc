"""The vectors that a trained network has for windows, and their means over windows of a run and over runs of a subject.

    OUT/windows.parquet    a row per window, in stored order: which it is, and `features`, a list of float32
        runs.parquet       a row per run: `windows`, and `features`, the mean over them
        subjects.parquet   a row per subject: `runs`, and `features`, the mean over them
        about.json         which network, which data

Rows are written as they come, in the same order on any number of ranks; memory is that of a few batches and, for subjects,
of one run at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fmristream.catalog.row_tables import INT, TEXT, ColumnKind, RowWriter, Values, kinds_of, write_rows
from train.beyond.features import features_of
from train.beyond.opened import ALL, Opened, open_for
from train.beyond.places import new_folder, require_free, together
from train.beyond.predict import about, frames_of, network_facts, run_columns
from train.beyond.streaming import Group, Means, Rows, in_order
from train.beyond.trained import Trained
from train.files import write_json
from train.launch import World
from train.predictions import Texts

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch


def embed(trained: Trained, url: str, *, out: Path, world: World, split: str = ALL, where: str = "") -> tuple[str, ...]:
    """Write the vectors of a dataset's windows as a new folder; returns what there is to say of the data.

    Arguments are those of `predict`.

    Raises:
        FmriStreamError: the data are not for the network; nothing was written.
    """
    require_free(out, world)
    with ExitStack() as stack:
        opened = together(world, lambda: open_for(trained, url, split=split, where=where, world=world, stack=stack))
        if not world.is_main:
            for _ in vectors(opened):
                pass
            return opened.told
        with new_folder(out) as folder:
            write_vectors(folder, opened)
            write_json(folder / "about.json", about(opened, url=url, split=split, where=where))
    return opened.told


def vectors(opened: Opened) -> Iterator[Rows]:
    """The features of all windows in stored order, on every rank, batch by batch."""

    def compute(batch: "Batch") -> torch.Tensor:
        signal, named = opened.inputs(batch)
        with torch.autocast(opened.world.device.type, dtype=torch.bfloat16, enabled=opened.bf16):
            return features_of(opened.model, signal, named).cpu()

    return in_order(opened, compute)


def write_vectors(folder: Path, opened: Opened) -> None:
    """The three tables, as the vectors come."""
    known = run_columns(opened)
    with ExitStack() as stack:
        tables: _Tables | None = None
        for rows in vectors(opened):
            words = {name: column[rows.run].tolist() for name, column in known.items()}
            columns: dict[str, Values] = {**words, **frames_of(opened, rows.window)}
            if tables is None:
                tables = _Tables(folder, opened, columns=columns, known=known, width=rows.values.shape[1], stack=stack)
            tables.add(columns, rows)
        if tables is not None:
            tables.finish()


class _Tables:
    """The three tables while they are written."""

    def __init__(
        self,
        folder: Path,
        opened: Opened,
        *,
        columns: Mapping[str, Values],
        known: Mapping[str, Texts],
        width: int,
        stack: ExitStack,
    ) -> None:
        self._known, self._runs, self._subjects = known, Means(width), Means(width)
        vector = {"features": ColumnKind(kind="vector", width=width)}
        facts = {"network": network_facts(opened.trained)}

        def table(name: str, kinds: Mapping[str, ColumnKind]) -> RowWriter:
            return stack.enter_context(write_rows(folder / f"{name}.parquet", {**kinds, **vector}, facts=facts))

        self._windows_table = table("windows", kinds_of(columns))
        self._runs_table = table("runs", {**dict.fromkeys(known, TEXT), "windows": INT})
        self._subjects_table = table("subjects", {"subject": TEXT, "runs": INT})

    def add(self, columns: Mapping[str, Values], rows: Rows) -> None:
        """Windows that follow those before."""
        self._windows_table.add({**columns, "features": rows.values})
        for place, row in zip(rows.run.tolist(), rows.values, strict=True):
            self._close_run(self._runs.take(place, row))

    def finish(self) -> None:
        """The last run and subject."""
        self._close_run(self._runs.finish())
        self._close_subject(self._subjects.finish())

    def _close_run(self, done: Group | None) -> None:
        if done is None:
            return
        row: dict[str, Values] = {name: [column[done.of]] for name, column in self._known.items()}
        self._runs_table.add({**row, "windows": np.array([done.rows]), "features": done.mean[None]})
        self._close_subject(self._subjects.take(self._known["subject"][done.of], done.mean))

    def _close_subject(self, done: Group | None) -> None:
        if done is not None:
            row: dict[str, Values] = {"subject": [done.of], "runs": np.array([done.rows])}
            self._subjects_table.add({**row, "features": done.mean[None]})
