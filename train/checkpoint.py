"""Where a run stood, on a disk or in a bucket: whole or not there, told apart from damaged ones, without pickle.

    checkpoints/step-800/model.safetensors       parameters and buffers
                         optimizer.safetensors   <kind>/<parameter name>
                         rng.safetensors         cpu, cuda: (rank, bytes)
                         <name>.safetensors      what else the run keeps (averaged weights, say)
                         state.json              step, loader, recipe, dataset digests, ...
                         manifest.json           size and sha256 of the others; written last

Of tensors that are sharded over ranks, each rank writes a file of its own, and `layout.json` says what belongs where
(train/checkpoint_sharded.py). In a bucket the files lie one folder deeper (train/checkpoint_shelf.py).
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from fmristream.errors import CorruptDataError, ResumeError, UsageError
from train.checkpoint_manifest import MANIFEST, Folder, Manifest, check_listed, read_listed, read_manifest
from train.checkpoint_sharded import distributed_like, read_sharded
from train.checkpoint_shelf import Shelf, open_shelf, step_of
from train.checkpoint_writing import LAYOUT, STATE, Keep, new_token, take, write
from train.fence import attempts_at, counts
from train.launch import World

# What the end of a path may say in place of a step.
BEST = "best"
_ALWAYS = ("model", "optimizer", "rng")
_TENSORS = ".safetensors"
Place = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that a run needs to go on after `step` optimiser steps."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: Mapping[str, Any]
    extra: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    is_best: bool = False  # it was, when it was written


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A checkpoint that is not what was written, and why."""

    folder: PurePosixPath
    reason: str


class Stored:
    """A checkpoint that is there, its manifest, state and layout read; tensors are read, and checked, section by section."""

    def __init__(self, folder: Folder) -> None:
        """Raise CorruptDataError where one of the three is not what was written."""
        self._folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._held: dict[str, dict[str, Tensor]] = {}
        try:
            self.state: dict[str, Any] = json.loads(self._bytes(STATE))
            layout = json.loads(self._bytes(LAYOUT)) if LAYOUT in self.manifest.files else {}
        except (KeyError, ValueError) as error:
            raise self._other_than_listed(error) from error
        self._layout: dict[str, Any] = layout
        if missing := [section for section in _ALWAYS if section not in self.sections]:
            raise self._other_than_listed(f"{missing[0]}{_TENSORS} is missing")

    @property
    def where(self) -> str:
        """Its path or URL, as it may be shown."""
        return self._folder.where

    @property
    def name(self) -> str:
        """`step-N`."""
        return f"step-{self.step}"

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def sections(self) -> tuple[str, ...]:
        """Model, optimizer, rng, and the names of what else it keeps tensors of."""
        whole = {name.removesuffix(_TENSORS) for name in self.manifest.files if name.endswith(_TENSORS)}
        parts = {part["file"] for entries in self._layout.values() for e in entries.values() for part in e["parts"]}
        return tuple(sorted((whole - {part.removesuffix(_TENSORS) for part in parts}) | set(self._layout)))

    def verify(self) -> None:
        """Read all that is listed; CorruptDataError where a byte is not what was written. What is not sharded is kept."""
        for name, listed in self.manifest.files.items():
            section = name.removesuffix(_TENSORS)
            if name.endswith(_TENSORS) and not self._layout:
                self._held[section] = self._tensors(name)
            else:
                check_listed(self._folder, listed)

    def section(self, name: str, like: Callable[[str], Tensor | None] = lambda key: None) -> dict[str, Tensor]:
        """Tensors of a section, checked.

        Args:
            name: such as `model`.
            like: the tensor that a stored one will go into, where there is one: it comes cut into the same parts.

        Raises:
            CorruptDataError: a file is missing, or is not what was written.
        """
        if name in self._layout:
            return read_sharded(self._layout[name], read=self._tensors, like=like, where=self.where)
        tensors = self._held.pop(name, None) or self._tensors(f"{name}{_TENSORS}")
        return {
            key: tensor if (target := like(key)) is None else distributed_like(tensor, target)
            for key, tensor in tensors.items()
        }

    def whole(self) -> Checkpoint:
        """Everything, every byte checked."""
        found = {name: self.section(name) for name in self.sections}
        always = {name: found.pop(name) for name in _ALWAYS}
        return Checkpoint(step=self.step, state=self.state, extra=found, is_best=self.manifest.is_best, **always)

    def _tensors(self, file: str) -> dict[str, Tensor]:
        try:
            return dict(tensors_from_bytes(self._bytes(file)))
        except (KeyError, ValueError, SafetensorError) as error:
            raise self._other_than_listed(error) from error

    def _bytes(self, file: str) -> bytes:
        return read_listed(self._folder, self.manifest.files[file])

    def _other_than_listed(self, why: object) -> CorruptDataError:
        return CorruptDataError(f"{self.where}: the checkpoint does not hold what its manifest lists: {why}")


def save_checkpoint(root: Place, checkpoint: Checkpoint, *, keep_last: int, keep_best: int = 0) -> str:
    """Write one checkpoint below `root`, then remove old ones; only one process may do so. Gives where it is.

    Args:
        root: a folder or a URL.
        checkpoint: all of it.
        keep_last: how many of the newest stay.
        keep_best: how many of those stay beside them that were the best when they were written.
    """
    assert not set(checkpoint.extra) & set(_ALWAYS)
    shelf = open_shelf(root)
    sections = {name: getattr(checkpoint, name) for name in _ALWAYS} | dict(checkpoint.extra)
    snapshot = take(sections, checkpoint.state, step=checkpoint.step, token=new_token(), is_best=checkpoint.is_best)
    write(shelf, snapshot, keep=Keep(last=keep_last, best=keep_best))
    return shelf.folder(f"step-{checkpoint.step}").where


