"""Which weights are meant where somebody names a run: those that its report scored, averaged where its checkpoint averages.

    RUN                          the checkpoint that RUN/report.json is of (the last, or the best); without one the newest whole
    RUN/best, RUN/checkpoints/step-800, s3://bucket/run/checkpoints/step-800
                                 that checkpoint

A checkpoint that keeps a running mean (`train.ema`) means that: validation, test and the report are of it. One rule for
`--task`, `start.from`, `python -m train.export` and `python -m train.attribution`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fmristream.errors import CorruptDataError
from fmristream.storage.urls import display_url
from train.checkpoint import Stored, checkpoint_roots, find_checkpoint
from train.files import read_json

_MEAN = "ema"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """What a checkpoint says of a network.

    Attributes:
        step: optimiser steps until then.
        tensors: parameters and buffers, of the running mean where there is one.
        averaged: whether there is one.
        state: what else the checkpoint says.
        folder: of the run, if it is on this machine.
        notes: what the user is to be told.
    """

    step: int
    tensors: Mapping[str, Tensor]
    averaged: bool
    state: Mapping[str, Any]
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`step-N`."""
        return f"step-{self.step}"

    @property
    def which(self) -> str:
        """In words."""
        return "the running mean (train.ema)" if self.averaged else "as the last step left them"


def find_weights(source: str | os.PathLike[str]) -> Weights | None:
    """The weights that a path or URL means, every byte checked; None where there is no checkpoint.

    Raises:
        CorruptDataError: none that is meant is whole.
        StorageError: the store cannot be reached.
    """
    text = os.fspath(source).rstrip("/")
    folder = run_folder(text)
    found, notes = _scored(text, folder)
    if found is None:
        found, damaged = find_checkpoint(text)
        notes += tuple(f"{one.folder.name} is damaged and passed over: {one.reason}" for one in damaged)
        if found is None and damaged:
            raise CorruptDataError(
                f"{display_url(text)}: has no whole checkpoint; {len(damaged)} are damaged: {notes[-1]}"
            )
    if found is None:
        return None
    tensors, means = found.section("model"), found.section(_MEAN) if _MEAN in found.sections else {}
    tensors |= {name: mean.to(tensors[name].dtype) for name, mean in means.items()}
    if means:
        notes += (f"weights: the running mean that {found.name} keeps (train.ema), which its run scored",)
    return Weights(
        step=found.step, tensors=tensors, averaged=bool(means), state=found.state, folder=folder, notes=notes
    )


def run_folder(source: str) -> Path | None:
    """The folder of the run that a path belongs to; None for a URL."""
    if "://" in source:
        return None
    folder = Path(source)
    if (folder / "recipe.toml").is_file() or (folder / "checkpoints").is_dir():
        return folder
    # RUN/best, RUN/checkpoints, RUN/checkpoints/best and RUN/checkpoints/step-N
    parents = [one for one in folder.absolute().parents[:2] if (one / "recipe.toml").is_file()]
    return parents[0] if parents else None


def _scored(source: str, folder: Path | None) -> tuple[Stored | None, tuple[str, ...]]:
    """The checkpoint that a run's report is of, where the run itself was named; and what is to be said."""
    report = read_json(folder / "report.json") if folder is not None and folder == Path(source) else None
    step = None if report is None else report.get("step")
    if step is None:
        return None, ()
    why = "it is not there"
    for root in checkpoint_roots(source):
        try:
            found, _ = find_checkpoint(f"{root}/step-{step}")
        except CorruptDataError as error:
            why = str(error)
        else:
            return found, ()
    return None, (f"step-{step}, which the report scored, cannot be taken ({why}): the newest whole one is",)
