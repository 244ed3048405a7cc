"""What a network's input becomes before it sees it: other channels for the ablation, frames out of order as the control.

Each is a forward pre-hook of the network: its weights, their names, and the trainer's loop stay as they are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Hook = Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]


def static_mean(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """(global z, voxel z) (b, 2, x, y, z, t) to voxel z and, in every frame, the mean of global z over the window."""
    bold, *rest = inputs
    still = bold[:, :1].mean(-1, keepdim=True).expand_as(bold[:, :1])
    return (torch.cat([bold[:, 1:], still], dim=1), *rest)


def scaled_by(scale: Tensor) -> Hook:
    """Divide channel k of (b, c, ...) by scale[k]."""

    def hook(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        bold, *rest = inputs
        return (bold / scale.to(bold).view(1, -1, *(1,) * (bold.dim() - 2)), *rest)

    return hook


def channel_sds(windows: Iterable[Tensor]) -> Tensor:
    """(c,) float64: the SD of each channel over all voxels (background included, as networks see it) of (b, c, ...)."""
    count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for window in windows:
        values = window.transpose(0, 1).flatten(1).double()
        count += values.shape[1]
        total = total + values.sum(1)
        squares = squares + (values**2).sum(1)
    return (squares / count - (total / count) ** 2).clamp_min(1e-12).sqrt()


def shuffled_frames(seed: int) -> Hook:
    """Frames, the last axis, of each sample in an order of its own; the same calls draw the same orders."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        signal, *rest = inputs
        frames = signal.shape[-1]
        orders = torch.stack([torch.randperm(frames, generator=generator) for _ in range(len(signal))])
        orders = orders.to(signal.device).view(len(signal), *(1,) * (signal.dim() - 2), frames)
        return (signal.gather(-1, orders.expand_as(signal)), *rest)

    return hook
