"""Controls for what a network knows of time order: the same frames shuffled, reversed, or all replaced by their mean.

Each takes any tensor with a batch in front and a time axis: bold (b, c, x, y, z, t) and series (b, parcels, t) with time
last, side series (b, t, k) with `time_axis=1`. Only true frames move; those after a window's true end stay as they are.
A shuffle is a function of the sample's key alone, so that any number of ranks, any batch and any resume gives the same, and
a sample's bold and side series keep together.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fmristream.errors import UsageError
from fmristream.stream.draws import key_of, uniforms

Ablation = Literal["shuffled", "reversed", "averaged"]
ABLATIONS = ("shuffled", "reversed", "averaged")


def shuffle_keys(seed: int, samples: Sequence[int], *, epoch: int = 0) -> list[int]:
    """What decides each sample's shuffle; one epoch gives a control that stays, several give new orders to train on.

    Args:
        seed: of the run.
        samples: numbers that are the same for a sample on every rank, such as the batch's `window`.
        epoch: that the samples belong to.
    """
    return [key_of("frame-order", seed, epoch, int(sample)) for sample in samples]


def ablate(
    x: Tensor,
    ablation: Ablation,
    *,
    keys: Sequence[int] | None = None,
    lengths: Tensor | None = None,
    time_axis: int = -1,
) -> Tensor:
    """One of the controls by its name; `keys` are needed for "shuffled" and decide nothing in the others."""
    if ablation == "reversed":
        return reversed_frames(x, lengths=lengths, time_axis=time_axis)
    if ablation == "averaged":
        return averaged_frames(x, lengths=lengths, time_axis=time_axis)
    if ablation != "shuffled":
        raise UsageError(f"there is no control {ablation!r} of time order; known: {', '.join(ABLATIONS)}")
    if keys is None:
        raise UsageError("shuffled frames need a key for each sample; give keys=shuffle_keys(seed, samples)")
    return shuffled_frames(x, keys, lengths=lengths, time_axis=time_axis)


def shuffled_frames(x: Tensor, keys: Sequence[int], *, lengths: Tensor | None = None, time_axis: int = -1) -> Tensor:
    """Every sample's true frames in an order drawn from its key, all orders equally likely."""
    frames = _time_first(x, time_axis)
    if len(keys) != len(x):
        raise UsageError(f"{len(x)} samples need as many keys to be shuffled by, got {len(keys)}; give one for each")
    orders = [_shuffled(key, length) for key, length in zip(keys, _true_lengths(frames, lengths), strict=True)]
    return _taken(frames, orders, time_axis)


def reversed_frames(x: Tensor, *, lengths: Tensor | None = None, time_axis: int = -1) -> Tensor:
    """Every sample's true frames from the last to the first."""
    frames = _time_first(x, time_axis)
    return _taken(frames, [torch.arange(n - 1, -1, -1) for n in _true_lengths(frames, lengths)], time_axis)


def averaged_frames(x: Tensor, *, lengths: Tensor | None = None, time_axis: int = -1) -> Tensor:
    """Every true frame replaced by the mean of its sample's true frames: the same shape, and nothing happens in time."""
    frames = _time_first(x, time_axis)
    rows = []
    for row, length in zip(frames, _true_lengths(frames, lengths), strict=True):
        mean = row[:length].mean(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        rows.append(torch.cat([mean.expand(length, *row.shape[1:]), row[length:]]))
    return torch.stack(rows).movedim(1, time_axis)


def _time_first(x: Tensor, time_axis: int) -> Tensor:
    """(b, ...) to (b, t, ...): whole frames move, and bold comes with time as its slow axis anyway."""
    if not -x.dim() <= time_axis < x.dim() or time_axis % x.dim() == 0:
        raise UsageError(f"axis {time_axis} of {tuple(x.shape)} is not time, which comes after the batch")
    return x.movedim(time_axis, 1)


def _true_lengths(frames: Tensor, lengths: Tensor | None) -> list[int]:
    if lengths is None:
        return [frames.shape[1]] * len(frames)
    if lengths.shape != (len(frames),) or lengths.is_floating_point():
        raise UsageError(
            f"lengths must be ({len(frames)},) whole numbers, got {tuple(lengths.shape)} of {lengths.dtype}; "
            "give one for each sample"
        )
    found = [int(length) for length in lengths.tolist()]
    if min(found) < 1 or max(found) > frames.shape[1]:
        raise UsageError(f"lengths must lie in 1 to {frames.shape[1]}, the number of frames, got {found}")
    return found


def _shuffled(key: int, length: int) -> Tensor:
    """A permutation: the order of as many numbers drawn from the key."""
    return torch.from_numpy(np.argsort(uniforms(key, length), kind="stable"))


def _taken(frames: Tensor, orders: Sequence[Tensor], time_axis: int) -> Tensor:
    """(b, t, ...) with each sample's first frames in its own order, and time where it was."""
    rows = []
    for row, order in zip(frames, orders, strict=True):
        places = torch.cat([order, torch.arange(len(order), len(row))])
        rows.append(row.index_select(0, places.to(row.device)))
    return torch.stack(rows).movedim(1, time_axis)
