"""Where results go: a new folder, filled beside its place and renamed, so that a kill leaves all of them or none."""

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from fmristream.errors import EngineError, FmriStreamError, UsageError
from train.files import flush
from train.launch import World

T = TypeVar("T")


def require_free(out: Path, world: World) -> None:
    """Raise UsageError, on every rank, where results are there already: before anything is computed."""
    taken = world.is_main and out.exists() and (not out.is_dir() or any(out.iterdir()))
    if world.from_main(int(taken)):
        raise UsageError(f"{out}: is there already; give another --out, or remove it")


@contextmanager
def new_folder(out: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A folder to fill; it has its name when the block ends well.

    Args:
        out: must not be there, or be empty.
        replaces: what is there goes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.parent / f".unfinished-{out.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        yield unfinished
        for path in unfinished.iterdir():
            flush(path)
        flush(unfinished)
        if replaces and out.exists():
            shutil.rmtree(out)
        elif out.exists():
            out.rmdir()  # an empty one; another is not removed
        unfinished.rename(out)
        flush(out.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def together(world: World, action: Callable[[], T]) -> T:
    """Do something on every rank without exchanges in it; where it fails on one, every rank raises and none waits.

    Raises:
        EngineError: it failed on another rank, which says why.
    """
    failure: Exception | None = None
    found: T | None = None
    try:
        found = action()
    except (FmriStreamError, OSError) as error:
        failure = error
    failed = world.stack(torch.tensor([int(failure is not None)])).flatten()
    if failure is not None:
        raise failure
    if bool(failed.any()):
        raise EngineError(f"rank {int(failed.argmax())} failed, and says why; nothing was written")
    return found  # type: ignore[return-value]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same names; nothing known is an empty cell."""
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["subject"])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if value is None or value != value else value for name, value in row.items()})
