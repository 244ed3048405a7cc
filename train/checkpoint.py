"""Where a run stood, on disk: whole or not there, told apart from damaged ones, without pickle.

    checkpoints/step-800/model.safetensors       parameters and buffers
                         optimizer.safetensors   <kind>/<parameter name>
                         rng.safetensors         cpu, cuda: (rank, bytes)
                         <name>.safetensors      what else the run keeps (averaged weights, say)
                         state.json              step, loader, recipe, dataset digests, ...
                         manifest.json           size and sha256 of the others; written last

A folder is filled under a temporary name, flushed to disk and renamed, so a kill leaves a whole checkpoint or none.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from fmristream.errors import CorruptDataError
from train.launch import World

FORMAT = 1
_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_TENSOR_FILES = ("model", "optimizer", "rng")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that a run needs to go on after `step` optimiser steps."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    rng: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]
    extra: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A checkpoint folder that is not what was written, and why."""

    folder: Path
    reason: str


def save_checkpoint(root: Path, checkpoint: Checkpoint, *, keep_last: int) -> Path:
    """Write one checkpoint below `root`, then remove all but the newest `keep_last`; only one process may do so."""
    root.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(root)
    final = root / f"step-{checkpoint.step}"
    unfinished = root / f".unfinished-{final.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    assert not set(checkpoint.extra) & set(_TENSOR_FILES)
    tensors = {name: getattr(checkpoint, name) for name in _TENSOR_FILES} | dict(checkpoint.extra)
    files = {f"{name}.safetensors": _tensor_bytes(values) for name, values in tensors.items()}
    files["state.json"] = _json_bytes({"format": FORMAT, "step": checkpoint.step, **checkpoint.state})
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    for name, data in files.items():
        _write(unfinished / name, data)
    _write(
        unfinished / "manifest.json", _json_bytes(_signed({"format": FORMAT, "step": checkpoint.step, "files": listed}))
    )
    _flush_folder(unfinished)
    if final.exists():  # a damaged one that this run fell back from and has now reached again
        _set_aside(final)
    unfinished.rename(final)
    _flush_folder(root)
    for step in checkpoint_steps(root)[keep_last:]:
        _set_aside(root / f"step-{step}")
    _remove_unfinished(root)
    return final


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a folder, newest first; whether they are whole is not looked at."""
    if not root.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[Damaged]]:
    """The newest checkpoint that is whole, and the newer ones that are not."""
    damaged: list[Damaged] = []
    for step in checkpoint_steps(root):
        try:
            return load_checkpoint(root / f"step-{step}"), damaged
        except CorruptDataError as error:
            damaged.append(Damaged(folder=root / f"step-{step}", reason=str(error)))
    return None, damaged


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint, every byte checked.

    Raises:
        CorruptDataError: a file is missing, or is not what was written.
    """
    manifest = _read_manifest(folder)
    files = {name: _read_listed(folder / name, entry) for name, entry in manifest["files"].items()}
    try:
        tensors = {name: tensors_from_bytes(files.pop(f"{name}.safetensors")) for name in _TENSOR_FILES}
        state = json.loads(files.pop("state.json"))
        extra = {name.removesuffix(".safetensors"): tensors_from_bytes(data) for name, data in files.items()}
    except (KeyError, ValueError, SafetensorError) as error:
        raise CorruptDataError(f"{folder}: the checkpoint does not hold what its manifest lists: {error}") from error
    return Checkpoint(step=manifest["step"], state=state, extra=extra, **tensors)


def gather_rng(world: World) -> dict[str, torch.Tensor]:
    """Every rank's random state as (rank, bytes), on every rank."""
    states = {"cpu": world.stack(torch.get_rng_state())}
    if world.device.type == "cuda":
        states["cuda"] = world.stack(torch.cuda.get_rng_state(world.device))
    return states


def restore_rng(states: Mapping[str, torch.Tensor], world: World) -> None:
    """Go on with this rank's random state; a rank that was not there when it was saved keeps its own."""
    # Cloned: torch 2.13 crashes on a state that is not aligned to 16 bytes, as rows of a loaded file may not be.
    if "cpu" in states and world.rank < len(states["cpu"]):
        torch.set_rng_state(states["cpu"][world.rank].clone())
    if "cuda" in states and world.rank < len(states["cuda"]) and world.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][world.rank].clone(), world.device)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        unsigned = {key: value for key, value in manifest.items() if key != "sha256"}
        if _signed(unsigned) != manifest:
            raise CorruptDataError(f"{path}: does not match its own checksum")
    except OSError as error:
        raise CorruptDataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise CorruptDataError(f"{path}: is not the JSON that was written: {error}") from error
    if manifest["format"] != FORMAT:
        raise CorruptDataError(f"{path}: checkpoint format {manifest['format']}, this trainer reads {FORMAT}")
    return dict(manifest)


def _read_listed(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptDataError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) != entry["bytes"]:
        raise CorruptDataError(f"{path}: has {len(data)} bytes, {entry['bytes']} were written")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CorruptDataError(f"{path}: its sha256 is not that of what was written")
    return data


def _tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return bytes(
        tensors_to_bytes({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    )


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of its own canonical JSON."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    return {**manifest, "sha256": hashlib.sha256(canonical).hexdigest()}


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(folder: Path) -> None:
    """Take a checkpoint out of sight before its files go, so that a kill leaves no half of it."""
    folder.rename(folder.with_name(f".unfinished-{folder.name}-{uuid.uuid4().hex[:8]}"))


def _remove_unfinished(root: Path) -> None:
    for path in root.glob(".unfinished-*"):
        shutil.rmtree(path)
