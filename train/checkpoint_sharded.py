"""Tensors of which every rank holds a part: what each writes, and how any other number of ranks reads it.

A sharded checkpoint has `model-00000-of-00004.safetensors` of rank 0, 1, ..., and a `layout.json` that says which tensor
consists of which parts:

    {"model": {"weight": {"dtype": "float32", "shape": [10, 4], "parts": [
        {"file": "model-00000-of-00004.safetensors", "offsets": [0, 0], "shape": [3, 4]}, ...]}}}

Reading copies what is stored to where it belongs, so a tensor on other ranks is the same to the bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fmristream.errors import CorruptDataError, UsageError

Layout = Mapping[str, Mapping[str, Any]]  # of one section: tensor -> dtype, shape, parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rank's part of a tensor, as a copy in this process's memory."""

    tensor: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole tensor


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a rank may hold a part of some tensor only."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def pieces_of(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Piece]:
    """Copies of what this rank has to write: its own parts; of what all ranks hold, the first one's."""
    found = {}
    for name, tensor in tensors.items():
        piece = _sharded_piece(name, tensor) if isinstance(tensor, DTensor) else None
        if piece is None and is_main and not isinstance(tensor, DTensor):
            shape = tuple(tensor.shape)
            piece = Piece(tensor=_copied(tensor), offsets=(0,) * len(shape), shape=shape)
        if piece is not None:
            found[name] = piece
    return found


def _sharded_piece(name: str, tensor: DTensor) -> Piece | None:
    """This rank's part; None where it has none, or another rank has the same."""
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise UsageError(f"{name}: is a sum that was not taken yet (Partial); checkpoints are made between steps")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    for place, placement in zip(coordinate, tensor.placements, strict=True):
        if isinstance(placement, Replicate) and place:
            return None
    local = tensor.to_local()
    if not local.numel() and tensor.numel():
        return None
    _, offsets = _region(tensor)
    return Piece(tensor=_copied(local), offsets=offsets, shape=tuple(tensor.shape))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _region(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offsets of this rank's part."""
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offsets)


def describe(pieces: Mapping[str, Piece], file: str) -> dict[str, Any]:
    """A rank's share of a layout, as JSON."""
    return {
        name: {
            "dtype": str(piece.tensor.dtype).removeprefix("torch."),
            "shape": list(piece.shape),
            "parts": [{"file": file, "offsets": list(piece.offsets), "shape": list(piece.tensor.shape)}],
        }
        for name, piece in pieces.items()
    }


def joined(shares: Sequence[Layout], *, where: str) -> dict[str, Any]:
    """The layout of a section from every rank's share.

    Raises:
        CorruptDataError: the parts of a tensor are not the whole of it.
    """
    found: dict[str, Any] = {}
    for share in shares:
        for name, entry in share.items():
            whole = found.setdefault(name, {**entry, "parts": []})
            if (whole["dtype"], whole["shape"]) != (entry["dtype"], entry["shape"]):
                raise CorruptDataError(f"{where}: ranks differ in what {name} is: {whole} and {entry}")
            whole["parts"] += entry["parts"]
    require_whole(found, where=where)
    return found


def require_whole(layout: Layout, *, where: str) -> None:
    """Raise CorruptDataError where the parts of a tensor overlap or leave something out."""
    for name, entry in layout.items():
        parts = [(part["offsets"], part["shape"]) for part in entry["parts"]]
        inside = all(
            len(offsets) == len(shape) == len(entry["shape"])
            and all(o >= 0 and o + s <= n for o, s, n in zip(offsets, shape, entry["shape"], strict=True))
            for offsets, shape in parts
        )
        overlap = inside and any(
            _common(*parts[i], *parts[j]) is not None for i in range(len(parts)) for j in range(i + 1, len(parts))
        )
        count = sum(math.prod(shape) for _, shape in parts)
        if not inside or overlap or count != math.prod(entry["shape"]):
            raise CorruptDataError(f"{where}: the parts of {name} are not the whole of it: {entry}")


def _common(
    offsets: Sequence[int], shape: Sequence[int], other_offsets: Sequence[int], other_shape: Sequence[int]
) -> tuple[list[int], list[int]] | None:
    """Offsets and ends of what two regions share; None where that is nothing."""
    begin = [max(a, b) for a, b in zip(offsets, other_offsets, strict=True)]
    end = [min(a + n, b + m) for a, n, b, m in zip(offsets, shape, other_offsets, other_shape, strict=True)]
    return (begin, end) if all(a < b for a, b in zip(begin, end, strict=True)) else None


def read_sharded(
    layout: Layout,
    *,
    read: Callable[[str], Mapping[str, Tensor]],
    like: Callable[[str], Tensor | None],
    where: str,
) -> dict[str, Tensor]:
    """Tensors of a section, one file in memory at a time; files that hold nothing of this rank's parts are not read.

    Args:
        layout: of the section.
        read: a file's tensors, checked.
        like: the tensor of this process that a stored one will go into: of a sharded one this rank's part is read.
        where: names the checkpoint, for errors.
    """
    require_whole(layout, where=where)
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    by_file: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, entry in layout.items():
        target = like(name)
        shape, offsets = tuple(entry["shape"]), (0,) * len(entry["shape"])
        if isinstance(target, DTensor) and tuple(target.shape) == shape:
            shape, offsets = _region(target)
        wanted[name] = (torch.empty(shape, dtype=getattr(torch, entry["dtype"])), offsets)
        for part in entry["parts"]:
            if _common(offsets, shape, part["offsets"], part["shape"]) is not None:
                by_file.setdefault(part["file"], []).append((name, part))
    for file in sorted(by_file):
        _copy_parts(read(file), by_file[file], wanted, where=f"{where}/{file}")
    return {name: _placed(local, like(name), layout[name]["shape"]) for name, (local, _) in wanted.items()}


def _copy_parts(
    stored: Mapping[str, Tensor],
    parts: Sequence[tuple[str, Mapping[str, Any]]],
    wanted: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    *,
    where: str,
) -> None:
    for name, part in parts:
        local, offsets = wanted[name]
        piece = stored.get(name)
        if piece is None or list(piece.shape) != part["shape"] or piece.dtype != local.dtype:
            raise CorruptDataError(f"{where}: its {name} is not the part that the layout says")
        common = _common(offsets, local.shape, part["offsets"], part["shape"])
        assert common is not None
        to = tuple(slice(a - o, b - o) for a, b, o in zip(*common, offsets, strict=True))
        of = tuple(slice(a - o, b - o) for a, b, o in zip(*common, part["offsets"], strict=True))
        local[to] = piece[of]


def _placed(local: Tensor, target: Tensor | None, shape: Sequence[int]) -> Tensor:
    if not isinstance(target, DTensor) or list(target.shape) != list(shape):
        return local
    return _distributed(local, target)


def distributed_like(full: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as the parts that `target` is cut into, each rank taking its own; the same where that is not sharded."""
    if isinstance(full, DTensor) or not isinstance(target, DTensor) or full.shape != target.shape:
        return full
    shape, offsets = _region(target)
    own = full[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
    return _distributed(own.clone(), target)


def _distributed(local: Tensor, target: DTensor) -> DTensor:
    return DTensor.from_local(
        local.to(target.device),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=torch.empty(target.shape, device="meta").stride(),
    )