def checkpoint_steps(root: Place) -> list[int]:
    """Steps that something is there of, newest first; whether they are whole is not looked at."""
    return open_shelf(root).steps()


def newest_verified(shelf: Shelf, *, best: bool = False) -> tuple[Stored | None, list[Damaged]]:
    """The newest checkpoint that is whole, or the newest of the best ones, and the newer ones that are not whole.

    What a superseded attempt wrote after a newer one had begun before it leads nowhere, and is passed over.

    Raises:
        ResumeError: nothing else is left, so that the run would begin anew.
        StorageError: the store cannot be reached; nothing is said of its checkpoints then.
    """
    damaged: list[Damaged] = []
    undone: list[str] = []
    attempts = attempts_at(shelf)
    for step in shelf.steps():
        try:
            found = Stored(shelf.folder(f"step-{step}"))
            if not counts(step=step, attempt=found.manifest.attempt, attempts=attempts):
                undone.append(found.name)
                continue
            if best and not found.manifest.is_best:
                continue
            found.verify()
        except CorruptDataError as error:
            damaged.append(Damaged(folder=PurePosixPath(shelf.where) / f"step-{step}", reason=str(error)))
        else:
            return found, damaged
    if undone and attempts[-1].step and not best:
        raise ResumeError(
            f"{shelf.where}: holds {', '.join(undone)} of a superseded attempt only, and the run went on from another one, "
            f"which is gone; give another --out, or remove {shelf.where}/attempts to go on from {undone[0]}"
        )
    return None, damaged


def newest_whole(root: Place) -> tuple[Checkpoint | None, list[Damaged]]:
    """The newest checkpoint that is whole, and the newer ones that are not."""
    found, damaged = newest_verified(open_shelf(root))
    return (found.whole() if found else None), damaged


def load_checkpoint(folder: Place) -> Checkpoint:
    """Read one checkpoint, every byte checked.

    Raises:
        CorruptDataError: a file is missing, or is not what was written.
    """
    return Stored(_folder_of(folder)).whole()


def find_checkpoint(place: Place) -> tuple[Stored | None, list[Damaged]]:
    """The checkpoint that a path or URL means, on a disk or in a bucket, and damaged ones that were passed over.

    `RUN` and `RUN/checkpoints` mean the newest whole one, `RUN/best` and `RUN/checkpoints/best` the best whole one, and
    `RUN/checkpoints/step-N` that one. A run whose recipe keeps its checkpoints elsewhere is followed there.

    Raises:
        CorruptDataError: the one that was named is damaged.
        StorageError: the store cannot be reached.
    """
    text = os.fspath(place).rstrip("/")
    base, _, last = text.rpartition("/")
    if step_of(last) is not None or _has_manifest(text):
        found = Stored(_folder_of(text))
        found.verify()
        return found, []
    is_best = last == BEST and bool(base)
    text = base if is_best else text
    for root in checkpoint_roots(text):
        shelf = _shelf_or_none(root)
        if shelf is not None and shelf.steps():
            return newest_verified(shelf, best=is_best)
    return None, []


def checkpoint_roots(run: str) -> tuple[str, ...]:
    """Where the checkpoints of a run may lie: where its recipe says, beside it, or there itself."""
    return tuple(root for root in (checkpoints_elsewhere(run), f"{run}/checkpoints", run) if root)


def _folder_of(place: Place) -> Folder:
    base, _, name = (
        os.path.abspath(place).rpartition("/") if _is_local(place) else str(place).rstrip("/").rpartition("/")
    )
    return open_shelf(base or "/").folder(name)


def _is_local(place: Place) -> bool:
    return "://" not in os.fspath(place)


def _has_manifest(text: str) -> bool:
    """Whether a local folder is a checkpoint, under whatever name."""
    return _is_local(text) and os.path.isfile(os.path.join(text, MANIFEST))


def checkpoints_elsewhere(run: str) -> str:
    """Where a run that is here keeps its checkpoints; empty where they are beside it."""
    recipe = os.path.join(run, "recipe.toml")
    if not _is_local(run) or not os.path.isfile(recipe):
        return ""
    from train.config import load_recipe

    return load_recipe(recipe).train.checkpoints


def _shelf_or_none(root: str) -> Shelf | None:
    try:
        return open_shelf(root)
    except UsageError:
        return None


def gather_rng(world: World) -> dict[str, Tensor]:
    """Every rank's random state as (rank, bytes), on every rank."""
    states = {"cpu": world.stack(torch.get_rng_state())}
    if world.device.type == "cuda":
        states["cuda"] = world.stack(torch.cuda.get_rng_state(world.device))
    return states


def restore_rng(states: Mapping[str, Tensor], world: World) -> None:
    """Go on with this rank's random state; a rank that was not there when it was saved keeps its own."""
    # Cloned: torch 2.13 crashes on a state that is not aligned to 16 bytes, as rows of a loaded file may not be.
    if "cpu" in states and world.rank < len(states["cpu"]):
        torch.set_rng_state(states["cpu"][world.rank].clone())
    if "cuda" in states and world.rank < len(states["cuda"]) and world.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][world.rank].clone(), world.device)
