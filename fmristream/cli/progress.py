"""Progress on stderr: a bar with rate and remaining time on a terminal, otherwise one line a stage."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from fmristream.cli.words import plural, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Meter(Protocol):
    """What commands tell of their progress."""

    def update(self, stage: str, *, done: int, total: int, unit: str, detail: str = "") -> None:
        """So much of a stage is done; a new stage ends the one before. `unit`: frames, runs or bytes."""
        ...

    def note(self, text: str) -> None:
        """A sentence that is not progress."""
        ...


@contextmanager
def meter(*, quiet: bool) -> Iterator[Meter]:
    """A meter that suits stderr."""
    if quiet:
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        with _bars() as bars:
            yield _Bars(bars)


class _Silent:
    def update(self, stage: str, *, done: int, total: int, unit: str, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Lines:
    """Says each stage once, when its first piece is done."""

    def __init__(self) -> None:
        self._said = ""

    def update(self, stage: str, *, done: int, total: int, unit: str, detail: str = "") -> None:
        if stage != self._said and done:
            self._said = stage
            print(f"{stage}: {amount(total, unit)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._stage = ""
        self._task: TaskID | None = None

    def update(self, stage: str, *, done: int, total: int, unit: str, detail: str = "") -> None:
        if stage != self._stage:
            self._finish()
            self._stage = stage
        if self._task is None:
            if not done:  # a stage that has nothing to do is not shown
                return
            self._task = self._progress.add_task(stage, total=total, unit=unit, detail="")
        self._progress.update(self._task, completed=done, total=total, detail=detail)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = None


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{amount(round(speed), task.fields['unit'])}/s" if speed else "", style="dim")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        Rate(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim"),
        console=Console(stderr=True),
    )


def amount(count: int, unit: str) -> str:
    """12,345 frames, 1.2 GB."""
    return size(count) if unit == "bytes" else plural(count, unit.removesuffix("s"))
