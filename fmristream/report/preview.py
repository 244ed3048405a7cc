"""A picture of every run: mean, SD and tSNR slices beside a carpet plot; of grayordinates the carpet alone."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmristream.catalog.run import Run
from fmristream.errors import StorageError
from fmristream.report.look import look_at
from fmristream.report.pictures import draw, require_matplotlib
from fmristream.shards.dataset import Dataset

# File systems take 255 bytes.
MAX_STEM = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A run and the file that shows it."""

    run: str
    path: str


def preview(
    dataset: Dataset,
    folder: str,
    *,
    runs: Sequence[int | str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Picture]:
    """Draw runs into a folder, one PNG each, and yield them as they are done.

    Args:
        dataset: an open dataset.
        folder: a local folder; made if it is not there. Pictures of an earlier call are replaced.
        runs: names or positions; None draws all.
        progress: called with (runs done, runs).

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: there is no such run.
        CorruptDataError: stored bytes have changed.
        StorageError: the folder cannot be written.
    """
    require_matplotlib()
    wanted = list(dataset.runs) if runs is None else [dataset.run(run) for run in runs]
    names = file_names(wanted)
    for done, run in enumerate(wanted, 1):
        path = Path(folder) / names[run.name]
        page = draw(look_at(dataset, run), run)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(page)
        except OSError as error:
            raise StorageError(f"{path}: the picture cannot be written: {error.strerror or error}") from error
        yield Picture(run=run.name, path=str(path))
        if progress is not None:
            progress(done, len(wanted))


def file_names(runs: Sequence[Run]) -> dict[str, str]:
    """A PNG file name for each run: its name without folders, numbered where two would be one."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for run in runs:
        stem = re.sub(r"[^\w.+-]+", "_", run.name).strip("._")[:MAX_STEM] or "run"
        number, name = 1, f"{stem}.png"
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}.png"
        taken.add(name.lower())
        names[run.name] = name
    return names
