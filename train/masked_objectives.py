"""Losses of what a network did not see: masked places and future frames; pure functions, computed in float32.

A masked loss is the mean over all masked values of the batch, as published for BrainLM: a window with more masked values
weighs more. Nothing masked gives 0, and a gradient of 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fmristream.errors import UsageError


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where `mask` is true; 0 where that is nowhere. `mask` has the shape of `values`, or broadcasts to it."""
    chosen = mask.to(torch.bool).expand_as(values)
    # where, not a product: a NaN outside the mask must not reach the loss.
    total = torch.where(chosen, values.float(), 0.0).sum()
    return total / chosen.sum().clamp_min(1)


def masked_mse(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the masked values."""
    return masked_mean(F.mse_loss(*_pair(predicted, target), reduction="none"), mask)


def masked_l1(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of the masked values."""
    return masked_mean(F.l1_loss(*_pair(predicted, target), reduction="none"), mask)


def future_mask(frames: int, future_frames: int, *, device: torch.device | None = None) -> Tensor:
    """(frames,) true at the last `future_frames` frames; broadcasts over everything that ends with time."""
    if not 1 <= future_frames < frames:
        raise UsageError(
            f"future frames must number 1 to {frames - 1} of a window of {frames}, got {future_frames}; "
            "lengthen the window or predict fewer frames"
        )
    return torch.arange(frames, device=device) >= frames - future_frames


def future_mse(predicted: Tensor, target: Tensor, future_frames: int) -> Tensor:
    """Mean squared error of the last frames; time is the last axis."""
    mask = future_mask(target.shape[-1], future_frames, device=target.device)
    return masked_mse(predicted, target, mask)


def future_l1(predicted: Tensor, target: Tensor, future_frames: int) -> Tensor:
    """Mean absolute error of the last frames; time is the last axis."""
    mask = future_mask(target.shape[-1], future_frames, device=target.device)
    return masked_l1(predicted, target, mask)


def joint_loss(task: Tensor, reconstruction: Tensor, *, weight: float = 0.5) -> Tensor:
    """A task's loss plus `weight` of a reconstruction's, as published for fine-tuning BrainLM (.5)."""
    return task + weight * reconstruction


MASKED_LOSSES = {"mse": masked_mse, "mae": masked_l1}


def _pair(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.shape != target.shape:
        raise UsageError(
            f"predicted values have shape {tuple(predicted.shape)}, their targets {tuple(target.shape)}; expected the same"
        )
    return predicted.float(), target.float()
