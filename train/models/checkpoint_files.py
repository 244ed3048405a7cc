"""Read checkpoints that others wrote: tensors and plain values, never anything that a pickle would like to run.

A pickle is a program. Here one is read by `torch.load(weights_only=True)` alone, which knows tensors and plain containers
and refuses the rest before it runs; the archive around it is looked at first, so that a small file cannot unpack to a large
one.
"""

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fmristream.errors import UsageError
from train.models.load import WeightsError, printable, read_weights, unwrapped

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# weights_only itself was bypassed before that: CVE-2025-32434 (fixed in 2.6), CVE-2026-24747 (fixed in 2.10).
OLDEST_SAFE_TORCH = (2, 10)
# Where a checkpoint keeps its weights -> who writes such files.
STATE_KEYS = {"state_dict": "Lightning", "model_state_dict": "model_state_dict beside other states", "model": "model"}
HYPER_PARAMETERS = "hyper_parameters"
# Under this name the files of `train.export` say which network they belong to.
OWN_METADATA = "fmristream"
_NAMES_SHOWN = 5

HOW_TO_EXTRACT = """If you trust who made it, take the tensors out where nothing can be lost or sent away
(a container without network and without your data), and import what that gives:
    import torch
    checkpoint = torch.load({name!r}, map_location="cpu", weights_only=False)
    state = checkpoint.get("state_dict", checkpoint.get("model_state_dict", checkpoint))
    torch.save(dict(state), "state.pt")
What its hyper-parameters said is then given by --set or --config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """What a file holds: tensors by name, and the options of the network where it tells them.

    `name` is that of the file without its folders, `wrapper` what stood before every name and was taken off, `network` the
    one that a file of ours names.
    """

    name: str
    size_bytes: int
    sha256: str
    layout: str
    tensors: Mapping[str, Tensor]
    wrapper: str = ""
    options: Mapping[str, Any]
    network: str | None = None


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Read .safetensors, or a pickle of tensors and plain values.

    Raises:
        UsageError: not a kind of file that can be read.
        WeightsError: the file is damaged, holds no state_dict of tensors, or asks for code to be run.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(
            f"{path}: is a folder; name the file of weights in it, and give its config.json by --config where it has one"
        )
    if path.suffix not in (".safetensors", *PICKLES):
        raise UsageError(f"{path}: weights are read from .safetensors, {', '.join(PICKLES)}; got {path.suffix!r}")
    size, sha256 = _digest(path)
    network: str | None = None
    state: Mapping[Any, Any]
    if path.suffix == ".safetensors":
        layout, state, (network, options) = "safetensors", read_weights(path), _own_metadata(path)
    else:
        layout, state, options = _parts(_unpickle(path), path)
    tensors, wrapper = unwrapped(_checked(state, path))
    return CheckpointFile(
        name=path.name,
        size_bytes=size,
        sha256=sha256,
        layout=layout,
        tensors=tensors,
        wrapper=wrapper,
        options=options,
        network=network,
    )


def _digest(path: Path) -> tuple[int, str]:
    try:
        with open(path, "rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: there is no such file of weights") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error


def trained_options(path: Path) -> dict[str, Any]:
    """What a .safetensors file of `train.export` says of its network that no shape tells; nothing for files of others.

    Raises:
        WeightsError: its metadata are not those that are written.
    """
    network, options, unseen = _about(path)
    # Files of older releases have the recipe's options alone, in which TFF's first phase may have heads that it has not.
    return options if unseen is None and network != "tff1" else unseen or {}


def _own_metadata(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The network and its options that a file of `train.export` names; None and none for files of others."""
    network, options, _ = _about(path)
    return network, options


def _about(path: Path) -> tuple[str | None, dict[str, Any], dict[str, Any] | None]:
    """(network, its options, those that no shape tells) as `train.export` writes them; files of others have none."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(OWN_METADATA)
    if text is None:
        return None, {}, None
    try:
        about = json.loads(text)
        return str(about["model"]), dict(about["options"]), dict(about["network"]) if "network" in about else None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: its metadata do not say what train.export writes ({error!r}); export again"
        ) from error


def _unpickle(path: Path) -> Any:
    _check_torch(path)
    with open(path, "rb") as file:
        _check_archive(file, path)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged and hostile pickles make the reader fail in any way there is
            raise WeightsError(_refusal(path, error)) from error


def _check_torch(path: Path) -> None:
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_SAFE_TORCH:
        raise WeightsError(
            f"{path}: torch {torch.__version__} does not refuse every harmful pickle; update to "
            f"{'.'.join(map(str, OLDEST_SAFE_TORCH))} or newer"
        )


def _check_archive(file: IO[bytes], path: Path) -> None:
    """What torch saves is stored uncompressed; an archive that unpacks to more than its size was not made by it."""
    if file.read(2) != b"PK":
        return  # the layout before torch 1.6, which is no archive
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path}: not a whole file ({error}); fetch it again") from error
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise WeightsError(
            f"{path}: is an archive that unpacks to more than it holds, which torch never writes; save the state_dict anew"
        )


def _refusal(path: Path, error: Exception) -> str:
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    if asked_for is None:
        first_line = printable((str(error).splitlines() or [""])[0][:200])
        return f"{path}: not a whole file of tensors and plain values ({type(error).__name__}: {first_line}); fetch it again"
    wanted = printable(asked_for[1])
    return (
        f"{path}: refused, because its pickle asks for {wanted}, which is neither a tensor nor a plain value: to read "
        f"it would be to run code that came with the file. {HOW_TO_EXTRACT.format(name=path.name)}"
    )


def _parts(loaded: Any, path: Path) -> tuple[str, Mapping[Any, Any], dict[str, Any]]:
    """The layout, the state_dict and the hyper-parameters in what a pickle held."""
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {type(loaded).__name__}")
    found = [key for key in STATE_KEYS if isinstance(loaded.get(key), Mapping)]
    if len(found) > 1:
        raise WeightsError(f"{path}: holds {' and '.join(found)}; keep the one that is wanted and save it alone")
    if not found:
        return "state_dict", loaded, {}
    hyper_parameters = loaded.get(HYPER_PARAMETERS)
    options = hyper_parameters if isinstance(hyper_parameters, Mapping) else {}
    return (
        STATE_KEYS[found[0]],
        loaded[found[0]],
        {name: value for name, value in options.items() if isinstance(name, str)},
    )


def _checked(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The state_dict, if it is one: names and dense tensors that lie within what the file stores."""
    odd = [str(name) for name, value in state.items() if not isinstance(name, str) or not _is_plain(value)]
    if odd or not state:
        shown = ", ".join(map(printable, odd[:_NAMES_SHOWN])) + (", ..." if len(odd) > _NAMES_SHOWN else "")
        raise WeightsError(
            f"{path}: expected a state_dict of plain tensors, got {f'other values for {shown}' if odd else 'an empty one'}; "
            "save the state_dict of the network alone"
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def _is_plain(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return math.prod(value.shape) * value.element_size() <= value.untyped_storage().nbytes()
