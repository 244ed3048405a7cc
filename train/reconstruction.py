"""How far rebuilt frames are from the frames: TFF's three losses, as pure functions of (b, 1, x, y, z, t).

The target is the first channel of the input (global z). The second (voxel z) says which voxels are intense.
All compute in float32, also under autocast.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmristream.errors import UsageError

# A voxel is intense above this quantile of the values above background, in its frame.
INTENSE_QUANTILE = 0.9
# Share of all axial slices that the published phases 1 and 2 look at.
SLICE_SHARES = {"tff1": 0.25, "tff2": 0.1}

# Slices (n, 3, x, y) to feature maps.
FeatureNet = Callable[[Tensor], Sequence[Tensor]]


def l1(rebuilt: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (rebuilt.float() - target.float()).abs().mean()


def intense_voxels(voxel_z: Tensor) -> Tensor:
    """Which voxels stand out of their frame: (b, 1, x, y, z, t) to bool of the same shape.

    In each frame, values up to that of the corner voxel (background) count as 0; of the others' absolute values, those
    above the 0.9 quantile (linear between neighbours, as `torch.quantile`, whose limit of 16 million values this has not)
    are intense. A frame without a value above background has none.
    """
    frames = voxel_z.float().movedim(5, 1)
    values = frames.flatten(2)
    heights = torch.where(values > values[..., :1], values.abs(), 0.0)
    found = (heights > 0).sum(2, keepdim=True)
    last = (found - 1).clamp_min(0)
    # In float32, as torch.quantile computes it. Its neighbours are among the upper tenth or, by
    # rounding, just below it, so no more than a ninth need be sorted.
    rank = torch.tensor(INTENSE_QUANTILE, device=values.device) * last
    upper = heights.topk(min(heights.shape[2], heights.shape[2] // 9 + 3), dim=2).values
    below, above = (upper.gather(2, last - index.long()) for index in (rank.floor(), rank.ceil()))
    threshold = below.lerp(above, rank - rank.floor())
    return (heights > threshold).view(frames.shape).movedim(1, 5)


def intense_l1(rebuilt: Tensor, target: Tensor, intense: Tensor) -> Tensor:
    """Mean absolute difference over the intense voxels of the batch; 0 where there are none."""
    differences = (rebuilt.float() - target.float()).abs()
    return torch.where(intense, differences, 0.0).sum() / intense.sum().clamp_min(1)


def choose_slices(bold: Tensor, *, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Numbers of randomly chosen axial slices of (b, c, x, y, z, t), at least one; `generator` is of the CPU."""
    count = bold.shape[0] * bold.shape[4] * bold.shape[5]
    chosen = torch.randperm(count, generator=generator)[: max(1, int(share * count))]
    return chosen.sort().values.to(bold.device)


def axial_slices(frames: Tensor, numbers: Tensor) -> Tensor:
    """Slices of (b, 1, x, y, z, t), counted over samples, frames and z (fastest), as gray pictures (n, 3, x, y)."""
    slices = frames.permute(0, 5, 4, 1, 2, 3).flatten(0, 2)
    return slices.index_select(0, numbers).float().expand(-1, 3, -1, -1)


def perceptual_l2(rebuilt: Tensor, target: Tensor, *, net: FeatureNet, slices: Tensor) -> Tensor:
    """Mean squared difference of the features of chosen axial slices, summed over the feature maps of `net`."""
    with torch.autocast(rebuilt.device.type, enabled=False):
        with torch.no_grad():
            wanted = net(axial_slices(target, slices))
        found = net(axial_slices(rebuilt, slices))
        differences = [(ours - theirs).square().mean() for ours, theirs in zip(found, wanted, strict=True)]
    return torch.stack(differences).sum()


def tff_losses(
    rebuilt: Tensor, bold: Tensor, *, net: FeatureNet | None = None, slices: Tensor | None = None
) -> dict[str, Tensor]:
    """The terms of TFF's loss, which the published code adds with weight 1 each.

    Args:
        rebuilt: what phase 1 or 2 made, (b, 1, x, y, z, t).
        bold: what it was given, (b, 2, x, y, z, t): global z and voxel z.
        net: features for the perceptual term (`train.perceptual.feature_net`); without it there is no such term.
        slices: which slices the perceptual term looks at (`choose_slices`); needed with `net`.
    """
    if bold.shape[1] != 2 or rebuilt.shape != bold[:, :1].shape:
        raise UsageError(
            f"TFF's loss compares (b, 1, x, y, z, t) with the first of two channels (global z, voxel z), got "
            f"{tuple(rebuilt.shape)} and {tuple(bold.shape)}; give the data two channels"
        )
    target = bold[:, :1]
    terms = {"l1": l1(rebuilt, target), "intense": intense_l1(rebuilt, target, intense_voxels(bold[:, 1:]))}
    if net is not None:
        if slices is None:
            raise UsageError("the perceptual term needs the numbers of its slices; pass slices=choose_slices(...)")
        terms["perceptual"] = perceptual_l2(rebuilt, target, net=net, slices=slices)
    return terms
