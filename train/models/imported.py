"""An import on disk: the weights, a recipe that names their network, and what is known of where they came from.

    DIR/model.safetensors   the tensors, as they were stored
        recipe.toml         grid, window and model section, for `python -m train`
        imported.json       network, all options and where each is known from, source, what was ignored and why

A folder is filled beside its place and renamed, so a kill leaves a whole import or none. Nothing in it names a machine, a
folder or a user.
"""

import hashlib
import json
import math
import os
import shutil
import tomllib
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmristream._version import __version__
from fmristream.errors import UsageError
from train.config import recipe_from
from train.files import flush
from train.models.checkpoint_files import CheckpointFile
from train.models.importing import Fitted, load_fitted
from train.models.load import WeightsError, printable, read_weights
from train.models.published import FAMILIES

FORMAT = 1
WEIGHTS, RECIPE, ABOUT = "model.safetensors", "recipe.toml", "imported.json"
# What the trainer takes from the data and the objective; a recipe may not say it too.
_NOT_IN_RECIPES = ("img_size", "in_chans", "outputs", "num_brain_voxels", "num_timepoints_per_voxel")
_OF_OUR_OWN = "exported by this trainer: the terms of its data, and of the weights that it began with, apply"
# A head that learns by contrast: which head comes next is for the recipe's objective to say.
_HEAD_OF_PRETRAINING = ("head", "emb")


def write_import(folder: Path, fitted: Fitted, file: CheckpointFile, *, force: bool = False) -> None:
    """Write the import as a new folder, or none of it.

    Args:
        folder: must not exist; with `force` it may hold an earlier import, which is replaced, or nothing.
        fitted: what is written.
        file: where it came from.
        force: replace an earlier import.

    Raises:
        UsageError: the folder is taken.
    """
    from safetensors.torch import save_file

    _check_free(folder, force=force)
    recipe = recipe_text(fitted, file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".unfinished-{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        unfinished.mkdir()
        (unfinished / RECIPE).write_text(recipe, encoding="utf-8")
        save_file(alone(fitted.tensors), unfinished / WEIGHTS)
        # safetensors keeps its files for their owner alone; who may read an import is for the umask to say.
        (unfinished / WEIGHTS).chmod((unfinished / RECIPE).stat().st_mode)
        (unfinished / ABOUT).write_bytes(_json(_about(fitted, file, sha256=_sha256(unfinished / WEIGHTS))))
        for name in (WEIGHTS, RECIPE, ABOUT):
            flush(unfinished / name)
        flush(unfinished)
        _put_in_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    flush(folder.parent)


def load_imported(folder: Path) -> nn.Module:
    """The network of an import with its weights; a head that was left behind begins anew.

    Raises:
        WeightsError: a file is missing, or is not what was written.
    """
    about = read_about(folder)
    weights = imported_weights(folder)
    return load_fitted(about["model"], about["options"], weights, backbone=bool(about["backbone_only"]))


def imported_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an import.

    Raises:
        WeightsError: a file is missing, or is not what was written.
    """
    if _sha256(folder / WEIGHTS) != read_about(folder)["weights_sha256"]:
        raise WeightsError(f"{folder / WEIGHTS}: its sha256 is not that of what was imported; import it again")
    return read_weights(folder / WEIGHTS)


def read_about(folder: Path) -> dict[str, Any]:
    """What imported.json says."""
    path = folder / ABOUT
    try:
        about = json.loads(path.read_bytes())
        if about["format"] != FORMAT or not {"model", "options", "weights_sha256", "backbone_only"} <= set(about):
            raise WeightsError(f"{path}: expected format {FORMAT} of an import, got {about['format']}; import it again")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give the folder of an import") from error
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: not the JSON that was written ({error!r}); import it again") from error
    return dict(about)


def recipe_text(fitted: Fitted, file: CheckpointFile) -> str:
    """A recipe with what the weights fix; `train.config.load_recipe` reads it."""
    options = fitted.options
    data: dict[str, Any] = {}
    if "img_size" in options:
        data = {"window": options["img_size"][3], "grid": list(options["img_size"][:3])}
    elif "num_timepoints_per_voxel" in options:
        data = {"window": options["num_timepoints_per_voxel"]}
    own = {name: value for name, value in options.items() if name not in _NOT_IN_RECIPES}
    model = {"name": fitted.network, **dict(item for item in own.items() if item != _HEAD_OF_PRETRAINING)}
    lines = [
        f"# The network of {printable(file.name)} (sha256 {file.sha256[:12]}); {ABOUT} says where each option is known from.",
        "# Give the dataset with --set data.url=URL, normalised as the weights were trained.",
    ]
    for section, values in (("data", data), ("model", model)):
        if values:
            lines += ["", f"[{section}]", *(f"{name} = {_toml(value, name)}" for name, value in values.items())]
    text = "\n".join(lines) + "\n"
    recipe_from(tomllib.loads(text))  # what the trainer would refuse is not written
    return text


def _toml(value: Any, name: str) -> str:
    """A number, a word, true, false, or a list of them: JSON's spelling is TOML's."""
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str) or (isinstance(item, int | float) and math.isfinite(item)) for item in items):
        raise UsageError(
            f"{name}: {value!r} cannot be said in a recipe; expected a number, a word, true, false or a list"
        )
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _about(fitted: Fitted, file: CheckpointFile, *, sha256: str) -> dict[str, Any]:
    import safetensors

    return {
        "format": FORMAT,
        "model": fitted.network,
        "backbone_only": fitted.backbone,
        "options": {name: list(value) if isinstance(value, tuple) else value for name, value in fitted.options.items()},
        "known_from": dict(fitted.known_from),
        "source": {
            "name": file.name,
            "bytes": file.size_bytes,
            "sha256": file.sha256,
            "layout": file.layout,
            "stripped": file.wrapper,
        },
        "tensors": len(fitted.tensors),
        "values": sum(tensor.numel() for tensor in fitted.tensors.values()),
        "dtypes": dtypes(fitted.tensors),
        "ignored": dict(fitted.ignored),
        "licence": licence(fitted, file),
        "weights_sha256": sha256,
        "versions": {"fmristream": __version__, "torch": torch.__version__, "safetensors": safetensors.__version__},
    }


def licence(fitted: Fitted, file: CheckpointFile) -> str:
    """What is known of the terms of the weights."""
    return _OF_OUR_OWN if file.network else FAMILIES[fitted.network].licence


def dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tensors are of each dtype."""
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()))


def alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, dense, each with memory of its own; copied only where they are not."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        storage = dense.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != dense.numel() * dense.element_size():
            dense = dense.clone()
        taken.add(dense.untyped_storage().data_ptr())
        found[name] = dense
    return found


def _check_free(folder: Path, *, force: bool) -> None:
    """Only an earlier import, or an empty folder, is ever replaced."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder; give another --out")
    inside = {path.name for path in folder.iterdir()}
    if inside and not force:
        raise UsageError(f"{folder}: is there already; give another --out, or --force to replace an earlier import")
    if not inside <= {WEIGHTS, RECIPE, ABOUT}:
        others = ", ".join(sorted(inside - {WEIGHTS, RECIPE, ABOUT})[:3])
        raise UsageError(f"{folder}: holds other things than an import ({others}); give another --out")


def _put_in_place(unfinished: Path, folder: Path) -> None:
    if not folder.exists():
        unfinished.rename(folder)
        return
    old = folder.parent / f".unfinished-{folder.name}-{uuid.uuid4().hex[:8]}"
    folder.rename(old)
    try:
        unfinished.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); import it again") from error


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
